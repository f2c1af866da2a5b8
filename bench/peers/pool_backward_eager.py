"""Backward of the pooled mean in PyTorch: scale the incoming gradient, gather one row a token."""

from __future__ import annotations

NAME = "torch gather"
PACKAGE = "torch"
OPS = ("pool_backward",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NATIVE_DTYPE = True
NOTE = "(grad / mass).gather(1, assignment): the formula, no autograd around it"


def unavailable(problem):
    return None


def setup(data):
    from ..ours import pooling_inputs

    assignment, mass, grad = pooling_inputs(data)

    def call():
        index = assignment[..., None].expand(-1, -1, data.problem.D)
        return (grad / mass.clamp(min=1)[..., None].to(grad.dtype)).gather(1, index)

    return call


def centers(result, data):
    return result
