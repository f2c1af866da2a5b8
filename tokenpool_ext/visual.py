"""Fewer visual tokens in front of a language model: `select` keeps some, `compress` merges them.

Both need the embeddings alone (no CLS token, no attention), know their count before the call, and take batches, ragged
lists (several images a prompt), and videos, whose clusters may be kept within windows of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    INTEGER,
    LARGEST,
    check_backend,
    check_choice,
    check_int,
    check_known,
    check_position_weight,
    check_tensor,
)
from .functional import kmeans, kmedoids, pool, register_result
from .ops import accumulate_dtype
from .positions import with_positions
from .ragged import Images, numbers
from .reference_steps import nearest_members

Grid = Sequence[int]


class Compressed(NamedTuple):
    """What `compress` returns; each field a list for a list of images, without B for one (N, D) image.

    tokens      (B, K, D) in the tokens' dtype: the means. Zeros behind an image's own K. Gradients flow to
                `tokens` and `scores`; the assignment is constant.
    positions   (B, K, P) float32, or None where neither `positions` nor `grid` was given. Gradients flow to
                `positions`.
    sizes       (B, K) int64: how many tokens were merged; 0 where there is none.
    assignment  (B, N) int64: the row of `tokens` that stands for each token; -1 for padding.
    """

    tokens: Tensor | list[Tensor]
    positions: Tensor | list[Tensor] | None
    sizes: Tensor | list[Tensor]
    assignment: Tensor | list[Tensor]


register_result(Compressed)


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
    position_weight: float = 0.0,
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
            num_tokens, which must be at least one.
        position_of: "mean": a token's position is the mean over the tokens it replaces; "medoid": that of the replaced
            token nearest to it (a cell of the grid, as M-RoPE wants).
        position_weight: cluster on the coordinates too: how far they spread, in spreads of the tokens. 0: on the tokens
            alone.
        num_iters: as in `kmeans`.
        backend: as in `kmeans`.

    Returns:
        `Compressed`: tokens, positions, sizes, assignment. Rows are ordered by the index of the token nearest to each
        mean: reading order.

    Raises:
        TypeError, ValueError: naming the argument, and the image by its index in a list.
    """
    name = "compress"
    check_choice(name, "position_of", position_of, ("mean", "medoid"))
    check_int(name, "num_iters", num_iters, 1)
    check_backend(name, backend)
    images = Images(name, tokens, num_tokens, grid, scores, mask, temporal_window, positions)
    places = images.coordinates()
    segments = images.segments()
    padded = None if places is None else segments.split(places)
    features = None
    if check_position_weight(name, position_weight):
        if padded is None:
            raise ValueError(f"{name}: position_weight={position_weight:g} needs positions or grid, got neither")
        features = with_positions(segments.x.detach(), padded, position_weight, segments.mask)
    clusters = kmeans(
        segments.x if features is None else features,
        segments.counts,
        weights=segments.weights,
        mask=segments.mask,
        init="farthest",
        num_iters=num_iters,
        backend=backend,
    )
    means, assignment, medoids = clusters.centers, clusters.assignment, clusters.medoids
    if features is not None:  # means of the tokens alone, and the tokens nearest to these
        means = pool(segments.x, assignment, means.shape[1], weights=segments.weights, backend=backend)
        x = segments.x.detach().to(accumulate_dtype(segments.x.dtype))  # its means are not rounded
        weights = x.new_ones(x.shape[:2]) if segments.weights is None else segments.weights.detach()
        exact = means.detach()
        if x.dtype != segments.x.dtype:
            exact = pool(x, assignment, means.shape[1], weights=weights, backend=backend)
        medoids = nearest_members(x, exact, assignment, weights)
    order, medoids = _reading_order(medoids)
    means = means.gather(1, order[..., None].expand_as(means))
    assignment = torch.where(assignment >= 0, order.argsort(1).gather(1, assignment.clamp(min=0)), -1)
    if padded is not None:
        if position_of == "mean":
            placed = pool(padded, assignment, means.shape[1], backend=backend)
        else:
            placed = padded.gather(1, medoids.clamp(min=0)[..., None].expand(-1, -1, padded.shape[2]))
        places = segments.join(placed)
    sizes = torch.zeros_like(medoids).scatter_add(1, assignment.clamp(min=0), (assignment >= 0).long())
    merged = [rows.to(x.dtype) for rows, x in zip(segments.join(means), images.tokens)]
    return Compressed(
        images.give_back(merged),
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
        mask: (B, N) bool, True for the tokens kept: `tokens[mask]` gives them, in the order of `indices`.
    """
    check_int("select", "num_iters", num_iters, 1)
    check_backend("select", backend)
    images = Images("select", tokens, num_tokens, grid, scores, mask, temporal_window)
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
        kept.append(torch.zeros(n, dtype=torch.bool, device=i.device).index_fill(0, i, True))
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
        TypeError: input_ids are not (L,) integers, or placeholder or a count is no integer.
        ValueError: there are not as many counts as runs, or one is negative or above its run's length.
    """
    name = "drop_placeholders"
    check_tensor(name, "input_ids", input_ids)
    if input_ids.dtype not in INTEGER or input_ids.dim() != 1:
        got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        raise TypeError(f"{name}: input_ids must be (L,) integers, one sequence, got {got}")
    placeholder = check_int(name, "placeholder", placeholder, -(2**63), 2**63 - 1)
    for argument, value in (("input_ids", input_ids), ("counts", counts)):
        check_known(name, argument, value)
    counts = numbers(counts)
    if not isinstance(counts, list):
        raise TypeError(f"{name}: counts must be a list of ints, one a run, got {type(counts).__name__}")
    counts = [check_int(name, f"counts[{i}]", c, -LARGEST) for i, c in enumerate(counts)]
    image = input_ids == placeholder
    starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
    run = starts.cumsum(0)
    found = int(run[-1]) if len(run) else 0
    if found != len(counts):
        raise ValueError(f"{name}: counts must name {found} runs of id {placeholder}, got {len(counts)}")
    within = torch.arange(len(image), device=image.device)
    first = within[starts]
    lengths = torch.zeros(found, dtype=torch.int64, device=image.device)
    lengths.scatter_add_(0, (run - 1)[image], torch.ones_like(run[image]))
    for i, (count, length) in enumerate(zip(counts, lengths.tolist())):
        if not 0 <= count <= length:
            raise ValueError(f"{name}: counts[{i}] must be from 0 to its run's {length}, got {count}")
    if not found:
        return input_ids, ~image
    wanted = torch.tensor(counts, device=image.device)
    at = (run - 1).clamp(min=0)
    keep = ~image | (within - first[at] < wanted[at])
    return input_ids[keep], keep


def _reading_order(medoids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in the order of their medoids, those that do not exist (-1) last; and the medoids in that order."""
    last = torch.where(medoids >= 0, medoids, torch.iinfo(torch.int64).max)
    order = last.argsort(dim=1, stable=True)
    return order, medoids.gather(1, order)
