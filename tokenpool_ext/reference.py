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

import torch
from torch import Tensor

from . import reference_steps as steps
from . import values
from .ops import accumulate_dtype, is_farthest

PATIENCE = 100  # iterations after which labels that change must pay


def seeds(
    x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None, generator: torch.Generator | None, sample: bool
) -> Tensor:
    """K tokens one by one, the first by weight, then by w_i * (squared distance to the nearest chosen so far).

    k-means++ draws with that probability, farthest-first takes the largest (lowest index on a tie). Tokens of zero
    weight come after all others, padding after those.
    """
    b, n, d = x.shape
    wide = steps.wide_dtype(x)
    valid = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    tokens = torch.where(valid[:, :, None], x.to(wide), 0)
    tokens = tokens * steps.power_of_two_scale(tokens.abs().amax((1, 2)))[0][:, None, None] if d else tokens
    w = valid.to(wide) if weights is None else torch.where(valid, weights.to(wide), 0)
    w = w * steps.power_of_two_scale(w.amax(1))[0][:, None]
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


def farthest_seeds(x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """The farthest-first start: (B, K) token indices."""
    return seeds(x, k, weights, mask, None, sample=False)


@torch.library.custom_op(
    "tokenpool_ext_reference::farthest",
    mutates_args=(),
    schema="(Tensor x, SymInt k, Tensor? weights, Tensor? mask) -> Tensor",
)
def farthest_as_one_op(x: Tensor, k: int, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """The farthest-first start as one op where ops are recorded: unrolled, it would be compiled anew for every K."""
    return farthest_seeds(x, k, weights, mask)


@farthest_as_one_op.register_fake
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
    acc, wide = accumulate_dtype(x.dtype), steps.wide_dtype(x)
    if b == 0 or n == 0:
        empty = x.new_zeros(b, k, dtype=acc)
        none = torch.full((b, k), -1, device=x.device)
        return x.new_zeros(b, k, d), none.new_zeros(b, n), empty, none, empty.sum(1)
    if d == 0:  # tokens without features are all equal: one zero column says the same
        x = x.new_zeros(b, n, 1)
        init = init if init.dtype == torch.int64 else init.new_zeros(b, k, 1)
    if is_farthest(init):
        found = farthest_as_one_op if torch.compiler.is_compiling() else farthest_seeds
        init = found(x.detach(), k, None if weights is None else weights.detach(), mask)
    p = steps.prepare(x, weights, mask, counts, k)

    medoids = torch.full((b, k), -1, device=x.device)
    if init.dtype == torch.int64:
        medoids = init.clamp(0, n - 1)
        centers = steps.gather_rows(p.centered, medoids)
    else:
        centers = init.to(wide) * p.token_scale[:, None, None] - p.mean
    cluster = torch.arange(k, device=x.device).expand(b, k)
    before, loss_before, done = None, None, None
    for iteration in range(num_iters):
        assignment, distance = steps.nearest(p.centered, centers, p.active)
        if with_medoids:  # a medoid belongs to its own cluster
            owner = torch.full((b, n), k, device=x.device)
            owner = owner.scatter_reduce(1, medoids.clamp(min=0), torch.where(p.active, cluster, k), "amin")
            distance = torch.where(owner < k, 0, distance)
            assignment = torch.where(owner < k, owner, assignment)
        repaired = steps.repair(assignment, p.weights * distance, p)
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
        mass, share = steps.membership(assignment, p.weights, k)
        if with_medoids:
            medoids = steps.medoids(assignment, mass, p)
            centers = steps.gather_rows(p.centered, medoids)
        else:
            centers = steps.means(p.centered, assignment, share, k)

    if sort:
        assignment, order = steps.sort_clusters(assignment, k)
        mass, share = steps.membership(assignment, p.weights, k)
        medoids = medoids.gather(1, order) if with_medoids else medoids
    if with_medoids:
        rows = torch.where(medoids[:, :, None] >= 0, steps.gather_rows(p.tokens, medoids), 0)
        centers = torch.where(medoids[:, :, None] >= 0, steps.gather_rows(x, medoids), 0)
    else:
        rows = steps.means(p.tokens, assignment, share, k)  # of the tokens themselves: a lone member is its own mean
        centers = _rounded(rows * p.token_unscale[:, None, None], rows, x.dtype)
    error = (p.tokens - steps.gather_rows(rows, assignment)).square().sum(-1)
    if not with_medoids:
        medoids = steps.representatives(error, assignment, mass, p)
    inertia = torch.where(p.valid & (p.weights != 0), p.weights * error, 0).sum(1)
    exponent = 2 * steps.exponent_of(p.token_unscale) + steps.exponent_of(p.weight_unscale)
    limit = 100 if wide == torch.float32 else 800
    for _ in range(4):  # in steps of one sign, so that nothing between overflows or vanishes
        step = exponent.clamp(-limit, limit)
        inertia, exponent = inertia * steps.power_of_two(step, wide), exponent - step
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
        centers = centers.to(steps.wide_dtype(x))
        middle = centers.nanmedian(1, keepdim=True).values  # one far center does not move it
        middle = torch.where(middle.isfinite(), middle, 0)
        middle = steps.coarse(middle, (centers - middle).abs().nanmedian(1, keepdim=True).values.nan_to_num(0, 0))
        label = steps.nearest(x - middle, centers - middle)[0]
    return label if mask is None else torch.where(mask, label, -1)


def pool(x: Tensor, assignment: Tensor, weights: Tensor | None, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Weighted mean of the tokens of each cluster. Returns (centers (B, K, D) in x.dtype, mass (B, K))."""
    acc, wide = accumulate_dtype(x.dtype), steps.wide_dtype(x)
    inside = (assignment >= 0) & (assignment < num_clusters)
    assignment = torch.where(inside, assignment, -1)
    w = torch.ones_like(assignment, dtype=wide) if weights is None else weights.to(wide)
    mass, share = steps.membership(assignment, torch.where(inside, w, 0), num_clusters)
    part = torch.ones(x.shape[0], 1, 1, dtype=wide, device=x.device)
    if x.dtype == wide and x.numel():  # a difference of two may not overflow
        part = torch.where(x.abs().amax((1, 2), keepdim=True) > torch.finfo(wide).max / 8, 0.25, part)
    rows = steps.means(x.to(wide) * part, assignment, share, num_clusters)
    return _rounded(rows / part, rows, x.dtype), mass.clamp(max=torch.finfo(acc).max).to(acc)


def pool_backward(
    grad_centers: Tensor, x: Tensor, centers: Tensor, assignment: Tensor, weights: Tensor | None, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the weighted mean: (grad_x (B, N, D) in x.dtype, grad_weights (B, N) in acc; zeros without
    weights)."""
    acc, wide = accumulate_dtype(x.dtype), steps.wide_dtype(x)
    k = centers.shape[1]
    inside = (assignment >= 0) & (assignment < k)
    index = torch.where(inside, assignment, 0)
    w = torch.ones_like(assignment, dtype=wide) if weights is None else weights.to(wide)
    count = steps.sums(torch.ones_like(w), assignment, k)
    w_cluster = mass.to(wide).gather(1, index)
    weighted = w_cluster > 0
    safe = torch.where(weighted, w_cluster, 1)
    share = torch.where(weighted, w / safe, 1 / count.gather(1, index).clamp(min=1))
    grad = steps.gather_rows(grad_centers.to(wide), index)
    grad_x = torch.where(inside[:, :, None], share[:, :, None] * grad, 0).to(x.dtype)
    if weights is None:
        return grad_x, torch.zeros_like(w, dtype=acc)
    inner = ((x.to(wide) - steps.gather_rows(centers.to(wide), index)) * grad).sum(-1)
    return grad_x, torch.where(inside & weighted, inner / safe, 0).to(acc)


def unpool(centers: Tensor, assignment: Tensor) -> Tensor:
    """Every token's center: (B, N, D); zeros where the assignment is -1."""
    if centers.shape[1] == 0:
        return centers.new_zeros(*assignment.shape, centers.shape[2])
    inside = (assignment >= 0) & (assignment < centers.shape[1])
    rows = steps.gather_rows(centers, torch.where(inside, assignment, 0))
    return torch.where(inside[:, :, None], rows, 0)


def unpool_backward(grad: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Sum of the incoming gradients of each cluster's tokens: (B, K, D) in grad.dtype."""
    return steps.sums(grad.to(steps.wide_dtype(grad)), assignment, num_clusters).to(grad.dtype)


def attention_received(q: Tensor, k: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """Mean over heads and queries of softmax(scale * q k^T): (B, N) in acc. One head at a time."""
    acc, wide = accumulate_dtype(q.dtype), steps.wide_dtype(q)
    b, heads, num_queries, _ = q.shape
    total = torch.zeros(b, k.shape[2], dtype=wide, device=q.device)
    for head in range(heads if k.shape[2] else 0):
        queries, q_unscale = _tamed(q[:, head].to(wide))
        keys, k_unscale = _tamed(k[:, head].to(wide))
        logits = queries @ keys.transpose(1, 2)
        largest = torch.finfo(wide).max
        factor = (scale * q_unscale * k_unscale).clamp(-largest, largest)
        if lse is None:  # scaled after the largest is taken off: no scale makes infinity minus infinity
            best = logits.amax(-1, keepdim=True) if scale > 0 else logits.amin(-1, keepdim=True)
            total = total + ((logits - best) * factor).softmax(-1).sum(1)
        else:
            total = total + (logits * factor - lse[:, head].to(wide)[:, :, None]).exp().sum(1)
    return (total / max(heads * num_queries, 1)).to(acc)


def _tamed(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, d) brought down by a power of two where products might overflow, and what undoes it, (B, 1, 1)."""
    if not x.numel():
        return x, x.new_ones(x.shape[0], 1, 1)
    largest = x.abs().amax((1, 2), keepdim=True)
    scale, unscale = steps.power_of_two_scale(torch.where(largest > torch.finfo(x.dtype).max ** 0.45, largest, 1.0))
    return x * scale, unscale
