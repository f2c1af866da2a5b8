"""Position-aware clustering: where the tokens are, as further features beside what they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .functional import pool
from .ops import accumulate_dtype

HEAVIEST = 2.0**60  # a weight beside which features are rounding in every dtype


def with_positions(features: Tensor, positions: Tensor, weight: float, mask: Tensor | None = None) -> Tensor:
    """Features with the coordinates appended, so scaled that they spread ``weight`` times as far as the features (at
    most ``HEAVIEST`` times).

    The spread of an image is the root of its tokens' mean squared distance to their mean.

    Args:
        features: (B, N, E), floating.
        positions: (B, N, P) coordinates in any unit.
        weight: 1 lets places count as much as features.
        mask: (B, N) bool, True = real token: padding has no part in the spreads.

    Returns:
        (B, N, E + P) in features.dtype; no gradient through the scale nor the coordinates. Where the coordinates would
        be too large for it, all of the image is scaled down: distances keep their ratios.
    """
    acc = accumulate_dtype(features.dtype)
    real = (positions.new_ones(positions.shape[:2], dtype=torch.bool) if mask is None else mask)[:, :, None]
    places, _ = _in_spreads(positions.detach().to(acc), real)
    _, spread = _in_spreads(features.detach().to(acc), real)
    weight = min(weight, HEAVIEST)
    farthest = places.abs().amax((1, 2), keepdim=True) if places.shape[2] else torch.ones_like(spread)
    shrink = 1 / (spread / (torch.finfo(features.dtype).max / 4) * (weight * farthest)).clamp(min=1)
    parts = features * shrink, weight * (spread * shrink) * places
    return torch.cat([part.to(features.dtype) for part in parts], dim=2)


def _in_spreads(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, N, E) less the mean of the real tokens, in spreads, zeros elsewhere; and the spread (B, 1, 1).

    `pool` makes the means: equal rows become exact zeros, and no sum depends on how far an image is padded.
    """
    labels = real[:, :, 0].long() - 1
    x = torch.where(real, x - pool(x, labels, 1), 0)
    largest = x.abs().amax((1, 2), keepdim=True) if x.shape[2] else x.new_zeros(x.shape[0], 1, 1)
    x = torch.where(largest > 0, x / largest, 0)  # so that no square overflows or vanishes
    root = pool(x.square().sum(2, keepdim=True), labels, 1).sqrt()
    return torch.where(root > 0, x / root, 0), largest * root


def grid_positions(n: int, device: torch.device) -> Tensor:
    """(n, 2) row and column of the tokens of a square image in raster order.

    Raises:
        ValueError: n is no square.
    """
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"position_weight: {n} tokens are no square grid; give their coordinates with positions=...")
    index = torch.arange(n, device=device)
    return torch.stack([index // side, index % side], 1).float()
