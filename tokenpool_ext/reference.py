"""Every operator in plain PyTorch: the definition the kernels are tested against.

Runs on any device and needs neither a compiled extension nor Triton. It is also the fallback where no kernel
runs (Apple GPUs, ROCm without Triton, float64 on CUDA) and a baseline of the benchmark. It never synchronises
with the host of a GPU, so it can be compiled and captured; there it does not stop early (a settled image repeats its
result).

Everything between input and output is float64 where the device has it, so sums, distances and ties are right to the
last bit of the tokens' own dtype. Bit-identity from run to run holds. Batch invariance does not: library matrix
products may pick another kernel for another batch size.

Notation: B images, N tokens, D features, K clusters. "acc" is the dtype of statistics handed back: float32, or float64
for float64 input; "wide" the one computed in.
Source of the method: Marin et al., "Token Pooling in Vision Transformers" (arXiv 2110.03860), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import values
from .ops import accumulate_dtype, falling, is_farthest

# Products of tokens and centers are made for this many tokens at a time, so that nothing larger than
# B x CHUNK x K is ever in memory.
TOKEN_CHUNK = 8192
HAVE_FREXP = ("cpu", "cuda")
PATIENCE = 100  # iterations after which labels that change must pay


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


# --------------------------------------------------------------------------------------------------------------
# The problem, prepared: padding zeroed, numbers brought to a safe range


class _Problem(NamedTuple):
    tokens: Tensor  # (B, N, D) wide, times a power of two so that max |x| is in [1, 2); padding is 0
    centered: Tensor  # (B, N, D) wide, tokens minus about their mean; distances are taken between these
    mean: Tensor  # (B, 1, D)
    weights: Tensor  # (B, N) wide, times a power of two so that the largest is in [1, 2); padding is 0
    valid: Tensor  # (B, N) bool
    active: Tensor  # (B, K) bool, clusters below the image's effective K
    token_scale: Tensor  # (B,) the power of two
    token_unscale: Tensor  # (B,) its reciprocal
    weight_unscale: Tensor  # (B,)


def _exponent(x: Tensor) -> Tensor:
    """e with |x| in [2^e, 2^(e+1)). Without torch.frexp from the bits, which torch 2.11 cannot read under vmap."""
    if x.device.type in HAVE_FREXP:
        return torch.frexp(x).exponent - 1
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52) & 0x7FF) - 1023
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
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
    exponent = torch.where(ordinary, -_exponent(largest), 0).clamp(-limit, limit)
    return _power_of_two(exponent, largest.dtype), _power_of_two(-exponent, largest.dtype)


def _prepare(x: Tensor, weights: Tensor | None, mask: Tensor | None, counts: Tensor | None, k: int) -> _Problem:
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
    mean = _coarse(mean, torch.where(counting, tokens - mean, 0))
    centered = torch.where(valid[:, :, None], tokens - mean, 0)
    return _Problem(tokens, centered, mean, w, valid, active, token_scale, token_unscale, weight_unscale)


def _coarse(mean: Tensor, apart: Tensor) -> Tensor:
    """Rounded to an eighth of the spread or less, so that what was exact (small integers) stays exact."""
    grain = power_of_two_scale(apart.abs().amax((1, 2)))[1][:, None, None] / 8
    return (mean / grain).round() * grain


# --------------------------------------------------------------------------------------------------------------
# The steps of one iteration


def nearest(x: Tensor, centers: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nearest center of every token, lowest index on a tie; and the squared distance to it. (B, N), (B, N)."""
    center_norm = centers.square().sum(-1)[:, None, :]
    labels, distances = [], []
    # While ops are recorded a length that rests on K would be compiled anew for every K.
    rows = TOKEN_CHUNK if values.recorded() else max(1, TOKEN_CHUNK * 1024 // max(centers.shape[1], 1024))
    for piece in x.split(rows, dim=1):
        score = center_norm - 2 * piece @ centers.transpose(1, 2)  # ||x||^2 does not matter to the argmin
        usable = ~score.isnan() if active is None else active[:, None, :] & ~score.isnan()
        label = torch.where(usable, score, torch.inf).argmin(-1)  # documented to return the first minimum
        labels.append(label)
        distances.append((piece - _gather_rows(centers, label)).square().sum(-1))
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


def _sums(rows: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sums (B, K, ...) of the members' rows (B, N, ...); what belongs to no cluster, even NaN, reaches none."""
    b, n = assignment.shape
    slot = torch.where((assignment >= 0) & (assignment < k), assignment, k)
    slot = slot + (k + 1) * torch.arange(b, device=rows.device)[:, None]
    total = rows.new_zeros(b * (k + 1), *rows.shape[2:])  # index_put adds in a fixed order on every device
    total = total.index_put((slot.flatten(),), rows.reshape(b * n, *rows.shape[2:]), accumulate=True)
    return total.view(b, k + 1, *rows.shape[2:])[:, :k]


def _membership(assignment: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Summed weights W (B, K) and each token's share of its cluster's mean (B, N): w/W, or 1/count where W = 0."""
    index = assignment.clamp(min=0)
    scale, unscale = power_of_two_scale(weights.amax(1)) if weights.shape[1] else (weights.new_ones(len(weights)),) * 2
    weights = weights * scale[:, None]
    mass, count = _sums(weights, assignment, k), _sums(torch.ones_like(weights), assignment, k)
    w, n = mass.gather(1, index), count.gather(1, index).clamp(min=1)
    share = torch.where(w > 0, weights / torch.where(w > 0, w, 1), 1 / n)
    return mass * unscale[:, None], torch.where(assignment >= 0, share, 0)


def _means(rows: Tensor, assignment: Tensor, share: Tensor, k: int) -> Tensor:
    """Means (B, K, D), as offsets from each cluster's first member that counts: equal members have their own value."""
    b, n, d = rows.shape
    if n == 0:
        return rows.new_zeros(b, k, d)
    counts = (assignment >= 0) & (share != 0)
    index = torch.arange(n, device=rows.device).expand_as(assignment)
    label = torch.where(counts, assignment, k)
    first = torch.full((b, k + 1), n, device=rows.device).scatter_reduce(1, label, index, "amin")
    anchor = torch.where(first[:, :k, None] < n, _gather_rows(rows, first[:, :k] % n), 0)
    others = counts & (index != first.gather(1, label))
    offset = torch.where(others[:, :, None], share[:, :, None] * (rows - _gather_rows(anchor, assignment)), 0)
    return anchor + _sums(offset, assignment, k)


def _medoids(assignment: Tensor, centers: Tensor, mass: Tensor, p: _Problem) -> Tensor:
    """Of each cluster, the member nearest to the mean, lowest index on a tie; -1 for a cluster with no member. (B, K).

    This is the member with the least weighted sum of squared distances to the others, since
    sum_l w_l ||x_l - x_i||^2 = W ||x_i - mean||^2 + const. With W = 0 all sums are 0: the lowest index. Two members are
    at sums w_2 d and w_1 d, so the heavier one wins: decided on the weights, for rounding would toss a coin on every
    tie.
    """
    distance = (p.centered - _gather_rows(centers, assignment)).square().sum(-1)
    index = assignment.clamp(min=0)
    distance = torch.where(_count(assignment, p).gather(1, index) == 2, -p.weights, distance)
    distance = torch.where(mass.gather(1, index) > 0, distance, 0)
    return _least_member(distance, assignment, p)


def _count(assignment: Tensor, p: _Problem) -> Tensor:
    """(B, K) members."""
    return p.active.new_zeros(p.active.shape, dtype=torch.int64).scatter_add(
        1, assignment.clamp(min=0), p.valid.to(torch.int64)
    )


def _representatives(error: Tensor, assignment: Tensor, p: _Problem) -> Tensor:
    """(B, K): of each cluster the member nearest to its mean, at the squared distances `error`, lowest index on a tie.

    Two members that differ are as far apart from their mean as the other one is heavy: decided on the weights, for
    rounding would break every tie.
    """
    index = assignment.clamp(min=0)
    most = torch.zeros_like(p.active, dtype=error.dtype).scatter_reduce(
        1, index, torch.where(p.valid, error.nan_to_num(0.0), 0), "amax"
    )
    pair = (_count(assignment, p) == 2) & (most > 0)
    return _least_member(torch.where(pair.gather(1, index), -p.weights, error), assignment, p)


def _least_member(cost: Tensor, assignment: Tensor, p: _Problem) -> Tensor:
    """(B, K): of each cluster the member of the least cost (B, N), lowest index on a tie; -1 where there is none."""
    b, n = assignment.shape
    index = assignment.clamp(min=0)
    cost = torch.where(p.valid & ~cost.isnan(), cost, torch.inf)
    least = torch.full_like(p.active, torch.inf, dtype=cost.dtype).scatter_reduce(1, index, cost, "amin")
    nearest = p.valid & (cost == least.gather(1, index))
    token = torch.where(nearest, torch.arange(n, device=cost.device), n)
    member = torch.full(p.active.shape, n, device=cost.device).scatter_reduce(1, index, token, "amin")
    return torch.where(member < n, member, -1)


def _gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, index[b, i]]: (B, N, D), with row 0 where the index is -1."""
    return rows.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, rows.shape[2]))


def nearest_members(x: Tensor, centers: Tensor, assignment: Tensor) -> Tensor:
    """(B, K): of each cluster (B, N) the member nearest to its center (B, K, D), lowest index on a tie; -1 for a
    cluster without members. For those who have an assignment of their own; B x K x N numbers are in memory."""
    wide = wide_dtype(x)
    distance = (x.detach().to(wide) - _gather_rows(centers.detach().to(wide), assignment)).square().sum(-1)
    distance = distance.nan_to_num(torch.finfo(wide).max, torch.finfo(wide).max)
    member = assignment[:, None, :] == torch.arange(centers.shape[1], device=x.device)[:, None]
    return torch.where(member.any(2), torch.where(member, distance[:, None, :], torch.inf).argmin(2), -1)


def sort_clusters(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Relabel so that the smallest member index ascends. Returns (assignment, order): new cluster j is old order[j]."""
    n = assignment.shape[1]
    index = torch.arange(n, device=assignment.device).expand_as(assignment)
    if torch.onnx.is_in_onnx_export():  # no scatter that reduces
        member = assignment[:, :, None] == torch.arange(k, device=assignment.device)
        first = torch.where(member, index[:, :, None], n).amin(1)
    else:
        first = torch.full((len(assignment), k), n, device=assignment.device)
        first = first.scatter_reduce(1, assignment.clamp(min=0), torch.where(assignment >= 0, index, n), "amin")
    order = falling(-first)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(k, device=order.device).expand_as(order))
    return torch.where(assignment >= 0, rank.gather(1, assignment.clamp(min=0)), -1), order


def spread(
    x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None, generator: torch.Generator | None, sample: bool
) -> Tensor:
    """K tokens one by one, the first by weight, then by w_i * (squared distance to the nearest chosen so far).

    k-means++ draws with that probability, farthest-first takes the largest (lowest index on a tie). Tokens of zero
    weight come after all others, padding after those.
    """
    b, n, d = x.shape
    wide = wide_dtype(x)
    valid = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    tokens = torch.where(valid[:, :, None], x.to(wide), 0)
    tokens = tokens * power_of_two_scale(tokens.abs().amax((1, 2)))[0][:, None, None] if d else tokens
    w = valid.to(wide) if weights is None else torch.where(valid, weights.to(wide), 0)
    w = w * power_of_two_scale(w.amax(1))[0][:, None]
    draws = torch.rand(k, b, 1, generator=generator, device=x.device, dtype=wide) if sample else None

    unusable = torch.where(valid, torch.where(w > 0, 0.0, -1.0), -2.0).to(wide)  # below every gain
    distance = torch.ones(b, n, dtype=wide, device=x.device)
    chosen = []
    for step in range(k):
        gain = torch.where(unusable < 0, unusable, (w * distance).nan_to_num(0.0))
        pick = gain.argmax(1, keepdim=True)
        if draws is not None:
            cumulative = gain.clamp(min=0).cumsum(1)
            drawn = torch.searchsorted(cumulative, draws[step] * cumulative[:, -1:], right=True).clamp(max=n - 1)
            pick = torch.where(gain.gather(1, drawn) > 0, drawn, pick)
        chosen.append(pick)
        unusable = unusable.scatter(1, pick, -2.0)
        new = (tokens - tokens.gather(1, pick[:, :, None].expand(-1, -1, d))).square().sum(-1)
        distance = new if step == 0 else torch.minimum(distance, new)
    return torch.cat(chosen, 1)


def spread_farthest(x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """The farthest-first start: (B, K) token indices."""
    return spread(x, k, weights, mask, None, sample=False)


@torch.library.custom_op(
    "tokenpool_ext_reference::farthest",
    mutates_args=(),
    schema="(Tensor x, SymInt k, Tensor? weights, Tensor? mask) -> Tensor",
)
def farthest_recorded(x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """The farthest-first start as one op where ops are recorded: unrolled, it would be compiled anew for every K."""
    return spread_farthest(x, k, weights, mask)


@farthest_recorded.register_fake
def _(x, k, weights, mask):
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted Lloyd iterations (paper section 3.2). Returns (centers, assignment, mass, medoids, inertia); see
    functional.kmeans."""
    return _cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, False)


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
    acc, wide = accumulate_dtype(x.dtype), wide_dtype(x)
    if b == 0 or n == 0:
        empty = x.new_zeros(b, k, dtype=acc)
        none = torch.full((b, k), -1, device=x.device)
        return x.new_zeros(b, k, d), none.new_zeros(b, n), empty, none, empty.sum(1)
    if d == 0:  # tokens without features are all equal: one zero column says the same
        x = x.new_zeros(b, n, 1)
        init = init if init.dtype == torch.int64 else init.new_zeros(b, k, 1)
    if is_farthest(init):
        found = farthest_recorded if torch.compiler.is_compiling() else spread_farthest
        init = found(x.detach(), k, None if weights is None else weights.detach(), mask)
    p = _prepare(x, weights, mask, counts, k)

    medoids = torch.full((b, k), -1, device=x.device)
    if init.dtype == torch.int64:
        medoids = init.clamp(0, n - 1)
        centers = _gather_rows(p.centered, medoids)
    else:
        centers = init.to(wide) * p.token_scale[:, None, None] - p.mean
    cluster = torch.arange(k, device=x.device).expand(b, k)
    before, loss_before, done = None, None, None
    for iteration in range(num_iters):
        assignment, distance = nearest(p.centered, centers, p.active)
        if with_medoids:  # a medoid belongs to its own cluster
            owner = torch.full((b, n), k, device=x.device)
            owner = owner.scatter_reduce(1, medoids.clamp(min=0), torch.where(p.active, cluster, k), "amin")
            distance = torch.where(owner < k, 0, distance)
            assignment = torch.where(owner < k, owner, assignment)
        repaired = _repair(assignment, p.weights * distance, p)
        moved = repaired != assignment
        loss = torch.where(p.valid & ~moved & (p.weights > 0), p.weights * distance, 0).sum(1)
        assignment = torch.where(p.valid, repaired, -1)
        if before is not None:
            # Where clusters had to be refilled, or for very long, labels may change for ever and gain nothing.
            settled = (assignment == before).all(1)
            must_pay = moved.any(1) if iteration < PATIENCE else torch.ones_like(settled)
            done = done | settled | (must_pay & ~(loss < loss_before))
            assignment = torch.where(done[:, None], before, assignment)
            if values.visible(done) and bool(done.all()):
                break
        else:
            done = torch.zeros(b, dtype=torch.bool, device=x.device)
        before, loss_before = assignment, loss
        mass, share = _membership(assignment, p.weights, k)
        centers = _means(p.centered, assignment, share, k)
        if with_medoids:
            medoids = _medoids(assignment, centers, mass, p)
            centers = _gather_rows(p.centered, medoids)

    if sort:
        assignment, order = sort_clusters(assignment, k)
        mass, share = _membership(assignment, p.weights, k)
        medoids = medoids.gather(1, order) if with_medoids else medoids
    if with_medoids:
        rows = torch.where(medoids[:, :, None] >= 0, _gather_rows(p.tokens, medoids), 0)
        centers = torch.where(medoids[:, :, None] >= 0, _gather_rows(x, medoids), 0)
    else:
        rows = _means(p.tokens, assignment, share, k)  # of the tokens themselves: a lone member is its own mean
        centers = _rounded(rows * p.token_unscale[:, None, None], rows, x.dtype)
    error = (p.tokens - _gather_rows(rows, assignment)).square().sum(-1)
    if not with_medoids:
        medoids = _representatives(error, assignment, p)
    inertia = torch.where(p.valid & (p.weights != 0), p.weights * error, 0).sum(1)
    exponent = 2 * _exponent(p.token_unscale) + _exponent(p.weight_unscale)
    limit = 100 if wide == torch.float32 else 800
    for _ in range(4):  # in steps of one sign, so that nothing between overflows or vanishes
        step = exponent.clamp(-limit, limit)
        inertia, exponent = inertia * _power_of_two(step, wide), exponent - step
    largest = torch.finfo(acc).max
    mass = (mass * p.weight_unscale[:, None]).clamp(max=largest)
    centers = centers if d else centers[:, :, :0]
    return centers, assignment, mass.to(acc), medoids, inertia.clamp(max=largest).to(acc)


def _rounded(rows: Tensor, finite_where: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; a finite row that rounds beyond its largest number becomes that number."""
    largest = torch.finfo(dtype).max
    return torch.where(finite_where.isfinite(), rows.clamp(-largest, largest), rows).to(dtype)


def assign(x: Tensor, centers: Tensor, mask: Tensor | None) -> Tensor:
    """Index (B, N) of every token's nearest center, lowest on a tie; -1 for padding."""
    if x.numel() == 0:
        label = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    else:
        centers = centers.to(wide_dtype(x))
        middle = centers.nanmedian(1, keepdim=True).values  # one far center does not move it
        middle = torch.where(middle.isfinite(), middle, 0)
        middle = _coarse(middle, (centers - middle).abs().nanmedian(1, keepdim=True).values.nan_to_num(0, 0))
        label = nearest(x - middle, centers - middle)[0]
    return label if mask is None else torch.where(mask, label, -1)


def pool(x: Tensor, assignment: Tensor, weights: Tensor | None, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Weighted mean of the tokens of each cluster. Returns (centers (B, K, D) in x.dtype, mass (B, K))."""
    acc, wide = accumulate_dtype(x.dtype), wide_dtype(x)
    inside = (assignment >= 0) & (assignment < num_clusters)
    assignment = torch.where(inside, assignment, -1)
    w = torch.ones_like(assignment, dtype=wide) if weights is None else weights.to(wide)
    mass, share = _membership(assignment, torch.where(inside, w, 0), num_clusters)
    part = torch.ones(len(x), 1, 1, dtype=wide, device=x.device)
    if x.dtype == wide and x.numel():  # a difference of two may not overflow
        part = torch.where(x.abs().amax((1, 2), keepdim=True) > torch.finfo(wide).max / 8, 0.25, part)
    rows = _means(x.to(wide) * part, assignment, share, num_clusters)
    return _rounded(rows / part, rows, x.dtype), mass.clamp(max=torch.finfo(acc).max).to(acc)


def pool_backward(
    grad_centers: Tensor, x: Tensor, centers: Tensor, assignment: Tensor, weights: Tensor | None, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the weighted mean: (grad_x (B, N, D) in x.dtype, grad_weights (B, N) in acc; zeros without
    weights)."""
    acc, wide = accumulate_dtype(x.dtype), wide_dtype(x)
    k = centers.shape[1]
    inside = (assignment >= 0) & (assignment < k)
    index = torch.where(inside, assignment, 0)
    w = torch.ones_like(assignment, dtype=wide) if weights is None else weights.to(wide)
    count = _sums(torch.ones_like(w), assignment, k)
    w_cluster = mass.to(wide).gather(1, index)
    weighted = w_cluster > 0
    safe = torch.where(weighted, w_cluster, 1)
    share = torch.where(weighted, w / safe, 1 / count.gather(1, index).clamp(min=1))
    grad = _gather_rows(grad_centers.to(wide), index)
    grad_x = torch.where(inside[:, :, None], share[:, :, None] * grad, 0).to(x.dtype)
    if weights is None:
        return grad_x, torch.zeros_like(w, dtype=acc)
    inner = ((x.to(wide) - _gather_rows(centers.to(wide), index)) * grad).sum(-1)
    return grad_x, torch.where(inside & weighted, inner / safe, 0).to(acc)


def unpool(centers: Tensor, assignment: Tensor) -> Tensor:
    """Every token's center: (B, N, D); zeros where the assignment is -1."""
    if centers.shape[1] == 0:
        return centers.new_zeros(*assignment.shape, centers.shape[2])
    inside = (assignment >= 0) & (assignment < centers.shape[1])
    rows = _gather_rows(centers, torch.where(inside, assignment, 0))
    return torch.where(inside[:, :, None], rows, 0)


def unpool_backward(grad: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Sum of the incoming gradients of each cluster's tokens: (B, K, D) in grad.dtype."""
    return _sums(grad.to(wide_dtype(grad)), assignment, num_clusters).to(grad.dtype)


def attention_received(q: Tensor, k: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """Mean over heads and queries of softmax(scale * q k^T): (B, N) in acc. One head at a time."""
    acc, wide = accumulate_dtype(q.dtype), wide_dtype(q)
    b, heads, num_queries, _ = q.shape
    total = torch.zeros(b, k.shape[2], dtype=wide, device=q.device)
    for head in range(heads if k.shape[2] else 0):
        logits = q[:, head].to(wide) @ k[:, head].to(wide).transpose(1, 2)
        if lse is None:  # scaled after the largest is taken off: no scale makes infinity minus infinity
            best = logits.amax(-1, keepdim=True) if scale > 0 else logits.amin(-1, keepdim=True)
            total = total + ((logits - best) * scale).softmax(-1).sum(1)
        else:
            total = total + (logits * scale - lse[:, head].to(wide)[:, :, None]).exp().sum(1)
    return (total / max(heads * num_queries, 1)).to(acc)
