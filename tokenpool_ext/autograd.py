"""Derivatives of every order of the operators; the assignment is constant (contract, section 6).

A mean is linear in the tokens, so all of it is made of two operators that are each other's transpose: `unpool`, which
gives every token its cluster's row, and `cluster_sums`, which adds up the rows of every cluster. The first derivative
alone has a kernel (`pool_backward`); where a derivative is itself recorded, it is composed of the two.

`chain` names the backends to try, as `backends.select` chose them; forward and backward use the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import no_autocast, run
from .ops import accumulate_dtype, more_images


def wanted(*inputs: Tensor | None) -> bool:
    """Does anything record how the result depends on these? If not, the op is called without the cost of a Function."""
    if torch.is_grad_enabled():
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    # forward mode and torch.func hide what they record
    return getattr(forward_ad, "_current_level", 0) >= 0 or torch._C._are_functorch_transforms_active()


def _traced() -> bool:
    """Is torch.func inside torch.compile? There a Function is not seen, and only torch's own ops have derivatives."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _ruled(function):
    """Beside a Function, one that also has the rules of forward mode and vmap, which torch.compile does not take."""
    vmap = functools.partial(more_images, lambda *args: function.with_rules.apply(*args))
    rules = {"jvp": staticmethod(function.tangents), "vmap": staticmethod(vmap)}
    function.with_rules = type(function.__name__, (function,), rules)
    return function


@_ruled
class KMeans(torch.autograd.Function):
    """Centers that are weighted means of the tokens nearest to them."""

    @staticmethod
    def forward(chain, x, weights, mask, counts, init, num_clusters, num_iters, sort):
        with no_autocast(x):
            return run(chain, "kmeans", x, weights, mask, counts, init, num_clusters, num_iters, sort)

    @staticmethod
    def setup_context(ctx, inputs, output):
        centers, assignment, mass, medoids, inertia = output
        ctx.mark_non_differentiable(assignment, mass, medoids, inertia)
        _save(ctx, inputs[0], inputs[1], inputs[2], centers, assignment, mass)

    @staticmethod
    def backward(ctx, grad_centers, *_):
        grad_x, grad_weights = _means_backward(ctx, grad_centers)
        return None, grad_x, grad_weights, None, None, None, None, None, None

    @staticmethod
    def tangents(ctx, _chain, x_tangent, weights_tangent, *_):
        return _means_tangent(ctx, x_tangent, weights_tangent), None, None, None, None


@_ruled
class Pool(torch.autograd.Function):
    """Weighted means of the tokens with a given assignment."""

    @staticmethod
    def forward(chain, x, assignment, weights, num_clusters):
        with no_autocast(x):
            return run(chain, "pool", x, assignment, weights, num_clusters)

    @staticmethod
    def setup_context(ctx, inputs, output):
        centers, mass = output
        ctx.mark_non_differentiable(mass)
        _save(ctx, inputs[0], inputs[1], inputs[3], centers, inputs[2], mass)

    @staticmethod
    def backward(ctx, grad_centers, *_):
        grad_x, grad_weights = _means_backward(ctx, grad_centers)
        return None, grad_x, None, grad_weights, None

    @staticmethod
    def tangents(ctx, _chain, x_tangent, _assignment, weights_tangent, _num_clusters):
        return _means_tangent(ctx, x_tangent, weights_tangent), None


@_ruled
class KMedoids(torch.autograd.Function):
    """Centers that are rows of x."""

    @staticmethod
    def forward(chain, x, weights, mask, counts, init, num_clusters, num_iters, sort):
        with no_autocast(x):
            return run(chain, "kmedoids", x, weights, mask, counts, init, num_clusters, num_iters, sort)

    @staticmethod
    def setup_context(ctx, inputs, output):
        centers, *constant = output
        ctx.mark_non_differentiable(*constant)
        medoids = constant[2]
        ctx.like = tuple(centers.shape), centers.dtype
        ctx.num_tokens = inputs[1].shape[1]
        _save(ctx, inputs[0], medoids, inputs[2])

    @staticmethod
    def backward(ctx, grad_centers, *_):
        medoids, weights = ctx.saved_tensors
        b, _, d = grad_centers.shape
        # Medoids are distinct; clusters that do not exist add zeros to token 0, exact in any order.
        rows = torch.where(medoids[:, :, None] >= 0, grad_centers, 0)
        index = medoids.clamp(min=0)[:, :, None].expand(-1, -1, d)
        grad_x = grad_centers.new_zeros(b, ctx.num_tokens, d)
        if ctx.num_tokens:
            grad_x = grad_x.scatter_add(1, index, rows)
        grad_weights = None if weights is None or not ctx.needs_input_grad[2] else torch.zeros_like(weights)
        return None, grad_x, grad_weights, None, None, None, None, None, None

    @staticmethod
    def tangents(ctx, _chain, x_tangent, *_):
        medoids, _ = ctx.saved_tensors
        if x_tangent is None:  # only weights move: the medoids stay
            shape, dtype = ctx.like
            return medoids.new_zeros(shape, dtype=dtype), None, None, None, None
        return take_rows(x_tangent, medoids), None, None, None, None


@_ruled
class Unpool(torch.autograd.Function):
    @staticmethod
    def forward(chain, centers, assignment):
        return run(chain, "unpool", centers, assignment)

    @staticmethod
    def setup_context(ctx, inputs, output):
        chain, centers, assignment = inputs
        ctx.num_clusters = centers.shape[1]
        _save(ctx, chain, assignment)

    @staticmethod
    def backward(ctx, grad):
        (assignment,) = ctx.saved_tensors
        return None, cluster_sums(ctx.chain, grad, assignment, ctx.num_clusters), None

    @staticmethod
    def tangents(ctx, _chain, tangent, _assignment):
        (assignment,) = ctx.saved_tensors
        return unpool(ctx.chain, tangent, assignment)


@_ruled
class ClusterSums(torch.autograd.Function):
    @staticmethod
    def forward(chain, rows, assignment, num_clusters):
        with no_autocast(rows):
            return run(chain, "unpool_backward", rows, assignment, num_clusters)

    @staticmethod
    def setup_context(ctx, inputs, output):
        chain, _, assignment, ctx.num_clusters = inputs
        _save(ctx, chain, assignment)

    @staticmethod
    def backward(ctx, grad):
        (assignment,) = ctx.saved_tensors
        return None, unpool(ctx.chain, grad, assignment), None, None

    @staticmethod
    def tangents(ctx, _chain, tangent, _assignment, _num_clusters):
        (assignment,) = ctx.saved_tensors
        return cluster_sums(ctx.chain, tangent, assignment, ctx.num_clusters)


def kmeans(chain, x, weights, *rest):
    """The op `kmeans` with derivatives: (centers, assignment, mass, medoids, inertia)."""
    if _traced():
        centers, *constant = _constant(chain, "kmeans", x, weights, *rest)
        return _attached(chain, x, weights, centers, constant[0]), *constant
    return _apply(KMeans, chain, x, weights, *rest)


def kmedoids(chain, x, weights, *rest):
    """The op `kmedoids` with derivatives: (centers, assignment, mass, medoids, inertia)."""
    if _traced():
        _, *constant = _constant(chain, "kmedoids", x, weights, *rest)
        return take_rows(x, constant[2]), *constant
    return _apply(KMedoids, chain, x, weights, *rest)


def pool(chain, x, assignment, weights, num_clusters) -> Tensor:
    if _traced():
        centers, _ = _constant(chain, "pool", x, assignment, weights, num_clusters)
        return _attached(chain, x, weights, centers, assignment)
    return _apply(Pool, chain, x, assignment, weights, num_clusters)[0]


def unpool(chain, centers: Tensor, assignment: Tensor) -> Tensor:
    """(B, K, D) to (B, N, D): every token's row; zeros where the label is not one of 0..K-1."""
    if not wanted(centers):
        return run(chain, "unpool", centers, assignment)
    if _traced():
        return take_rows(centers, torch.where(assignment < centers.shape[1], assignment, -1))
    return _apply(Unpool, chain, centers, assignment)


def cluster_sums(chain, rows: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """(B, N, D) to (B, K, D): the sum of every cluster's rows."""
    if _traced():
        inside = ((assignment >= 0) & (assignment < num_clusters))[:, :, None].expand_as(rows)
        index = torch.where(inside, assignment[:, :, None], 0)
        empty = rows.new_zeros(rows.shape[0], num_clusters, rows.shape[2])
        return empty.scatter_add(1, index, torch.where(inside, rows, 0))
    if wanted(rows):
        return _apply(ClusterSums, chain, rows, assignment, num_clusters)
    with no_autocast(rows):
        return run(chain, "unpool_backward", rows, assignment, num_clusters)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of `x` (B, N, D); zeros where the index is -1."""
    rows = x.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.where(index[:, :, None] >= 0, rows, 0)


def _apply(function, *args):
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if torch._C._are_functorch_transforms_active():
        return function.with_rules.apply(*args)
    # As Function.apply does, without fitting the arguments to forward's signature: there are no defaults, and it takes
    # three times as long as everything else.
    return super(torch.autograd.Function, function.with_rules).apply(*args)


def _constant(chain, op: str, *args):
    with no_autocast(args[0]):
        return run(chain, op, *(value.detach() if isinstance(value, Tensor) else value for value in args))


def _attached(chain, x, weights, centers, assignment) -> Tensor:
    """The same centers, made to depend on x and weights by torch's own ops."""
    share, _ = _shares(chain, x, weights, assignment, centers.shape[1])
    rows = torch.where((assignment >= 0)[:, :, None], share[:, :, None] * x, 0)
    mean = cluster_sums(chain, rows, assignment, centers.shape[1]).to(x.dtype)
    return centers + (mean - mean.detach())


def _save(ctx, chain, *tensors) -> None:
    ctx.chain = chain
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _means_backward(ctx, grad_centers) -> tuple[Tensor, Tensor | None]:
    x, weights, centers, assignment, mass = ctx.saved_tensors
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or wanted()):
        return _transposed_means(ctx.chain, grad_centers, x, weights, centers, assignment)
    with no_autocast(x):
        grads = run(ctx.chain, "pool_backward", grad_centers, x, centers, assignment, weights, mass)
    return grads[0], None if weights is None else grads[1]


def _means_tangent(ctx, x_tangent, weights_tangent) -> Tensor:
    x, weights, centers, assignment, _ = ctx.saved_tensors
    share, per_mass = _shares(ctx.chain, x, weights, assignment, centers.shape[1])
    moved = torch.zeros_like(x, dtype=share.dtype)
    if x_tangent is not None:
        moved = moved + share[:, :, None] * x_tangent
    if weights is not None and weights_tangent is not None:
        moved = moved + (per_mass * weights_tangent)[:, :, None] * _offsets(ctx.chain, x, centers, assignment)
    return cluster_sums(ctx.chain, moved, assignment, centers.shape[1]).to(x.dtype)


def _shares(chain, x, weights, assignment, num_clusters) -> tuple[Tensor, Tensor]:
    """(B, N) share of every token in its cluster's mean, w / W or 1 / count where W = 0; and 1 / W, 0 where W = 0."""
    inside = (assignment >= 0) & (assignment < num_clusters)
    ones = inside.to(accumulate_dtype(x.dtype))
    w = ones if weights is None else torch.where(inside, weights, 0)
    mass, count = (
        unpool(chain, cluster_sums(chain, value[:, :, None], assignment, num_clusters), assignment).squeeze(2)
        for value in (w, ones)
    )
    weighted = mass > 0
    mass = torch.where(weighted, mass, 1)
    share = torch.where(weighted, w / mass, 1 / count.clamp(min=1))
    return torch.where(inside, share, 0), torch.where(inside & weighted, 1 / mass, 0)


def _offsets(chain, x, centers, assignment) -> Tensor:
    """(B, N, D) in acc: token minus its center; zeros without a cluster, whatever the token holds."""
    acc = accumulate_dtype(x.dtype)
    inside = ((assignment >= 0) & (assignment < centers.shape[1]))[:, :, None]
    return torch.where(inside, x.to(acc), 0) - unpool(chain, centers.to(acc), assignment)


def _transposed_means(chain, grad_centers, x, weights, centers, assignment) -> tuple[Tensor, Tensor | None]:
    """The formulas of `pool_backward`, every step of which has derivatives."""
    share, per_mass = _shares(chain, x, weights, assignment, centers.shape[1])
    grad = unpool(chain, grad_centers.to(share.dtype), assignment)
    grad_x = (share[:, :, None] * grad).to(x.dtype)
    if weights is None:
        return grad_x, None
    return grad_x, (_offsets(chain, x, centers, assignment) * grad).sum(2) * per_mass
