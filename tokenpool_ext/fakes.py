"""Shapes and dtypes of the compiled ops' results, for torch.compile and torch.export."""

from __future__ import annotations

import torch

from .reference import accumulate_dtype


def _kmeans(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    b, n, d = x.shape
    acc = accumulate_dtype(x.dtype)
    return (
        x.new_empty(b, num_clusters, d),
        x.new_empty(b, n, dtype=torch.int64),
        x.new_empty(b, num_clusters, dtype=acc),
        x.new_empty(b, dtype=acc),
    )


def _kmedoids(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    centers, assignment, mass, inertia = _kmeans(x, weights, mask, counts, init, num_clusters, num_iters, sort)
    return centers, assignment, mass, torch.empty_like(mass, dtype=torch.int64), inertia


def _pool(x, assignment, weights, num_clusters):
    b, _, d = x.shape
    return x.new_empty(b, num_clusters, d), x.new_empty(b, num_clusters, dtype=accumulate_dtype(x.dtype))


def _pool_backward(grad_centers, x, centers, assignment, weights, mass):
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


def _unpool(centers, assignment):
    return centers.new_empty(assignment.shape[0], assignment.shape[1], centers.shape[2])


def _unpool_backward(grad, assignment, num_clusters):
    return grad.new_empty(grad.shape[0], num_clusters, grad.shape[2])


def _attention_received(q, k, scale, lse):
    return q.new_empty(k.shape[0], k.shape[2], dtype=accumulate_dtype(q.dtype))


FAKES = {
    "kmeans": _kmeans,
    "kmedoids": _kmedoids,
    "pool": _pool,
    "pool_backward": _pool_backward,
    "unpool": _unpool,
    "unpool_backward": _unpool_backward,
    "attention_received": _attention_received,
}


def register(namespace: str) -> None:
    """Register the fakes for every op of `namespace` (once)."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
