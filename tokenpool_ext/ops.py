"""The operators below the public functions: names, schemas, and the shapes and dtypes of their results.

Every backend has one function per op with these arguments. `torch.ops.tokenpool_ext` gets its schemas in csrc/ops.cpp
(a test compares them), `torch.ops.tokenpool_ext_triton` from here; the fakes serve torch.compile and torch.export.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_CLUSTER = (
    "(Tensor x, Tensor? weights, Tensor? mask, Tensor? counts, Tensor init, SymInt num_clusters, int num_iters,"
    " bool sort) -> (Tensor centers, Tensor assignment, Tensor mass, Tensor medoids, Tensor inertia)"
)
SCHEMAS = {
    "kmeans": _CLUSTER,
    "kmedoids": _CLUSTER,
    "assign": "(Tensor x, Tensor centers, Tensor? mask) -> Tensor",
    "pool": "(Tensor x, Tensor assignment, Tensor? weights, SymInt num_clusters) -> (Tensor centers, Tensor mass)",
    "pool_backward": "(Tensor grad_centers, Tensor x, Tensor centers, Tensor assignment, Tensor? weights, Tensor mass)"
    " -> (Tensor grad_x, Tensor grad_weights)",
    "unpool": "(Tensor centers, Tensor assignment) -> Tensor",
    "unpool_backward": "(Tensor grad, Tensor assignment, SymInt num_clusters) -> Tensor",
    "attention_received": "(Tensor q, Tensor k, float scale, Tensor? lse) -> Tensor",
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums for tokens of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def falling(values: torch.Tensor) -> torch.Tensor:
    """Indices (B, N) by falling value, ties by index. ONNX promises that of TopK, and has no stable sort."""
    if torch.onnx.is_in_onnx_export():
        values = values if values.is_floating_point() else values.to(torch.int32)
        return values.topk(values.shape[1], dim=1).indices
    return values.argsort(dim=1, descending=True, stable=True)


def farthest_start(x: torch.Tensor) -> torch.Tensor:
    """What an op's `init` is for the farthest-first start, which every op chooses itself: no token indices, (B, 0)."""
    return x.new_empty(x.shape[0], 0, dtype=torch.int64)


def is_farthest(init: torch.Tensor) -> bool:
    """Is this `init` the farthest-first start?"""
    return init.dtype == torch.int64 and init.shape[1] == 0


def _cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    b, n, d = x.shape
    acc = accumulate_dtype(x.dtype)
    return (
        x.new_empty(b, num_clusters, d),
        x.new_empty(b, n, dtype=torch.int64),
        x.new_empty(b, num_clusters, dtype=acc),
        x.new_empty(b, num_clusters, dtype=torch.int64),
        x.new_empty(b, dtype=acc),
    )


def _assign(x, centers, mask):
    return x.new_empty(x.shape[:2], dtype=torch.int64)


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


FAKES: dict[str, Callable[..., Any]] = {
    "kmeans": _cluster,
    "kmedoids": _cluster,
    "assign": _assign,
    "pool": _pool,
    "pool_backward": _pool_backward,
    "unpool": _unpool,
    "unpool_backward": _unpool_backward,
    "attention_received": _attention_received,
}


def more_images(function, info, in_dims, *args):
    """The rule of `torch.vmap` for a function of tensors that all begin with the images B: more images."""
    size = info.batch_size

    def fold(value, dim):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.reshape(size * value.shape[1], *value.shape[2:])

    out = function(*map(fold, args, in_dims))
    parts = out if isinstance(out, (tuple, list)) else (out,)
    parts = tuple(part.reshape(size, part.shape[0] // size, *part.shape[1:]) for part in parts)
    return (parts, (0,) * len(parts)) if isinstance(out, (tuple, list)) else (parts[0], 0)


def register_fakes(namespace: str, lib: torch.library.Library | None = None) -> None:
    """Register the fakes, and the rule of `torch.vmap`, for every op of `namespace` (once)."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=lib)
        op = getattr(getattr(torch.ops, namespace), name)
        torch.library.register_vmap(f"{namespace}::{name}", functools.partial(more_images, op), lib=lib)
