"""The operators for `torch.onnx.export(dynamo=True)`: standard operators only, no custom domain, no scatter.

Equal to the other backends up to rounding, with these shapes in memory: (B, N, N) once and (B, N, K) an iteration. The
start and the iterations are unrolled, so a graph holds K + num_iters steps. Sorting is replaced by counting how many
come before: ONNX's sorts say nothing of ties in every opset. Any batch size; float32, or float64 for float64.

Notation: B images, N tokens, D features, K clusters; "member" is (B, N, K) bool, token i belongs to cluster j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import accumulate_dtype, is_farthest


def _lowest(values: Tensor, dim: int) -> Tensor:
    """Position of the least, the first of equals."""
    return values.argmin(dim)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, j]]: (B, K, D)."""
    return x.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2]))


def _members(assignment: Tensor, k: int) -> Tensor:
    return assignment[:, :, None] == torch.arange(k, device=assignment.device)


def _before(order: Tensor, counted: Tensor) -> Tensor:
    """(B, N): how many counted entries have a lower `order` (distinct integers)."""
    return ((order[:, None, :] < order[:, :, None]) & counted[:, None, :]).sum(2)


def _farthest(apart: Tensor, w: Tensor, valid: Tensor, k: int) -> Tensor:
    """(B, K) tokens: the heaviest, then the largest w_i * (squared distance to the nearest chosen)."""
    n = apart.shape[1]
    token = torch.arange(n, device=apart.device)
    unusable = torch.where(valid, torch.where(w > 0, 0.0, -1.0), -2.0).to(w.dtype)
    distance, chosen = None, []
    for _ in range(k):
        gain = torch.where(unusable < 0, unusable, w if distance is None else w * distance)
        pick = gain.argmax(1, keepdim=True)
        chosen.append(pick)
        unusable = torch.where(token == pick, -2.0, unusable)
        row = apart.gather(1, pick[:, :, None].expand(-1, -1, n))[:, 0]
        distance = row if distance is None else torch.minimum(distance, row)
    return torch.cat(chosen, 1)


def _repair(assignment: Tensor, cost: Tensor, valid: Tensor, active: Tensor) -> Tensor:
    """The m-th costliest token that its cluster can spare goes to the m-th empty cluster (reference_steps.repair)."""
    n, k = cost.shape[1], active.shape[1]
    token = torch.arange(n, device=cost.device)
    cost = torch.where(valid, cost, -1.0)
    above = (cost[:, None, :] > cost[:, :, None]) | (
        (cost[:, None, :] == cost[:, :, None]) & (token[None, None, :] < token[None, :, None])
    )
    place = above.sum(2)  # by falling cost, ties by index
    member = _members(torch.where(valid, assignment, -1), k)
    last = torch.where(member, place[:, :, None], -1).amax(1)
    mine = torch.where(member, last[:, None, :], -1).amax(2)
    donor = valid & (place != mine)
    empty = active & (last < 0)
    number = empty.to(torch.int64).cumsum(1) - 1
    turn = _before(place, donor)
    target = empty[:, None, :] & (number[:, None, :] == turn[:, :, None])
    moves = donor & (turn < empty.sum(1, keepdim=True))
    return torch.where(moves, target.to(torch.int64).argmax(2), assignment)


def _shares(member: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, K) share of every token in its cluster's mean, and the clusters' masses (B, K)."""
    weight = torch.where(member, w[:, :, None], 0.0)
    mass, count = weight.sum(1, keepdim=True), member.to(w.dtype).sum(1, keepdim=True)
    plain = member.to(w.dtype) / count.clamp(min=1)
    return torch.where(mass > 0, weight / torch.where(mass > 0, mass, 1.0), plain), mass[:, 0]


def _cluster(x, weights, mask, counts, init, k, num_iters, sort, with_medoids):
    b, n, _ = x.shape
    acc = accumulate_dtype(x.dtype)
    tokens = x.to(acc)
    valid = torch.ones_like(tokens[:, :, 0], dtype=torch.bool) if mask is None else mask
    tokens = torch.where(valid[:, :, None], tokens, 0.0)
    w = torch.ones_like(tokens[:, :, 0]) if weights is None else torch.where(valid, weights.to(acc), 0.0)
    num_valid = valid.sum(1)
    effective = num_valid if counts is None else torch.minimum(counts, num_valid)
    cluster = torch.arange(k, device=x.device)
    active = cluster < effective[:, None]

    counted = (valid & (w > 0)).to(acc)
    mean = (tokens * counted[:, :, None]).sum(1, keepdim=True) / counted.sum(1)[:, None, None].clamp(min=1)
    centered = torch.where(valid[:, :, None], tokens - mean, 0.0)
    norm = centered.square().sum(2)
    if is_farthest(init):
        apart = (norm[:, :, None] + norm[:, None, :] - 2 * centered @ centered.transpose(1, 2)).clamp(min=0)
        init = _farthest(apart, w, valid, k)
    from_tokens = init.dtype == torch.int64
    medoids = init.clamp(0, n - 1) if from_tokens else None
    centers = _rows(centered, medoids) if from_tokens else init.to(acc) - mean

    before = loss_before = done = None
    for _ in range(num_iters):
        score = centers.square().sum(2)[:, None, :] - 2 * centered @ centers.transpose(1, 2)
        score = torch.where(active[:, None, :], score, torch.inf)
        assignment = _lowest(score, 2)
        distance = (score.amin(2) + norm).clamp(min=0)
        if with_medoids:  # a medoid belongs to its own cluster
            own = (medoids[:, None, :] == torch.arange(n, device=x.device)[None, :, None]) & active[:, None, :]
            assignment = torch.where(own.any(2), own.to(torch.int64).argmax(2), assignment)
            distance = torch.where(own.any(2), 0.0, distance)
        repaired = _repair(assignment, w * distance, valid, active)
        moved = repaired != assignment
        loss = torch.where(valid & ~moved, w * distance, 0.0).sum(1)
        assignment = torch.where(valid, repaired, -1)
        if before is not None:
            stop = (assignment == before).all(1) | (moved.any(1) & ~(loss < loss_before))
            done = stop if done is None else done | stop
            assignment = torch.where(done[:, None], before, assignment)
        before, loss_before = assignment, loss
        member = _members(assignment, k)
        share, mass = _shares(member, w)
        centers = share.transpose(1, 2) @ centered
        if with_medoids:
            offset = _squared(centered, norm, centers)
            pair = member.sum(1, keepdim=True) == 2  # of two, the heavier; of weightless ones, the first
            offset = torch.where(pair, -w[:, :, None], offset)
            offset = torch.where((w > 0)[:, :, None], offset, torch.inf)  # what weighs nothing moves nothing
            offset = torch.where((mass > 0)[:, None, :], offset, 0.0)
            medoids = _nearest_member(member, offset)
            centers = _rows(centered, medoids)

    if sort:
        first = torch.where(member, torch.arange(n, device=x.device)[:, None], n).amin(1)
        first = first * k + cluster  # those without members keep their order
        rank = _before(first, torch.ones_like(active))
        order = (rank[:, None, :] == cluster[:, None]).to(torch.int64).argmax(2)
        assignment = torch.where(valid, rank.gather(1, assignment.clamp(min=0)), -1)
        medoids = medoids.gather(1, order) if with_medoids else None
        member = _members(assignment, k)
        share, mass = _shares(member, w)
    if with_medoids:
        rows = torch.where(member.any(1)[:, :, None], _rows(tokens, medoids), 0.0)
    else:
        rows = share.transpose(1, 2) @ tokens
    error = (tokens - _rows(rows, assignment)).square().sum(2)
    if not with_medoids:
        differ = (member & (error > 0)[:, :, None]).any(1, keepdim=True)
        pair = differ & (member.sum(1, keepdim=True) == 2)
        medoids = _nearest_member(member, torch.where(pair, -w[:, :, None], error[:, :, None]))
    inertia = torch.where(valid, w * error, 0.0).sum(1)
    return rows.to(x.dtype), assignment, mass, medoids, inertia


def _nearest_member(member: Tensor, offset: Tensor) -> Tensor:
    """(B, K) of each cluster the member of the least offset, the first of equals; -1 where there is none."""
    return torch.where(member.any(1), _lowest(torch.where(member, offset, torch.inf), 1), -1)


def _squared(x: Tensor, norm: Tensor, centers: Tensor) -> Tensor:
    return (norm[:, :, None] + centers.square().sum(2)[:, None, :] - 2 * x @ centers.transpose(1, 2)).clamp(min=0)


def kmeans(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    return _cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, False)


def kmedoids(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    return _cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, True)


def pool(x: Tensor, assignment: Tensor, weights: Tensor | None, num_clusters: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x.dtype)
    member = _members(assignment, num_clusters)
    tokens = torch.where(member.any(2)[:, :, None], x.to(acc), 0.0)
    share, mass = _shares(member, torch.ones_like(tokens[:, :, 0]) if weights is None else weights.to(acc))
    return (share.transpose(1, 2) @ tokens).to(x.dtype), mass


def unpool(centers: Tensor, assignment: Tensor) -> Tensor:
    inside = (assignment >= 0) & (assignment < centers.shape[1])
    return torch.where(inside[:, :, None], _rows(centers, torch.where(inside, assignment, 0)), 0.0)


def assign(x: Tensor, centers: Tensor, mask: Tensor | None) -> Tensor:
    x, centers = x.to(centers.dtype), centers
    label = _lowest(centers.square().sum(2)[:, None, :] - 2 * x @ centers.transpose(1, 2), 2)
    return label if mask is None else torch.where(mask, label, -1)


def attention_received(q: Tensor, k: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    acc = accumulate_dtype(q.dtype)
    logits = q.to(acc) @ k.to(acc).transpose(2, 3) * scale
    shares = logits.softmax(-1) if lse is None else (logits - lse[..., None]).exp()
    return shares.mean((1, 2))
