"""The fastest eager step of torch_eager.py under torch.compile (the step is compiled, the loop is Python)."""

from __future__ import annotations

import torch

from . import torch_eager

NAME = "torch.compile"
PACKAGE = "torch"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "one Lloyd step under torch.compile (Inductor, static shapes); compilation is not counted"
SLOW_SETUP = True

unavailable = torch_eager.unavailable
STEPS = {
    "one_hot": torch_eager.step_one_hot,
    "index_add": torch_eager.step_index_add,
    "scatter_add": torch_eager.step_scatter_add,
}


def variant(data):
    return torch_eager.pick(data)


def setup(data):
    torch._dynamo.reset()
    step = torch.compile(STEPS[variant(data)], dynamic=False)
    return lambda: torch_eager.run_steps(step, data.x32, data.centers, data.problem.iters)


def centers(result, data):
    return result
