"""Thin autograd functions: save, call the op, apply the formula (contract: the assignment is constant).

`chain` holds the backends to try, as `backends.select` chose them; forward and backward use the same.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .backends import no_autocast, run


def wanted(*inputs: torch.Tensor | None) -> bool:
    """Does anything record how the result depends on these? If not, the op is called without the cost of a Function."""
    if torch.is_grad_enabled():
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    # Forward mode and torch.func hide what they record; the Function says what it cannot do, the op would lose it.
    return getattr(forward_ad, "_current_level", 0) >= 0 or torch._C._are_functorch_transforms_active()


class KMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, x, weights, mask, counts, init, num_clusters, num_iters, sort):
        with no_autocast(x):
            centers, assignment, mass, inertia = run(
                chain, "kmeans", x, weights, mask, counts, init, num_clusters, num_iters, sort
            )
        ctx.chain = chain
        ctx.mark_non_differentiable(assignment, mass, inertia)
        ctx.save_for_backward(x, centers, assignment, weights, mass)
        return centers, assignment, mass, inertia

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_centers, *_):
        x, centers, assignment, weights, mass = ctx.saved_tensors
        grad_x, grad_weights = _pool_backward(ctx, grad_centers, x, centers, assignment, weights, mass)
        return None, grad_x, grad_weights, None, None, None, None, None, None


class KMedoids(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, x, weights, mask, counts, init, num_clusters, num_iters, sort):
        with no_autocast(x):
            centers, assignment, mass, medoids, inertia = run(
                chain, "kmedoids", x, weights, mask, counts, init, num_clusters, num_iters, sort
            )
        ctx.num_tokens = x.shape[1]
        ctx.mark_non_differentiable(assignment, mass, medoids, inertia)
        ctx.save_for_backward(medoids, weights)
        return centers, assignment, mass, medoids, inertia

    @staticmethod
    @once_differentiable
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


class Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, x, assignment, weights, num_clusters):
        with no_autocast(x):
            centers, mass = run(chain, "pool", x, assignment, weights, num_clusters)
        ctx.chain = chain
        ctx.save_for_backward(x, centers, assignment, weights, mass)
        return centers

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_centers):
        x, centers, assignment, weights, mass = ctx.saved_tensors
        grad_x, grad_weights = _pool_backward(ctx, grad_centers, x, centers, assignment, weights, mass)
        return None, grad_x, None, grad_weights, None


class Unpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, centers, assignment):
        ctx.chain = chain
        ctx.num_clusters = centers.shape[1]
        ctx.save_for_backward(assignment)
        return run(chain, "unpool", centers, assignment)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (assignment,) = ctx.saved_tensors
        with no_autocast(grad):
            return None, run(ctx.chain, "unpool_backward", grad, assignment, ctx.num_clusters), None


def _pool_backward(ctx, grad_centers, x, centers, assignment, weights, mass):
    with no_autocast(x):
        grad_x, grad_weights = run(ctx.chain, "pool_backward", grad_centers, x, centers, assignment, weights, mass)
    return grad_x, None if weights is None else grad_weights
