"""`pytest --simulator`: the shared test bodies on the simulated CUDA backend, one target per path (see README.md)."""

from __future__ import annotations

import types

import pytest
import torch
from helpers import DTYPES, Target

import simulator
from tokenpool_ext.backends import REGISTRY, Backend
from tokenpool_ext.ops import SCHEMAS


class SimulatedTarget(Target):
    @property
    def dtypes(self):
        return [dtype for dtype in DTYPES if dtype != torch.float64]


def _refuses(op, x):
    if op == "assign":
        return "there is no CUDA kernel for it yet"
    return "the CUDA kernels take float32, bfloat16 and float16, not float64" if x.dtype == torch.float64 else None


def targets(paths: str) -> list[Target]:
    """A registered backend for each path of a list "resident,gram" ("all": each)."""
    library = simulator.build()
    chosen = simulator.PATHS if paths == "all" else tuple(paths.split(","))
    if not set(chosen) <= set(simulator.PATHS):
        raise pytest.UsageError(f"--simulator: expected paths among {','.join(simulator.PATHS)}, got {paths}")
    found = []
    for path in chosen:
        ops = simulator.Simulator(library, path=path)
        namespace = types.SimpleNamespace(**{op: getattr(ops, op) for op in SCHEMAS if hasattr(ops, op)})
        name = f"simulator_{path}"
        REGISTRY[name] = Backend(name, namespace, lambda: None, _refuses)
        found.append(SimulatedTarget(name))
    return found
