"""pytest plugin: the shared test bodies on the simulated CUDA backend, one target per path.

    PYTHONPATH=tests/cuda_sim python -m pytest -p sim_plugin tests/test_clustering.py

Registers the simulator in the backends' registry as cuda_sim_resident, cuda_sim_spread, cuda_sim_gram and
cuda_sim_streaming and makes them the only targets (TOKENPOOL_EXT_CUDA_SIM=spread,gram keeps some paths). float64 and
tests marked large are skipped.
"""

from __future__ import annotations

import os
import sys
import types

import pytest
import simulator
import torch


def pytest_configure(config):
    from helpers import DTYPES, Target

    from tokenpool_ext.backends import REGISTRY, Backend
    from tokenpool_ext.ops import SCHEMAS

    class SimulatedTarget(Target):
        @property
        def dtypes(self):
            return [dtype for dtype in DTYPES if dtype != torch.float64]

    conftest = sys.modules["conftest"]
    library = simulator.build()
    kept = [
        path
        for path in simulator.PATHS
        if path in (os.environ.get("TOKENPOOL_EXT_CUDA_SIM") or ",".join(simulator.PATHS)).split(",")
    ]
    targets = []
    for path in kept:
        ops = simulator.Simulator(library, path=path)
        namespace = types.SimpleNamespace(**{op: getattr(ops, op) for op in SCHEMAS})
        name = f"cuda_sim_{path}"
        REGISTRY[name] = Backend(name, namespace, lambda: None, _refuses)
        targets.append(SimulatedTarget(name))
    conftest.TARGETS[:] = targets


def _refuses(op, x):
    return "the CUDA kernels take float32, bfloat16 and float16, not float64" if x.dtype == torch.float64 else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("dtype") == torch.float64:
            item.add_marker(pytest.mark.skip(reason="no float64 on CUDA"))
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="too large for the simulator"))
