"""Fewer visual tokens in front of a language model: `select` keeps some, `compress` merges them.

Both need the embeddings alone (no CLS token, no attention), know their count before the call, and take batches, ragged
lists (several images a prompt), and videos, whose clusters may be kept within windows of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .checks import FLOATING, INTEGER, check_choice, check_int
from .functional import kmeans, kmedoids, pool, unpool

Grid = Sequence[int]


class Compressed(NamedTuple):
    """What `compress` returns; each field a list for a list of images, without B for one (N, D) image.

    tokens      (B, K, D) in the tokens' dtype: the means. Zeros behind an image's own K. Differentiable.
    positions   (B, K, P) float32, or None where neither `positions` nor `grid` was given.
    sizes       (B, K) int64: how many tokens were merged; 0 where there is none.
    assignment  (B, N) int64: the row of `tokens` that stands for each token; -1 for padding.
    """

    tokens: Tensor | list[Tensor]
    positions: Tensor | list[Tensor] | None
    sizes: Tensor | list[Tensor]
    assignment: Tensor | list[Tensor]


def compress(
    tokens: Tensor | Sequence[Tensor],
    num_tokens: int | Tensor | Sequence[int],
    *,
    positions: Tensor | Sequence[Tensor] | None = None,
    grid: Grid | Sequence[Grid] | None = None,
    scores: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    temporal_window: int | None = None,
    position_of: str = "mean",
    num_iters: int = 5,
    backend: str | None = None,
) -> Compressed:
    """Merge each image's visual tokens into `num_tokens` means by K-Means, in reading order.

    Args:
        tokens: (B, N, D) or (N, D), floating; or a list of (n_i, D), one an image.
        num_tokens: how many come out of each image, 1 to its tokens: an int, or one an image (a (B,) tensor or a list).
        positions: (B, N, P), (N, P) or a list of (n_i, P): any coordinates of the tokens. None: those of `grid`.
        grid: (H, W) of an image or (T, H, W) of a video, its tokens in raster order; one for all, or a list.
        scores: significance of each token, (B, N), (N,) or a list of (n_i,), >= 0: weights of the clustering and its
            means. Only ratios matter.
        mask: (B, N) bool, True for real tokens; for batched tokens.
        temporal_window: with a (T, H, W) grid: merge within so many frames only. Each window gets its share of
            num_tokens.
        position_of: "mean": a token's position is the mean over the tokens it replaces; "medoid": that of the replaced
            token nearest to it (a cell of the grid, as M-RoPE wants).
        num_iters, backend: as in `kmeans`.

    Returns:
        `Compressed`: tokens, positions, sizes, assignment. Rows are ordered by the index of the token nearest to each
        mean: reading order.

    Raises:
        TypeError, ValueError: naming the argument, and the image by its index in a list.
    """
    name = "compress"
    check_choice(name, "position_of", position_of, ("mean", "medoid"))
    images = _Images(name, tokens, num_tokens, grid, scores, mask, temporal_window)
    places = images.coordinates(positions)
    segments = images.segments()
    clusters = kmeans(
        segments.x,
        segments.counts,
        weights=segments.weights,
        mask=segments.mask,
        init="farthest",
        num_iters=num_iters,
        backend=backend,
    )
    means, assignment = clusters.centers, clusters.assignment
    order, medoids = _reading_order(_representatives(segments.x, means, assignment))
    means = means.gather(1, order[..., None].expand_as(means))
    assignment = torch.where(assignment >= 0, order.argsort(1).gather(1, assignment.clamp(min=0)), -1)
    if places is not None:
        padded = segments.split(places)
        if position_of == "mean":
            placed = pool(padded, assignment, means.shape[1], backend=backend)
        else:
            placed = padded.gather(1, medoids.clamp(min=0)[..., None].expand(-1, -1, padded.shape[2]))
        places = segments.join(placed)
    sizes = torch.zeros(medoids.shape, dtype=torch.int64, device=means.device)
    sizes.scatter_add_(1, assignment.clamp(min=0), (assignment >= 0).long())
    return Compressed(
        images.give_back(segments.join(means)),
        None if places is None else images.give_back(places),
        images.give_back(segments.join(sizes)),
        images.give_back_tokens(segments.join_labels(assignment)),
    )


def select(
    tokens: Tensor | Sequence[Tensor],
    num_tokens: int | Tensor | Sequence[int],
    *,
    grid: Grid | Sequence[Grid] | None = None,
    scores: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    temporal_window: int | None = None,
    num_iters: int = 5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Keep `num_tokens` visual tokens of each image as they are: the medoids of K-Medoids.

    Arguments are those of `compress`.

    Returns:
        indices: (B, K) int64, ascending; -1 behind an image's own K. (K,) for one image, a list for a list.
        mask: (B, N) bool, True for the tokens kept: `tokens[mask]` are they, in the order of `indices`.
    """
    images = _Images("select", tokens, num_tokens, grid, scores, mask, temporal_window)
    segments = images.segments()
    with torch.no_grad():
        clusters = kmedoids(
            segments.x,
            segments.counts,
            weights=segments.weights,
            mask=segments.mask,
            init="farthest",
            num_iters=num_iters,
            backend=backend,
        )
    _, medoids = _reading_order(clusters.medoids)
    indices = segments.join_indices(medoids)
    kept = []
    for i, n in zip(indices, images.lengths):
        kept.append(torch.zeros(n, dtype=torch.bool, device=i.device).index_fill_(0, i, True))
    if images.rows is not None:  # padding: back to the places in the batch
        indices = [rows[i] for rows, i in zip(images.rows, indices)]
    return images.give_back(indices, fill=-1), images.give_back_tokens(kept, fill=False)


def drop_placeholders(input_ids: Tensor, placeholder: int, counts: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Shrink the runs of image placeholders that a processor has already expanded, one sequence.

    Args:
        input_ids: (L,) token ids with one run of `placeholder` an image (ids of row or frame separators end a run).
        placeholder: the id of the image token.
        counts: how many placeholders each run keeps, in order.

    Returns:
        The shorter ids and the (L,) bool mask of what was kept (for labels, position ids, attention masks); from the
        end of each run its surplus is dropped.

    Raises:
        ValueError: as many runs as counts are expected, and no run is longer than it was.
    """
    counts = [int(c) for c in counts]
    image = input_ids == placeholder
    starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
    run = starts.cumsum(0)
    found = int(run[-1]) if len(run) else 0
    if found != len(counts):
        raise ValueError(f"drop_placeholders: counts must name {found} runs of id {placeholder}, got {len(counts)}")
    within = torch.arange(len(image), device=image.device)
    first = within[starts]
    lengths = torch.zeros(found, dtype=torch.int64, device=image.device)
    lengths.scatter_add_(0, (run - 1)[image], torch.ones_like(run[image]))
    for i, (count, length) in enumerate(zip(counts, lengths.tolist())):
        if not 0 <= count <= length:
            raise ValueError(f"drop_placeholders: counts[{i}] must be from 0 to its run's {length}, got {count}")
    if not found:
        return input_ids, ~image
    wanted = torch.tensor(counts, device=image.device)
    at = (run - 1).clamp(min=0)
    keep = ~image | (within - first[at] < wanted[at])
    return input_ids[keep], keep


# ---- images in, segments (an image, or a window of a video) through the clustering, images out -----------------------


class _Images:
    """Every form of input as a list of (n, D) images, and how results go back."""

    def __init__(self, name, tokens, num_tokens, grid, scores, mask, window) -> None:
        self.name, self.rows = name, None
        self.form = "list"
        if isinstance(tokens, Tensor):
            if tokens.dim() not in (2, 3):
                raise ValueError(f"{name}: tokens must have shape (B, N, D) or (N, D), got {tuple(tokens.shape)}")
            self.form = "batch" if tokens.dim() == 3 else "one"
            self.width = tokens.shape[-2]
            tokens = list(tokens) if self.form == "batch" else [tokens]
        self.tokens = list(tokens)
        for i, x in enumerate(self.tokens):
            if not isinstance(x, Tensor) or x.dtype not in FLOATING:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}: tokens[{i}] must be a floating tensor, got {got}")
            if x.dim() != 2 or x.shape[1] != self.tokens[0].shape[-1]:
                raise ValueError(f"{name}: tokens[{i}] must have shape (n, D) with one D, got {tuple(x.shape)}")
        if not self.tokens:
            raise ValueError(f"{name}: tokens must hold at least one image, got none")
        self.scores = self.per_image("scores", scores, 1)
        self.grids = self._grids(grid, window)
        self.window = window
        if mask is not None:
            self._mask(mask)
        self.lengths = [len(x) for x in self.tokens]
        self.counts = self._counts(num_tokens)

    def per_image(self, argument: str, value, dims: int) -> list[Tensor] | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            one = value if self.form == "one" else None
            value = [one] if one is not None else list(value)
        if len(value) != len(self.tokens):
            raise ValueError(f"{self.name}: {argument} must hold {len(self.tokens)} images, got {len(value)}")
        for i, (v, x) in enumerate(zip(value, self.tokens)):
            if not isinstance(v, Tensor) or v.dim() != dims or len(v) != len(x):
                got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
                shape = (len(x),) if dims == 1 else f"({len(x)}, P)"
                raise ValueError(f"{self.name}: {argument} of image {i} must have shape {shape}, got {got}")
        return list(value)

    def _grids(self, grid, window) -> list[tuple[int, ...]] | None:
        if grid is None:
            if window is not None:
                raise ValueError(f"{self.name}: temporal_window needs grid=(T, H, W), got None")
            return None
        if isinstance(grid, Tensor):
            grid = grid.tolist()
        grids = [grid] * len(self.tokens) if all(not hasattr(side, "__len__") for side in grid) else list(grid)
        if len(grids) != len(self.tokens):
            raise ValueError(f"{self.name}: grid must be one for all or {len(self.tokens)}, got {len(grids)}")
        for i, (sides, x) in enumerate(zip(grids, self.tokens)):
            total = 1
            for side in sides:
                total *= check_int(self.name, f"grid of image {i}", side, 1)
            if len(sides) not in (2, 3) or total != len(x):
                raise ValueError(
                    f"{self.name}: grid of image {i} must be (H, W) or (T, H, W) of {len(x)} tokens, got {tuple(sides)}"
                )
        if window is not None:
            check_int(self.name, "temporal_window", window, 1)
            if any(len(sides) != 3 for sides in grids):
                raise ValueError(f"{self.name}: temporal_window needs grid=(T, H, W), got {grids[0]}")
        return [tuple(int(side) for side in sides) for sides in grids]

    def _mask(self, mask) -> None:
        if self.form != "batch" or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{self.name}: mask must be a (B, N) bool tensor beside (B, N, D) tokens")
        if mask.shape != (len(self.tokens), self.width):
            raise ValueError(
                f"{self.name}: mask must have shape {(len(self.tokens), self.width)}, got {tuple(mask.shape)}"
            )
        if self.window is not None:
            raise ValueError(f"{self.name}: mask must be None beside temporal_window; pass a list of videos")
        self.rows = [m.nonzero()[:, 0] for m in mask]
        self.tokens = [x[rows] for x, rows in zip(self.tokens, self.rows)]
        if self.scores is not None:
            self.scores = [s[rows] for s, rows in zip(self.scores, self.rows)]

    def _counts(self, num_tokens) -> list[int]:
        if isinstance(num_tokens, Tensor):
            if num_tokens.dtype not in INTEGER:
                raise TypeError(f"{self.name}: num_tokens must hold integers, got {num_tokens.dtype}")
            num_tokens = num_tokens.tolist()
        counts = list(num_tokens) if isinstance(num_tokens, (list, tuple)) else [num_tokens] * len(self.tokens)
        if len(counts) != len(self.tokens):
            raise ValueError(f"{self.name}: num_tokens must be an int or {len(self.tokens)}, got {len(counts)}")
        for i, (k, x) in enumerate(zip(counts, self.tokens)):
            check_int(self.name, "num_tokens", k, 1)
            if k > len(x):
                raise ValueError(
                    f"{self.name}: num_tokens must be from 1 to the tokens of image {i}, {len(x)}, got {k}"
                )
        return [int(k) for k in counts]

    def coordinates(self, positions) -> list[Tensor] | None:
        """float32 coordinates of every token of every image, from `positions` or the grid."""
        if positions is not None:
            if self.rows is not None and isinstance(positions, Tensor):
                positions = [p[rows] for p, rows in zip(positions, self.rows)]
            return [p.float() for p in self.per_image("positions", positions, 2)]
        if self.grids is None:
            return None
        cells = [torch.cartesian_prod(*(torch.arange(side) for side in sides)).float() for sides in self.grids]
        cells = [c.to(x.device) for c, x in zip(cells, self.tokens)]
        return cells if self.rows is None else [c[rows] for c, rows in zip(cells, self.rows)]

    def segments(self) -> _Segments:
        lengths, counts = [], []
        for i, (n, k) in enumerate(zip(self.lengths, self.counts)):
            if self.window is None:
                parts, shares = [n], [k]
            else:
                frames, height, width = self.grids[i]
                edges = [*range(0, frames, self.window), frames]
                parts = [(b - a) * height * width for a, b in zip(edges, edges[1:])]
                ends = [k * b // frames for b in edges[1:]]  # so many tokens up to each window's end
                shares = [b - a for a, b in zip([0, *ends], ends)]
                if min(shares) < 1:
                    raise ValueError(
                        f"{self.name}: num_tokens must be at least one a window, {len(parts)} in image {i}, got {k}"
                    )
            lengths.append(parts)
            counts.append(shares)
        return _Segments(self, lengths, counts)

    def give_back(self, values: list[Tensor], fill=0):
        """(k, ...) an image, in the form of the input."""
        if self.form == "list":
            return values
        return values[0] if self.form == "one" else pad_sequence(values, batch_first=True, padding_value=fill)

    def give_back_tokens(self, values: list[Tensor], fill=-1):
        """(n,) an image: beside its tokens."""
        if self.rows is None:
            return self.give_back(values, fill)
        result = values[0].new_full((len(values), self.width), fill)
        for row, rows, v in zip(result, self.rows, values):
            row[rows] = v
        return result


class _Segments:
    """Padded (S, N, D) tokens with their mask, counts and weights; S windows or images."""

    def __init__(self, images: _Images, lengths: list[list[int]], counts: list[list[int]]) -> None:
        self.per_image = [len(parts) for parts in lengths]
        self.lengths = [n for parts in lengths for n in parts]
        self.k = [k for shares in counts for k in shares]
        self.x = self.split(images.tokens)
        self.weights = (
            None if images.scores is None else self.split([s.detach()[:, None] for s in images.scores])[..., 0]
        )
        device = self.x.device
        same = len(set(self.lengths)) == 1
        self.mask = None
        if not same:
            self.mask = (
                torch.arange(self.x.shape[1], device=device) < torch.tensor(self.lengths, device=device)[:, None]
            )
        self.counts = self.k[0] if len(set(self.k)) == 1 else torch.tensor(self.k, device=device)

    def split(self, values: list[Tensor]) -> Tensor:
        return pad_sequence(torch.cat(values).split(self.lengths), batch_first=True)

    def _images(self, parts: list[Tensor]) -> list[Tensor]:
        result, start = [], 0
        for count in self.per_image:
            group = parts[start : start + count]
            result.append(group[0] if count == 1 else torch.cat(group))
            start += count
        return result

    def join(self, values: Tensor) -> list[Tensor]:
        """(S, K, ...) -> (k, ...) an image."""
        return self._images([v[:k] for v, k in zip(values, self.k)])

    def _offsets(self, numbers: list[int]) -> list[int]:
        """What comes before each segment in its image."""
        offsets, start = [], 0
        for count in self.per_image:
            total = 0
            for n in numbers[start : start + count]:
                offsets.append(total)
                total += n
            start += count
        return offsets

    def join_labels(self, assignment: Tensor) -> list[Tensor]:
        return self._images([a[:n] + o for a, n, o in zip(assignment, self.lengths, self._offsets(self.k))])

    def join_indices(self, indices: Tensor) -> list[Tensor]:
        return self._images([i[:k] + o for i, k, o in zip(indices, self.k, self._offsets(self.lengths))])


@torch.no_grad()
def _representatives(x: Tensor, centers: Tensor, assignment: Tensor) -> Tensor:
    """(B, K) the member nearest to each mean (ties: the first); -1 where there is no cluster."""
    distance = (x.float() - unpool(centers.float(), assignment)).square().sum(2).nan_to_num(torch.inf)
    distance = torch.where(assignment >= 0, distance, torch.inf)
    labels = assignment.clamp(min=0)
    least = distance.new_full(centers.shape[:2], torch.inf).scatter_reduce(1, labels, distance, "amin")
    n = x.shape[1]
    index = torch.arange(n, device=x.device).expand_as(labels)
    index = torch.where((assignment >= 0) & (distance <= least.gather(1, labels)), index, n)
    first = index.new_full(centers.shape[:2], n).scatter_reduce(1, labels, index, "amin")
    return torch.where(first < n, first, -1)


def _reading_order(medoids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in the order of their medoids, those that do not exist (-1) last; and the medoids in that order."""
    last = torch.where(medoids >= 0, medoids, torch.iinfo(torch.int64).max)
    order = last.argsort(dim=1, stable=True)
    return order, medoids.gather(1, order)
