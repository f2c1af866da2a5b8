"""ToMe's one-shot bipartite matching, which `init="bipartite"` and the layer `BipartiteMatching` share.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3. The tokens of an image are
dealt alternately into sets A (positions 0, 2, 4, ...) and B (1, 3, 5, ...), as in its authors' code; every A token
points to its most similar B token (cosine), and the N - K strongest pairs are merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import accumulate_dtype, falling
from .reference_steps import power_of_two_scale


def match(
    metric: Tensor, num_clusters: int, mask: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One round, which can merge at most half of the tokens: N - N // 2 <= num_clusters <= N.

    Args:
        metric: (B, N, E); similarity is taken between these. Ties go to the lower position.
        num_clusters: K.
        mask: (B, N) bool, True = real token; positions count real tokens alone.
        counts: (B,) int64 per-image K, at most `num_clusters`.

    Returns:
        labels (B, N) int64 in 0..K-1, -1 for padding; targets (B, K) int64: the token that others were merged into.
        Clusters are in the order of their targets.
    """
    b, n, width = metric.shape
    k = num_clusters
    tokens, order = metric.to(accumulate_dtype(metric.dtype)), None
    num_valid: int | Tensor = n
    if mask is not None:
        order = falling(mask.to(torch.uint8))  # real tokens first
        num_valid = mask.sum(1, keepdim=True)
        tokens = torch.where(mask[:, :, None], tokens, 0).gather(1, order[:, :, None].expand(-1, -1, width))
    index = torch.arange(n, device=metric.device).expand(b, n)
    if n == 1:
        return index - (0 if mask is None else (~mask).long()), index
    if width and not torch.onnx.is_in_onnx_export():  # which has no bits of numbers
        tokens = tokens * power_of_two_scale(tokens.abs().amax((1, 2)))[0][:, None, None]
    direction = torch.nn.functional.normalize(tokens, dim=2, eps=torch.finfo(tokens.dtype).tiny)
    similarity = direction[:, 0::2] @ direction[:, 1::2].transpose(1, 2)
    hopeless = similarity.isnan()
    if mask is not None:
        hopeless |= ~((index[:, 0::2] < num_valid)[:, :, None] & (index[:, 1::2] < num_valid)[:, None, :])
    best, partner = similarity.masked_fill(hopeless, -torch.inf).max(2)

    merges: int | Tensor = n - k
    if mask is not None or counts is not None:
        real = index.new_full((b, 1), n) if mask is None else mask.sum(1, keepdim=True)
        merges = torch.minimum((real - (k if counts is None else counts[:, None])).clamp(min=0), real // 2)
    by_similarity = falling(best)
    merged = torch.empty_like(partner).scatter(1, by_similarity, index[:, : best.shape[1]]) < merges
    target = index.scatter(1, index[:, 0::2], torch.where(merged, 2 * partner + 1, index[:, 0::2]))
    is_target = (index < num_valid).scatter(1, index[:, 0::2], ~merged & (index[:, 0::2] < num_valid))
    labels = (is_target.cumsum(1) - 1).gather(1, target)
    targets = falling(is_target.to(torch.uint8))[:, :k]
    if mask is not None and order is not None:
        labels, targets = torch.empty_like(labels).scatter(1, order, labels), order.gather(1, targets)
        labels = torch.where(mask, labels, -1)
    return torch.where(labels < k, labels, -1), targets
