"""Every operator in plain PyTorch: the definition the kernels are tested against.

Runs on any device and needs neither a compiled extension nor Triton. It is also the fallback where no kernel
runs (Apple GPUs, ROCm without Triton, float64 on CUDA) and a baseline of the benchmark. It never synchronises
with the host, so it can be compiled and captured; the price is that it does not stop early (a converged image
repeats its fixed point, with the same result).

Bit-identity from run to run holds. Batch invariance does not: library matrix products may pick another kernel
for another batch size.

Notation: B images, N tokens, D features, K clusters. "acc" is float32, or float64 for float64 input.
Source of the method: Marin et al., "Token Pooling in Vision Transformers" (arXiv 2110.03860), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import accumulate_dtype

# Products of tokens and centers are made for this many tokens at a time, so that nothing larger than
# B x CHUNK x K is ever in memory.
TOKEN_CHUNK = 8192


# --------------------------------------------------------------------------------------------------------------
# The problem, prepared: padding zeroed, numbers brought to a safe range


class _Problem(NamedTuple):
    tokens: Tensor  # (B, N, D) acc, times a power of two so that max |x| is in [1, 2); padding is 0
    centered: Tensor  # (B, N, D) acc, tokens minus their mean; distances are taken between these
    mean: Tensor  # (B, 1, D)
    weights: Tensor  # (B, N) acc, times a power of two so that the largest is in [1, 2); padding is 0
    valid: Tensor  # (B, N) bool
    active: Tensor  # (B, K) bool, clusters below the image's effective K
    token_scale: Tensor  # (B,) the power of two
    token_unscale: Tensor  # (B,) its reciprocal
    weight_unscale: Tensor  # (B,)


def _exponent(x: Tensor) -> Tensor:
    """e with |x| in [2^e, 2^(e+1)), from the bits of x (any device; not torch.frexp, which some lack)."""
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52) & 0x7FF) - 1023
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, for exponents of normal numbers."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def power_of_two_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (scale, 1/scale) that bring `largest` into [1, 2); 1 where it is zero, NaN or infinite."""
    limit = 126 if largest.dtype == torch.float32 else 1022
    ordinary = torch.isfinite(largest) & (largest > 0)
    exponent = torch.where(ordinary, -_exponent(largest), 0).clamp(-limit, limit)
    return _power_of_two(exponent, largest.dtype), _power_of_two(-exponent, largest.dtype)


def _prepare(x: Tensor, weights: Tensor | None, mask: Tensor | None, counts: Tensor | None, k: int) -> _Problem:
    acc = accumulate_dtype(x.dtype)
    b, n, _ = x.shape
    valid = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    num_valid = valid.sum(1)
    k_effective = num_valid if counts is None else torch.minimum(counts, num_valid)
    active = torch.arange(k, device=x.device) < k_effective[:, None]

    tokens = torch.where(valid[:, :, None], x.to(acc), 0)
    token_scale, token_unscale = power_of_two_scale(tokens.abs().amax((1, 2)))
    tokens = tokens * token_scale[:, None, None]
    mean = tokens.sum(1, keepdim=True) / num_valid.clamp(min=1)[:, None, None]
    centered = torch.where(valid[:, :, None], tokens - mean, 0)

    w = torch.ones(b, n, dtype=acc, device=x.device) if weights is None else weights.to(acc)
    w = torch.where(valid, w, 0)
    weight_scale, weight_unscale = power_of_two_scale(w.amax(1))
    w = w * weight_scale[:, None]
    return _Problem(tokens, centered, mean, w, valid, active, token_scale, token_unscale, weight_unscale)


# --------------------------------------------------------------------------------------------------------------
# The steps of one iteration


def _assign(centered: Tensor, centers: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest center of every token, lowest index on a tie; and the squared distance to it. (B, N), (B, N)."""
    center_norm = centers.square().sum(-1)[:, None, :]
    labels, distances = [], []
    for piece in centered.split(TOKEN_CHUNK, dim=1):
        score = center_norm - 2 * piece @ centers.transpose(1, 2)  # ||x||^2 does not matter to the argmin
        score = torch.where(active[:, None, :] & ~score.isnan(), score, torch.inf)
        label = score.argmin(-1)  # documented to return the first minimum
        best = score.gather(-1, label[:, :, None]).squeeze(-1)
        labels.append(label)
        distances.append((best + piece.square().sum(-1)).clamp(min=0))
    return torch.cat(labels, 1), torch.cat(distances, 1)


def _repair(assignment: Tensor, cost: Tensor, p: _Problem) -> Tensor:
    """Give every empty active cluster one token (contract: the costliest token whose cluster can spare one).

    Taken one empty cluster at a time, the donors are: all valid tokens by falling cost, without the last of each
    cluster (which its cluster must keep). So the m-th donor goes to the m-th empty cluster, and no loop is needed.
    """
    k = p.active.shape[1]
    n = assignment.shape[1]
    cost = torch.where(p.valid, cost.nan_to_num(0.0), -1)
    order = cost.argsort(dim=1, descending=True, stable=True)
    label = assignment.gather(1, order)
    position = torch.arange(n, device=cost.device).expand_as(order)
    is_valid = p.valid.gather(1, order)
    last = torch.full((len(cost), k), -1, device=cost.device)
    last = last.scatter_reduce(1, label, torch.where(is_valid, position, -1), "amax")
    donor = is_valid & (position != last.gather(1, label))
    donor_rank = donor.cumsum(1) - 1

    empty = p.active & (last < 0)
    empty_clusters = empty.to(torch.uint8).argsort(
        dim=1, descending=True, stable=True
    )  # the empty ones first, ascending
    moves = donor & (donor_rank < empty.sum(1, keepdim=True))
    target = empty_clusters.gather(1, donor_rank.clamp(0, k - 1))
    return torch.empty_like(assignment).scatter(1, order, torch.where(moves, target, label))


def _membership(assignment: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Summed weights W (B, K) and each token's share of its cluster's mean (B, N): w/W, or 1/count where W = 0."""
    index = assignment.clamp(min=0)
    inside = assignment >= 0
    one_hot = _one_hot(assignment, k, weights.dtype)
    scale, unscale = power_of_two_scale(weights.amax(1)) if weights.shape[1] else (weights.new_ones(len(weights)),) * 2
    weights = weights * scale[:, None]
    mass = (one_hot * weights[:, :, None]).sum(1)
    count = one_hot.sum(1)
    w, n = mass.gather(1, index), count.gather(1, index).clamp(min=1)
    share = torch.where(w > 0, weights / torch.where(w > 0, w, 1), 1 / n)
    mass = (mass * unscale[:, None]).clamp(max=torch.finfo(mass.dtype).max)
    return mass, torch.where(inside, share, 0)


def _one_hot(assignment: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """(B, N, K): 1 where token i belongs to cluster j."""
    return (assignment[:, :, None] == torch.arange(k, device=assignment.device)).to(dtype)


def _cluster_sums(values: Tensor, assignment: Tensor, coefficient: Tensor, k: int) -> Tensor:
    """sum over the members i of each cluster of coefficient_i * values_i: (B, K, D)."""
    b, _, d = values.shape
    total = values.new_zeros(b, k, d)
    for v, a, c in zip(
        values.split(TOKEN_CHUNK, 1), assignment.split(TOKEN_CHUNK, 1), coefficient.split(TOKEN_CHUNK, 1)
    ):
        total = total + (_one_hot(a, k, v.dtype) * c[:, :, None]).transpose(1, 2) @ v
    return total


def _medoids(assignment: Tensor, centers: Tensor, mass: Tensor, p: _Problem) -> Tensor:
    """Of each cluster, the member nearest to the mean, lowest index on a tie; -1 for a cluster with no member. (B, K).

    This is the member with the least weighted sum of squared distances to the others, since
    sum_l w_l ||x_l - x_i||^2 = W ||x_i - mean||^2 + const. With W = 0 all sums are 0: the lowest index. Two members are
    at sums w_2 d and w_1 d, so the heavier one wins: decided on the weights, for rounding would toss a coin on every
    tie.
    """
    n = assignment.shape[1]
    k = p.active.shape[1]
    distance = (p.centered - _gather_rows(centers, assignment)).square().sum(-1)
    distance = torch.where(distance.isnan(), torch.inf, distance)
    index = assignment.clamp(min=0)
    count = torch.zeros_like(mass).scatter_add(1, index, p.valid.to(mass.dtype))
    distance = torch.where(count.gather(1, index) == 2, -p.weights, distance)
    distance = torch.where(mass.gather(1, index) > 0, distance, 0)
    least = torch.full_like(mass, torch.inf).scatter_reduce(1, index, torch.where(p.valid, distance, torch.inf), "amin")
    nearest = p.valid & (distance == least.gather(1, index))
    token = torch.where(nearest, torch.arange(n, device=assignment.device), n)
    medoids = torch.full((len(mass), k), n, device=assignment.device)
    medoids = medoids.scatter_reduce(1, index, token, "amin")
    return torch.where(medoids < n, medoids, -1)


def _gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, index[b, i]]: (B, N, D), with row 0 where the index is -1."""
    return rows.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, rows.shape[2]))


def _sort_clusters(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Relabel so that the smallest member index ascends. Returns (assignment, order): new cluster j is old order[j]."""
    n = assignment.shape[1]
    index = torch.arange(n, device=assignment.device).expand_as(assignment)
    first = torch.full((len(assignment), k), n, device=assignment.device)
    first = first.scatter_reduce(1, assignment.clamp(min=0), torch.where(assignment >= 0, index, n), "amin")
    order = first.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(k, device=order.device).expand_as(order))
    return torch.where(assignment >= 0, rank.gather(1, assignment.clamp(min=0)), -1), order


def spread(
    x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None, generator: torch.Generator | None, sample: bool
) -> Tensor:
    """K tokens one by one. k-means++: drawn with probability w_i * (squared distance to the nearest chosen so far), the
    first by weight. Farthest: the token where that product is largest, the first the heaviest. Zero weights last."""
    b, n, d = x.shape
    acc = accumulate_dtype(x.dtype)
    valid = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    tokens = torch.where(valid[:, :, None], x.to(acc), 0)
    tokens = tokens * power_of_two_scale(tokens.abs().amax((1, 2)))[0][:, None, None] if d else tokens
    w = valid.to(acc) if weights is None else torch.where(valid, weights, 0)
    w = w * power_of_two_scale(w.amax(1))[0][:, None]
    draws = torch.rand(k, b, 1, generator=generator, device=x.device, dtype=acc) if sample else None

    # Preference among tokens that cost nothing (duplicates of a chosen one, zero weight): weighted before unweighted
    # before chosen before padding, then the lowest index.
    rank = torch.where(valid, torch.where(w > 0, 3, 2), 0)
    distance = torch.ones(b, n, dtype=acc, device=x.device)
    chosen = []
    for step in range(k):
        gain = (w * distance).nan_to_num(0.0)
        fallback = rank.argmax(1, keepdim=True)
        if sample:
            cumulative = gain.cumsum(1)
            total = cumulative[:, -1:]
            pick = torch.searchsorted(cumulative, draws[step] * total, right=True).clamp(max=n - 1)
            usable = gain.gather(1, pick) > 0
            pick = torch.where(usable, pick, gain.argmax(1, keepdim=True))
        else:
            pick = gain.argmax(1, keepdim=True)
        pick = torch.where(gain.gather(1, pick) > 0, pick, fallback)
        chosen.append(pick)
        rank = rank.scatter(1, pick, torch.where(rank.gather(1, pick) > 0, 1, 0))
        new = (tokens - tokens.gather(1, pick[:, :, None].expand(-1, -1, d))).square().sum(-1)
        distance = new if step == 0 else torch.minimum(distance, new)
        distance = distance.scatter(1, pick, 0)
    return torch.cat(chosen, 1)


# --------------------------------------------------------------------------------------------------------------
# The operators


def kmeans(
    x: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    counts: Tensor | None,
    init: Tensor,
    num_clusters: int,
    num_iters: int,
    sort: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted Lloyd iterations (paper section 3.2). Returns (centers, assignment, mass, inertia); see
    functional.kmeans."""
    centers, assignment, mass, _, inertia = _cluster(
        x, weights, mask, counts, init, num_clusters, num_iters, sort, False
    )
    return centers, assignment, mass, inertia


def kmedoids(
    x: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    counts: Tensor | None,
    init: Tensor,
    num_clusters: int,
    num_iters: int,
    sort: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Alternating K-Medoids (paper section 3.3). Returns (centers, assignment, mass, medoids, inertia)."""
    return _cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, True)


def _cluster(x, weights, mask, counts, init, k, num_iters, sort, with_medoids):
    b, n, d = x.shape
    acc = accumulate_dtype(x.dtype)
    if b == 0 or n == 0:
        empty = x.new_zeros(b, k, dtype=acc)
        none = torch.full((b, k), -1, device=x.device)
        return x.new_zeros(b, k, d), none.new_zeros(b, n), empty, none, empty.sum(1)
    if d == 0:  # tokens without features are all equal: one zero column says the same
        x = x.new_zeros(b, n, 1)
        init = init if init.dtype == torch.int64 else init.new_zeros(b, k, 1)
    if init.dtype == torch.int64 and init.shape[1] == 0:  # no indices: the farthest-first start
        init = spread(x, k, weights, mask, None, sample=False)
    p = _prepare(x, weights, mask, counts, k)

    if init.dtype == torch.int64:
        medoids = init.clamp(0, n - 1)
        centers = _gather_rows(p.centered, medoids)
    else:
        medoids = None
        centers = init.to(acc) * p.token_scale[:, None, None] - p.mean
    cluster = torch.arange(k, device=x.device).expand(b, k)

    for _ in range(num_iters):
        assignment, distance = _assign(p.centered, centers, p.active)
        if with_medoids:  # a medoid belongs to its own cluster
            owner = torch.full((b, n), k, device=x.device)
            owner = owner.scatter_reduce(1, medoids.clamp(min=0), torch.where(p.active, cluster, k), "amin")
            distance = torch.where(owner < k, 0, distance)
            assignment = torch.where(owner < k, owner, assignment)
        assignment = _repair(assignment, p.weights * distance, p)
        assignment = torch.where(p.valid, assignment, -1)
        mass, share = _membership(assignment, p.weights, k)
        centers = _cluster_sums(p.centered, assignment, share, k)
        if with_medoids:
            medoids = _medoids(assignment, centers, mass, p)
            centers = _gather_rows(p.centered, medoids)

    if sort:
        assignment, order = _sort_clusters(assignment, k)
        mass, share = _membership(assignment, p.weights, k)
        medoids = medoids.gather(1, order) if with_medoids else None
    active = (assignment[:, :, None] == cluster[:, None, :]).any(1)
    if with_medoids:
        rows = torch.where(active[:, :, None], _gather_rows(p.tokens, medoids), 0)
        centers = torch.where(active[:, :, None], _gather_rows(x, medoids), 0)
    else:
        rows = _cluster_sums(p.tokens, assignment, share, k)  # of the tokens themselves: a lone member is its own mean
        centers = (rows * p.token_unscale[:, None, None]).to(x.dtype)
        medoids = torch.full((b, k), -1, device=x.device)
    error = (p.tokens - _gather_rows(rows, assignment)).square().sum(-1)
    inertia = (p.weights * torch.where(p.valid, error, 0)).sum(1)
    largest = torch.finfo(acc).max
    exponent = 2 * _exponent(p.token_unscale) + _exponent(p.weight_unscale)
    limit = 100 if acc == torch.float32 else 800
    for _ in range(4):  # in steps of one sign, so that nothing between overflows or vanishes
        step = exponent.clamp(-limit, limit)
        inertia, exponent = inertia * _power_of_two(step, acc), exponent - step
    inertia = inertia.clamp(max=largest)
    mass = (mass * p.weight_unscale[:, None]).clamp(max=largest)
    return centers[:, :, :d], assignment, mass, medoids, inertia


def pool(x: Tensor, assignment: Tensor, weights: Tensor | None, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Weighted mean of the tokens of each cluster. Returns (centers (B, K, D) in x.dtype, mass (B, K))."""
    acc = accumulate_dtype(x.dtype)
    inside = (assignment >= 0) & (assignment < num_clusters)
    assignment = torch.where(inside, assignment, -1)
    w = torch.ones_like(assignment, dtype=acc) if weights is None else weights.to(acc)
    w = torch.where(inside, w, 0)
    tokens = torch.where(inside[:, :, None], x.to(acc), 0)
    mass, share = _membership(assignment, w, num_clusters)
    return _cluster_sums(tokens, assignment, share, num_clusters).to(x.dtype), mass


def pool_backward(
    grad_centers: Tensor, x: Tensor, centers: Tensor, assignment: Tensor, weights: Tensor | None, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the weighted mean: (grad_x (B, N, D) in x.dtype, grad_weights (B, N) in acc; zeros without
    weights)."""
    acc = accumulate_dtype(x.dtype)
    k = centers.shape[1]
    inside = (assignment >= 0) & (assignment < k)
    index = torch.where(inside, assignment, 0)
    w = torch.ones_like(assignment, dtype=acc) if weights is None else weights.to(acc)
    count = _one_hot(torch.where(inside, assignment, -1), k, acc).sum(1)
    w_cluster = mass.to(acc).gather(1, index)
    weighted = w_cluster > 0
    safe = torch.where(weighted, w_cluster, 1)
    share = torch.where(weighted, w / safe, 1 / count.gather(1, index).clamp(min=1))
    grad = _gather_rows(grad_centers.to(acc), index)
    grad_x = torch.where(inside[:, :, None], share[:, :, None] * grad, 0).to(x.dtype)
    if weights is None:
        return grad_x, torch.zeros_like(w)
    inner = ((x.to(acc) - _gather_rows(centers.to(acc), index)) * grad).sum(-1)
    return grad_x, torch.where(inside & weighted, inner / safe, 0)


def unpool(centers: Tensor, assignment: Tensor) -> Tensor:
    """Every token's center: (B, N, D); zeros where the assignment is -1."""
    inside = (assignment >= 0) & (assignment < centers.shape[1])
    rows = _gather_rows(centers, torch.where(inside, assignment, 0))
    return torch.where(inside[:, :, None], rows, 0)


def unpool_backward(grad: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Sum of the incoming gradients of each cluster's tokens: (B, K, D) in grad.dtype."""
    acc = accumulate_dtype(grad.dtype)
    inside = (assignment >= 0) & (assignment < num_clusters)
    total = _cluster_sums(
        torch.where(inside[:, :, None], grad.to(acc), 0),
        torch.where(inside, assignment, -1),
        inside.to(acc),
        num_clusters,
    )
    return total.to(grad.dtype)


def attention_received(q: Tensor, k: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """Mean over heads and queries of softmax(scale * q k^T): (B, N) in acc. One head at a time."""
    acc = accumulate_dtype(q.dtype)
    b, heads, num_queries, _ = q.shape
    total = torch.zeros(b, k.shape[2], dtype=acc, device=q.device)
    for head in range(heads):
        logits = (q[:, head].to(acc) * scale) @ k[:, head].to(acc).transpose(1, 2)
        normaliser = torch.logsumexp(logits, -1) if lse is None else lse[:, head].to(acc)
        total = total + (logits - normaliser[:, :, None]).exp().sum(1)
    return total / max(heads * num_queries, 1)
