"""One-shot bipartite soft matching and merging (ToMe, arXiv 2210.09461, section 3): the price to beat.

Own implementation of the published algorithm: tokens alternate between sets A and B, each token of A proposes its
most similar token of B (cosine), the r = N - K best proposals are merged by averages weighted with sizes.
It removes at most half of the tokens, so K >= N/2.
"""

from __future__ import annotations

import torch

NAME = "bipartite matching"
PACKAGE = "torch"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "other"
NATIVE_DTYPE = True
NOTE = "ToMe's one-shot matching + size-weighted merge, batched PyTorch; not clustering: a higher loss"


def unavailable(problem):
    if 2 * problem.K < problem.N:
        return "one matching removes at most half of the tokens: needs K >= N/2"
    if problem.B * problem.N * problem.N > 1 << 30:
        return "N/2 x N/2 scores of the batch need more than 1 GiB"
    return None


def match(x, r):
    """(unmerged A (B, n_a - r), merged A (B, r), their targets in B (B, r)), indices into A and B."""
    unit = x / x.norm(dim=-1, keepdim=True)
    scores = torch.bmm(unit[:, ::2], unit[:, 1::2].transpose(1, 2))
    best, target = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)
    merged, unmerged = order[:, :r], order[:, r:]
    return unmerged, merged, target.gather(1, merged)


def merge(x, size, unmerged, merged, target):
    """Size-weighted means (B, K, D) and sizes (B, K, 1); unmerged A first, then B."""
    weighted = torch.cat([x * size, size], -1)
    a, b = weighted[:, ::2], weighted[:, 1::2]
    width = weighted.shape[-1]
    kept = a.gather(1, unmerged[..., None].expand(-1, -1, width))
    moved = a.gather(1, merged[..., None].expand(-1, -1, width))
    b = b.scatter_add(1, target[..., None].expand(-1, -1, width), moved)
    both = torch.cat([kept, b], 1)
    return both[..., :-1] / both[..., -1:], both[..., -1:]


def setup(data):
    p, x = data.problem, data.x
    size = torch.ones(*x.shape[:2], 1, dtype=x.dtype, device=x.device)
    return lambda: merge(x, size, *match(x, p.N - p.K))


def centers(result, data):
    return result[0]
