"""Ragged images for `select` and `compress`: every form of input as a list of images, those as padded segments (images,
or windows of videos), and results back in the form of the input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import INTEGER, check_device, check_dims, check_int, check_known, check_negative, check_tensor


def stacked(values: Sequence[Tensor], fill: float = 0, length: int | None = None) -> Tensor:
    """(B, length, ...) of B tensors (n_i, ...), `fill` behind each; length: the longest one's. `pad_sequence` does not
    know `torch.vmap`."""
    length = max(map(len, values)) if length is None else length
    gap = values[0].new_full((length, *values[0].shape[1:]), fill)
    parts = [part for rows in values for part in (rows, gap[: length - len(rows)])]
    return torch.cat(parts).view(len(values), length, *values[0].shape[1:])


def numbers(value: Any) -> Any:
    """Nested lists of numbers for nested sequences of them, tensors and arrays among them; else the value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [numbers(v) for v in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


class Images:
    """Every form of input as a list of (n, D) images, and how results go back."""

    def __init__(
        self,
        name: str,
        tokens: Tensor | Sequence[Tensor],
        num_tokens: int | Tensor | Sequence[int],
        grid: Any,
        scores: Tensor | Sequence[Tensor] | None,
        mask: Tensor | None,
        window: int | None,
        positions: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        self.name = name
        self.rows: list[Tensor] | None = None
        self.form = "list"
        if isinstance(tokens, Tensor):
            check_dims(name, "tokens", tokens, 2, 3, "(B, N, D) or (N, D)")
            self.form = "batch" if tokens.dim() == 3 else "one"
            self.width = tokens.shape[-2]
            tokens = list(tokens) if self.form == "batch" else [tokens]
        if not isinstance(tokens, Iterable):
            raise TypeError(f"{name}: tokens must be a tensor or a list of them, got {type(tokens).__name__}")
        self.tokens = list(tokens)
        for i, x in enumerate(self.tokens):
            check_tensor(name, f"tokens[{i}]", x, floating=True)
            check_device(name, f"tokens[{i}]", x, self.tokens[0])
            if x.dim() != 2 or x.shape[1] != self.tokens[0].shape[-1]:
                raise ValueError(f"{name}: tokens[{i}] must have shape (n, D) with one D, got {tuple(x.shape)}")
        if not self.tokens:
            raise ValueError(f"{name}: tokens must hold at least one image, got none")
        self.scores = self._per_image("scores", scores, 1)
        self.positions = self._per_image("positions", positions, 2)
        self.grids = self._grids(grid, window)
        self.window = window
        if mask is not None:
            self._mask(mask)
        self.lengths = [len(x) for x in self.tokens]
        self.counts = self._counts(num_tokens)

    def _per_image(self, argument: str, value: Tensor | Sequence[Tensor] | None, dims: int) -> list[Tensor] | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            value = [value] if self.form == "one" or value.dim() == 0 else list(value)
        if not isinstance(value, Sequence):
            raise TypeError(f"{self.name}: {argument} must be a tensor or a list of them, got {type(value).__name__}")
        if len(value) != len(self.tokens):
            raise ValueError(f"{self.name}: {argument} must hold {len(self.tokens)} images, got {len(value)}")
        for i, (v, x) in enumerate(zip(value, self.tokens)):
            what = f"{argument} of image {i}"
            check_tensor(self.name, what, v)
            if v.dtype.is_complex:
                raise TypeError(f"{self.name}: {what} must be real, got {v.dtype}")
            if v.dim() != dims or len(v) != len(x) or v.shape[1:] != value[0].shape[1:]:
                shape = (len(x),) if dims == 1 else f"({len(x)}, P) with one P"
                raise ValueError(f"{self.name}: {what} must have shape {shape}, got {tuple(v.shape)}")
            check_device(self.name, what, v, x)
        return list(value)

    def _grids(self, grid: Any, window: int | None) -> list[tuple[int, ...]] | None:
        if grid is None:
            if window is not None:
                raise ValueError(f"{self.name}: temporal_window needs grid=(T, H, W), got None")
            return None
        check_known(self.name, "grid", grid)
        grid = numbers(grid)
        if not isinstance(grid, list):
            raise TypeError(f"{self.name}: grid must be (H, W), (T, H, W) or a list of them, got {type(grid).__name__}")
        grids = grid if any(isinstance(sides, list) for sides in grid) else [grid] * len(self.tokens)
        if len(grids) != len(self.tokens):
            raise ValueError(f"{self.name}: grid must be one for all or {len(self.tokens)}, got {len(grids)}")
        for i, (sides, x) in enumerate(zip(grids, self.tokens)):
            if not isinstance(sides, list):
                raise TypeError(f"{self.name}: grid of image {i} must be (H, W) or (T, H, W), got {sides!r}")
            total = 1
            for side in sides:
                total *= check_int(self.name, f"grid of image {i}", side, 1)
            if len(sides) not in (2, 3) or total != len(x):
                raise ValueError(
                    f"{self.name}: grid of image {i} must be (H, W) or (T, H, W) of {len(x)} tokens, got {tuple(sides)}"
                )
        if window is not None:
            check_int(self.name, "temporal_window", window, 1)
            for i, sides in enumerate(grids):
                if len(sides) != 3:
                    raise ValueError(
                        f"{self.name}: temporal_window needs grid=(T, H, W), got {tuple(sides)} of image {i}"
                    )
        return [tuple(int(side) for side in sides) for sides in grids]

    def _mask(self, mask: Tensor) -> None:
        if self.form != "batch" or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{self.name}: mask must be a (B, N) bool tensor beside (B, N, D) tokens")
        check_known(self.name, "mask", mask)
        if mask.shape != (len(self.tokens), self.width):
            raise ValueError(
                f"{self.name}: mask must have shape {(len(self.tokens), self.width)}, got {tuple(mask.shape)}"
            )
        if self.window is not None:
            raise ValueError(f"{self.name}: mask must be None beside temporal_window; pass a list of videos")
        real = [m.nonzero()[:, 0] for m in mask]
        self.tokens = [x[rows] for x, rows in zip(self.tokens, real)]
        if self.scores is not None:
            self.scores = [s[rows] for s, rows in zip(self.scores, real)]
        if self.positions is not None:
            self.positions = [p[rows] for p, rows in zip(self.positions, real)]
        self.rows = real

    def _counts(self, num_tokens: int | Tensor | Sequence[int]) -> list[int]:
        if isinstance(num_tokens, Tensor):
            check_known(self.name, "num_tokens", num_tokens)
            if num_tokens.dtype not in INTEGER:
                raise TypeError(f"{self.name}: num_tokens must hold integers, got {num_tokens.dtype}")
        given = numbers(num_tokens)
        counts: list[Any] = given if isinstance(given, list) else [given] * len(self.tokens)
        if len(counts) != len(self.tokens):
            raise ValueError(f"{self.name}: num_tokens must be an int or {len(self.tokens)}, got {len(counts)}")
        for i, (k, x) in enumerate(zip(counts, self.tokens)):
            check_int(self.name, f"num_tokens of image {i}" if isinstance(given, list) else "num_tokens", k, 1)
            if k > len(x):
                raise ValueError(
                    f"{self.name}: num_tokens must be from 1 to the tokens of image {i}, {len(x)}, got {k}"
                )
        return [int(k) for k in counts]

    def coordinates(self) -> list[Tensor] | None:
        """float32 coordinates of every token of every image, from `positions` or the grid."""
        if self.positions is not None:
            return [p.float() for p in self.positions]
        if self.grids is None:
            return None
        cells = [
            torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in sides)).float()
            for sides, x in zip(self.grids, self.tokens)
        ]
        return cells if self.rows is None else [c[rows] for c, rows in zip(cells, self.rows)]

    def segments(self) -> Segments:
        lengths, counts = [], []
        for i, (n, k) in enumerate(zip(self.lengths, self.counts)):
            if self.window is None or self.grids is None:
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
        return Segments(self, lengths, counts)

    def give_back(self, values: list[Tensor], fill: float = 0) -> Any:
        """(k, ...) an image, in the form of the input."""
        if self.form == "list":
            return values
        return values[0] if self.form == "one" else stacked(values, fill)

    def give_back_tokens(self, values: list[Tensor], fill: float = -1) -> Any:
        """(n,) an image: beside its tokens."""
        if self.rows is None:
            return self.give_back(values, fill)
        result = values[0].new_full((len(values), self.width), fill)
        for row, rows, v in zip(result, self.rows, values):
            row[rows] = v
        return result


class Segments:
    """Padded (S, N, D) tokens with their mask, counts and weights; S windows or images."""

    def __init__(self, images: Images, lengths: list[list[int]], counts: list[list[int]]) -> None:
        self.per_image = [len(parts) for parts in lengths]
        self.lengths = [n for parts in lengths for n in parts]
        self.k = [k for shares in counts for k in shares]
        self.x = self.split(images.tokens)
        weights = None
        if images.scores is not None:
            scores = check_negative(images.name, "scores", stacked(images.scores), self.x, None)  # a row an image
            weights = self.split([s[:n, None] for s, n in zip(scores, images.lengths)])[..., 0]
        self.weights = weights
        device = self.x.device
        same = len(set(self.lengths)) == 1
        self.mask = None
        if not same:
            self.mask = (
                torch.arange(self.x.shape[1], device=device) < torch.tensor(self.lengths, device=device)[:, None]
            )
        self.counts = self.k[0] if len(set(self.k)) == 1 else torch.tensor(self.k, device=device)

    def split(self, values: list[Tensor]) -> Tensor:
        return stacked(torch.cat(values).split(self.lengths))

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
