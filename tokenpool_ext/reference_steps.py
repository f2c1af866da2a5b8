"""The steps of one iteration in plain PyTorch, for tokenpool_ext.reference (whose notation is used here).

    prepare -> nearest -> repair -> membership -> means, medoids -> representatives, sort_clusters

Tokens are centered and times a power of two, so that no square overflows or vanishes; padding is zero. All is "wide".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import values
from .ops import falling

# Products of tokens and centers are made for this many tokens at a time, so that nothing larger than
# B x CHUNK x K is ever in memory.
TOKEN_CHUNK = 8192
HAVE_FREXP = ("cpu", "cuda")


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


# --------------------------------------------------------------------------------------------------------------
# The problem, prepared: padding zeroed, numbers brought to a safe range


class Problem(NamedTuple):
    tokens: Tensor  # (B, N, D) wide, times a power of two so that max |x| is in [1, 2); padding is 0
    centered: Tensor  # (B, N, D) wide, tokens minus about their mean; distances are taken between these
    mean: Tensor  # (B, 1, D)
    weights: Tensor  # (B, N) wide, times a power of two so that the largest is in [1, 2); padding is 0
    valid: Tensor  # (B, N) bool
    active: Tensor  # (B, K) bool, clusters below the image's effective K
    token_scale: Tensor  # (B,) the power of two
    token_unscale: Tensor  # (B,) its reciprocal
    weight_unscale: Tensor  # (B,)


def exponent_of(x: Tensor) -> Tensor:
    """e with |x| in [2^e, 2^(e+1)). Without torch.frexp from the bits, which torch 2.11 cannot read under vmap."""
    if x.device.type in HAVE_FREXP:
        return torch.frexp(x).exponent - 1
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52) & 0x7FF) - 1023
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, for exponents of normal numbers."""
    if exponent.device.type in HAVE_FREXP:
        return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent)
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def power_of_two_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (scale, 1/scale) that bring `largest` into [1, 2); 1 where it is zero, NaN or infinite."""
    limit = 126 if largest.dtype == torch.float32 else 1022
    ordinary = torch.isfinite(largest) & (largest > 0)
    exponent = torch.where(ordinary, -exponent_of(largest), 0).clamp(-limit, limit)
    return power_of_two(exponent, largest.dtype), power_of_two(-exponent, largest.dtype)


def prepare(x: Tensor, weights: Tensor | None, mask: Tensor | None, counts: Tensor | None, k: int) -> Problem:
    wide = wide_dtype(x)
    b, n, _ = x.shape
    valid = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    num_valid = valid.sum(1)
    k_effective = num_valid if counts is None else torch.minimum(counts, num_valid)
    active = torch.arange(k, device=x.device) < k_effective[:, None]

    w = torch.ones(b, n, dtype=wide, device=x.device) if weights is None else weights.to(wide)
    w = torch.where(valid, w, 0)
    weight_scale, weight_unscale = power_of_two_scale(w.amax(1))
    w = w * weight_scale[:, None]

    tokens = torch.where(valid[:, :, None], x.to(wide), 0)
    finite = valid & tokens.isfinite().all(2)
    counting = finite & (w > 0)  # a token of weight zero moves nothing, and a bad one nobody else
    counting = torch.where(counting.any(1, keepdim=True), counting, finite)[:, :, None]
    token_scale, token_unscale = power_of_two_scale(torch.where(counting, tokens, 0).abs().amax((1, 2)))
    tokens = tokens * token_scale[:, None, None]
    mean = torch.where(counting, tokens, 0).sum(1, keepdim=True) / counting.sum(1, keepdim=True).clamp(min=1)
    mean = coarse(mean, torch.where(counting, tokens - mean, 0))
    centered = torch.where(valid[:, :, None], tokens - mean, 0)
    return Problem(tokens, centered, mean, w, valid, active, token_scale, token_unscale, weight_unscale)


def coarse(mean: Tensor, apart: Tensor) -> Tensor:
    """Rounded to an eighth of the spread or less, so that what was exact (small integers) stays exact."""
    grain = power_of_two_scale(apart.abs().amax((1, 2)))[1][:, None, None] / 8
    return (mean / grain).round() * grain


# --------------------------------------------------------------------------------------------------------------
# The steps of one iteration


def nearest(x: Tensor, centers: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nearest center of every token, lowest index on a tie; and the squared distance to it. (B, N), (B, N).

    The sums of a library's product may differ for equal centers, so the first center within their rounding is compared
    by differences.
    """
    room = 4 * x.shape[2] ** 0.5 * torch.finfo(x.dtype).eps
    center_norm = centers.square().sum(-1)[:, None, :]
    labels, distances = [], []
    # While ops are recorded a length that rests on K would be compiled anew for every K.
    rows = TOKEN_CHUNK if values.recorded() else max(1, TOKEN_CHUNK * 1024 // max(centers.shape[1], 1024))
    for piece in x.split(rows, dim=1):
        score = center_norm - 2 * piece @ centers.transpose(1, 2)  # ||x||^2 does not matter to the argmin
        usable = ~score.isnan() if active is None else active[:, None, :] & ~score.isnan()
        score = torch.where(usable, score, torch.inf)
        label = score.argmin(-1)  # documented to return the first minimum, as argmax the first maximum
        low = score - room * (center_norm + piece.square().sum(-1, keepdim=True))
        first = (low <= score.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1)
        distance, other = ((piece - gather_rows(centers, c)).square().sum(-1) for c in (label, first))
        labels.append(torch.where(other <= distance, first, label))
        distances.append(torch.minimum(other, distance))
    return torch.cat(labels, 1), torch.cat(distances, 1)


def repair(assignment: Tensor, cost: Tensor, p: Problem) -> Tensor:
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
    last = torch.full((cost.shape[0], k), -1, device=cost.device)
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


def sums(rows: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sums (B, K, ...) of the members' rows (B, N, ...); what belongs to no cluster, even NaN, reaches none."""
    b, n = assignment.shape
    slot = torch.where((assignment >= 0) & (assignment < k), assignment, k)
    slot = slot + (k + 1) * torch.arange(b, device=rows.device)[:, None]
    total = rows.new_zeros(b * (k + 1), *rows.shape[2:])  # index_put adds in a fixed order on every device
    total = total.index_put((slot.flatten(),), rows.reshape(b * n, *rows.shape[2:]), accumulate=True)
    return total.view(b, k + 1, *rows.shape[2:])[:, :k]


def membership(assignment: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Summed weights W (B, K) and each token's share of its cluster's mean (B, N): w/W, or 1/count where W = 0."""
    index = assignment.clamp(min=0)
    scale, unscale = (
        power_of_two_scale(weights.amax(1)) if weights.shape[1] else (weights.new_ones(weights.shape[0]),) * 2
    )
    weights = weights * scale[:, None]
    mass, count = sums(weights, assignment, k), sums(torch.ones_like(weights), assignment, k)
    w, n = mass.gather(1, index), count.gather(1, index).clamp(min=1)
    share = torch.where(w > 0, weights / torch.where(w > 0, w, 1), 1 / n)
    return mass * unscale[:, None], torch.where(assignment >= 0, share, 0)


def means(rows: Tensor, assignment: Tensor, share: Tensor, k: int) -> Tensor:
    """Means (B, K, D), as offsets from each cluster's first member that counts: equal members have their own value."""
    b, n, d = rows.shape
    if n == 0:
        return rows.new_zeros(b, k, d)
    counts = (assignment >= 0) & (share != 0)
    index = torch.arange(n, device=rows.device).expand_as(assignment)
    label = torch.where(counts, assignment, k)
    first = torch.full((b, k + 1), n, device=rows.device).scatter_reduce(1, label, index, "amin")
    anchor = torch.where(first[:, :k, None] < n, gather_rows(rows, first[:, :k] % n), 0)
    others = counts & (index != first.gather(1, label))
    offset = torch.where(others[:, :, None], share[:, :, None] * (rows - gather_rows(anchor, assignment)), 0)
    return anchor + sums(offset, assignment, k)


def medoids(assignment: Tensor, mass: Tensor, p: Problem) -> Tensor:
    """Of each cluster, the member of positive weight nearest to the mean, lowest index on a tie; -1 for a cluster with
    no member; the lowest index in one without weight. (B, K)."""
    cost = _to_mean(assignment, mass, p.weights, p)
    cost = torch.where(p.weights > 0, cost, torch.inf)  # what weighs nothing moves nothing
    cost = torch.where(mass.gather(1, assignment.clamp(min=0)) > 0, cost, 0)
    return _least_member(cost, assignment, p)


def _to_mean(assignment: Tensor, mass: Tensor, weights: Tensor, p: Problem) -> Tensor:
    """(B, N): the smaller, the nearer is a token to the mean of its cluster.

    The weighted sum of squared distances to the others, since
    sum_l w_l ||x_l - x_i||^2 = W ||x_i - mean||^2 + const = W ||x_i||^2 - 2 x_i . sum_l w_l x_l + const, and of the
    last no quotient is rounded: exact for small integers. The x are taken from the first member. Two members are at
    sums w_2 d and w_1 d, so the heavier one wins: decided on the weights, for rounding would toss a coin on every tie.
    """
    k, index = p.active.shape[1], assignment.clamp(min=0)
    weighs = weights > 0
    first = _least_member(torch.where(weighs, 0.0, 1.0).to(weights.dtype), assignment, p)
    apart = p.centered - gather_rows(gather_rows(p.centered, first), assignment)
    total = sums(torch.where(weighs[:, :, None], weights[:, :, None] * apart, 0), assignment, k)
    apart_mass = mass.gather(1, index)[:, :, None] * apart
    cost = (apart * (apart_mass - 2 * gather_rows(total, assignment))).sum(-1)
    return torch.where(_count(assignment, p).gather(1, index) == 2, -weights, cost)


def _count(assignment: Tensor, p: Problem) -> Tensor:
    """(B, K) members."""
    return p.active.new_zeros(p.active.shape, dtype=torch.int64).scatter_add(
        1, assignment.clamp(min=0), p.valid.to(torch.int64)
    )


def representatives(error: Tensor, assignment: Tensor, mass: Tensor, p: Problem) -> Tensor:
    """(B, K): of each cluster the member nearest to its mean, at the squared distances `error`, lowest index on a tie;
    the plain mean where all members weigh nothing."""
    index = assignment.clamp(min=0)
    most = torch.zeros_like(p.active, dtype=error.dtype).scatter_reduce(
        1, index, torch.where(p.valid, error.nan_to_num(0.0), 0), "amax"
    )
    weightless = mass <= 0
    weights = torch.where(weightless.gather(1, index), 1, p.weights)
    cost = _to_mean(assignment, torch.where(weightless, _count(assignment, p), mass), weights, p)
    return _least_member(torch.where(most.gather(1, index) > 0, cost, 0), assignment, p)


def _least_member(cost: Tensor, assignment: Tensor, p: Problem) -> Tensor:
    """(B, K): of each cluster the member of the least cost (B, N), lowest index on a tie; -1 where there is none."""
    b, n = assignment.shape
    index = assignment.clamp(min=0)
    cost = torch.where(p.valid & ~cost.isnan(), cost, torch.inf)
    least = torch.full_like(p.active, torch.inf, dtype=cost.dtype).scatter_reduce(1, index, cost, "amin")
    nearest = p.valid & (cost == least.gather(1, index))
    token = torch.where(nearest, torch.arange(n, device=cost.device), n)
    member = torch.full(p.active.shape, n, device=cost.device).scatter_reduce(1, index, token, "amin")
    return torch.where(member < n, member, -1)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, index[b, i]]: (B, N, D), with row 0 where the index is -1."""
    return rows.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, rows.shape[2]))


def nearest_members(x: Tensor, centers: Tensor, assignment: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B, K): of each cluster (B, N) the member nearest to its center (B, K, D), lowest index on a tie; -1 for a
    cluster without members. For those who have an assignment of their own; B x K x N numbers are in memory.

    weights: (B, N), where the centers are the means by these: two members are told apart as in `representatives`."""
    wide = wide_dtype(x)
    distance = (x.detach().to(wide) - gather_rows(centers.detach().to(wide), assignment)).square().sum(-1)
    distance = distance.nan_to_num(torch.finfo(wide).max, torch.finfo(wide).max)
    member = assignment[:, None, :] == torch.arange(centers.shape[1], device=x.device)[:, None]
    cost = torch.where(member, distance[:, None, :], torch.inf)
    if weights is not None:
        differ = torch.where(member, distance[:, None, :], 0).amax(2, keepdim=True) > 0
        pair = differ & (member.sum(2, keepdim=True) == 2)
        cost = torch.where(member & pair, -weights.detach().to(wide)[:, None, :], cost)
    return torch.where(member.any(2), cost.argmin(2), -1)


def sort_clusters(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Relabel so that the smallest member index ascends. Returns (assignment, order): new cluster j is old order[j]."""
    n = assignment.shape[1]
    index = torch.arange(n, device=assignment.device).expand_as(assignment)
    if torch.onnx.is_in_onnx_export():  # no scatter that reduces
        member = assignment[:, :, None] == torch.arange(k, device=assignment.device)
        first = torch.where(member, index[:, :, None], n).amin(1)
    else:
        first = torch.full((assignment.shape[0], k), n, device=assignment.device)
        first = first.scatter_reduce(1, assignment.clamp(min=0), torch.where(assignment >= 0, index, n), "amin")
    order = falling(-first)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(k, device=order.device).expand_as(order))
    return torch.where(assignment >= 0, rank.gather(1, assignment.clamp(min=0)), -1), order
