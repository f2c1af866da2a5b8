"""Where Lloyd's iteration starts: every strategy of `init=`, as token indices (B, K) or centers (B, K, D).

All strategies are batched and respect the mask: padding is never chosen. Where an image has fewer valid tokens than
clusters, the surplus entries are arbitrary (the operators ignore clusters above the image's effective K). None of them
synchronises with the host.

Sources: "kmeans++" Arthur & Vassilvitskii 2007; "farthest" Gonzalez 1985 (the farthest-first traversal that public
Token Pooling code uses without weights); "topk" (ties to the lowest index) is what public code uses with significance
scores; "bipartite" is the matching of Bolya et al. 2023 (ToMe, section 3; matching.py). The paper
does not say which it used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import loader, values
from .backends import no_autocast
from .matching import match
from .ops import accumulate_dtype, falling, farthest_start
from .reference import pool, seeds

STRATEGIES = ("topk", "strided", "random", "kmeans++", "farthest", "bipartite")


SORTED_HERE = 1 << 15  # scores of "topk"; torch sorts more of them with all threads


def make(
    name: str,
    x: Tensor,
    num_clusters: int,
    weights: Tensor | None,
    mask: Tensor | None,
    counts: Tensor | None,
    generator: torch.Generator | None,
    as_indices: bool,
) -> Tensor:
    """What an op is given for this start: indices or centers as `initial` makes them, no indices (B, 0) for "farthest",
    which every op chooses itself."""
    if name == "farthest":
        return farthest_start(x)
    if torch.onnx.is_in_onnx_export() and name not in ("topk", "strided"):
        raise ValueError(f"init={name!r} has no form in ONNX; export with init='farthest', 'topk' or 'strided'")
    start = _without_ops(name, x, num_clusters, weights, mask, counts)
    if start is not None:
        return start
    with torch.no_grad(), no_autocast(x):
        return initial(name, x, num_clusters, weights, mask, counts, generator, as_indices)


def _without_ops(
    name: str, x: Tensor, num_clusters: int, weights: Tensor | None, mask: Tensor | None, counts: Tensor | None
) -> Tensor | None:
    """The indices of `initial` where the extension can make them at once, in a microsecond instead of twenty; else
    None."""
    b, n, _ = x.shape
    if mask is not None or b == 0:
        return None
    if loader.extension is None:
        return None
    if name == "strided" and counts is None and values.plain(x):
        start = x.new_empty(b, num_clusters, dtype=torch.int64)
        loader.extension.fill_strided(start.data_ptr(), b, n, num_clusters)
        return start
    if name == "topk" and weights is not None and weights.dtype == torch.float32 and values.plain(weights):
        if (
            weights.is_contiguous() and b * n <= SORTED_HERE
        ):  # sizes last: where ops are recorded they would become guards
            start = weights.new_empty(b, num_clusters, dtype=torch.int64)
            loader.extension.fill_largest(start.data_ptr(), weights.data_ptr(), b, n, num_clusters)
            return start
    return None


def initial(
    name: str,
    x: Tensor,  # (B, N, D)
    num_clusters: int,
    weights: Tensor | None,  # (B, N) acc
    mask: Tensor | None,  # (B, N) bool
    counts: Tensor | None,  # (B,) int64
    generator: torch.Generator | None,
    as_indices: bool,  # K-Medoids needs tokens; K-Means may also start from means ("bipartite")
) -> Tensor:
    """Token indices (B, K) int64, or for "bipartite" with `as_indices=False` centers (B, K, D) in acc."""
    b, n, _ = x.shape
    if b == 0 or n == 0:
        return torch.zeros(b, num_clusters, dtype=torch.int64, device=x.device)
    if name == "topk":
        return _largest(_significance(x, weights), mask, num_clusters)
    if name == "strided":
        return _strided(x, num_clusters, mask, counts)
    if name == "random":
        return _random(x, num_clusters, weights, mask, generator)
    if name in ("kmeans++", "farthest"):
        return seeds(x, num_clusters, weights, mask, generator, sample=name == "kmeans++")
    labels, targets = match(x, num_clusters, mask, counts)
    return targets if as_indices else pool(x.to(accumulate_dtype(x.dtype)), labels, weights, num_clusters)[0]


def _significance(x: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=accumulate_dtype(x.dtype), device=x.device) if weights is None else weights


def _largest(score: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """Indices of the K largest scores of each image, ties to the lowest index; valid tokens before padding."""
    if mask is not None:
        score = torch.where(mask, score, -torch.inf)
    return falling(score)[:, :k]


def _num_valid(x: Tensor, mask: Tensor | None) -> Tensor:
    b, n, _ = x.shape
    return torch.full((b,), n, device=x.device) if mask is None else mask.sum(1)


def _strided(x: Tensor, k: int, mask: Tensor | None, counts: Tensor | None) -> Tensor:
    """Evenly spaced valid tokens: number floor((j + 1/2) n / K) of n, for j < K."""
    b, tokens, _ = x.shape
    if mask is None and counts is None:
        if values.recorded():
            odd_multiples = (2 * torch.arange(k, device=x.device) + 1) * tokens
        else:  # one launch; its length would be a condition on an unknown number of tokens
            odd_multiples = torch.arange(tokens, 2 * tokens * k, 2 * tokens, device=x.device)
        return odd_multiples.floor_divide(2 * k).expand(b, k)
    n = _num_valid(x, mask)
    k_b = torch.minimum(torch.full_like(n, k) if counts is None else counts, n).clamp(min=1)
    j = torch.arange(k, device=x.device)
    rank = ((2 * j + 1) * n[:, None] // (2 * k_b[:, None])).clamp(max=x.shape[1] - 1)
    if mask is None:
        return rank
    valid_first = falling(mask.to(torch.uint8))
    return valid_first.gather(1, rank)


def _random(
    x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """K distinct tokens, drawn one after another in proportion to their weights; those of zero weight come last."""
    key = torch.rand(x.shape[:2], generator=generator, device=x.device, dtype=torch.float32)
    if weights is not None:  # the one that waits least long is drawn first (exponential waiting times)
        real = weights if mask is None else torch.where(mask, weights, 0)
        rate = (real / real.amax(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)).float()
        wait = (-torch.log1p(-key) / rate).nan_to_num(nan=0.0).clamp(max=1e38)
        key = torch.where(rate > 0, -wait, -2e38)
    return _largest(key, mask, k)


def next_valid(mask: Tensor) -> Tensor:
    """(B, N): the first valid token from each place on, or the last valid one; 0 in an image of padding alone."""
    n = mask.shape[1]
    index = torch.arange(n, device=mask.device).expand_as(mask)
    after = torch.where(mask, index, n).flip(1).cummin(1).values.flip(1)
    last = torch.where(mask, index, 0).amax(1, keepdim=True)
    return torch.where(after < n, after, last)
