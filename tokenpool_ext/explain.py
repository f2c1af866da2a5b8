"""What would run, and why: `explain`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from . import loader
from .backends import ENVIRONMENT, REGISTRY, select
from .checks import FLOATING, check_choice, check_int
from .ops import accumulate_dtype
from .starts import STRATEGIES


@dataclass(frozen=True)
class Plan:
    """How one clustering would be computed. Prints as one readable paragraph.

    backend: its name; path: "gram", "direct" or a backend's own name for it; flops and bytes: of the whole batch
    (a multiply-add is 2 flops; bytes read and written at least once); workspace_bytes: memory beyond inputs and
    outputs; threads: CPU threads, or None on a GPU; launches: kernel launches, or None on a CPU; reason: why this path.
    """

    problem: str
    backend: str
    path: str
    flops: float
    bytes: float
    workspace_bytes: float
    threads: int | None
    launches: int | None
    reason: str
    refusals: str

    def __str__(self) -> str:
        how = f"{self.threads} threads" if self.threads is not None else f"{self.launches} launches"
        if self.threads is None and self.launches is None:
            how = "PyTorch operations"
        text = (
            f"{self.problem}: backend {self.backend!r}, {self.path} path, {self.flops / 1e6:.1f} Mflop, "
            f"{self.bytes / 1e6:.2f} MB moved at least, {self.workspace_bytes / 1e6:.2f} MB of workspace, {how}. "
            f"Why: {self.reason}."
        )
        return text + (f" Not chosen: {self.refusals}." if self.refusals else "")


def explain(
    B: int,
    N: int,
    K: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    num_iters: int = 5,
    init: str | None = None,
    algorithm: str = "kmeans",
    compute_capability: tuple[int, int] | None = None,
) -> Plan:
    """The plan for `kmeans` (or `kmedoids`) of B images of N tokens of D features into K clusters. Nothing is run.

    init: the name `kmeans` would get, or "centers" for a tensor of centers; the path depends on whether the start is
    tokens, centers (those, and K-Means' "bipartite") or chosen inside ("farthest"). algorithm: "kmeans" or "kmedoids".

    With `compute_capability`, e.g. (9, 0), the plan of the CUDA kernels on such a GPU, whether one is here or not.

    Raises:
        TypeError: a size that is no integer, or a compute_capability that is no pair of them.
        ValueError: a size below 1, K above N, an unknown init, algorithm or device, a dtype no backend takes, or a path
            in TOKENPOOL_EXT_CPU_PATH (.._CUDA_PATH) that there is not.
        RuntimeError: TOKENPOOL_EXT_BACKEND names a backend that cannot run this.
    """
    B, N, D = (check_int("explain", argument, value, 1) for argument, value in (("B", B), ("N", N), ("D", D)))
    K, num_iters = check_int("explain", "K", K, 1, N), check_int("explain", "num_iters", num_iters, 1)
    if dtype not in FLOATING:
        raise ValueError(f"explain: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")
    if init not in (None, *STRATEGIES, "centers"):
        raise ValueError(f"explain: init must be one of {', '.join(STRATEGIES)}, or centers, got {init!r}")
    check_choice("explain", "algorithm", algorithm, ("kmeans", "kmedoids"))
    medoids, farthest = algorithm == "kmedoids", init in (None, "farthest")
    given = init == "centers" or (init == "bipartite" and not medoids)
    if medoids and given:
        raise ValueError("explain: kmedoids starts from tokens, not from centers")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"explain: device must be a device of torch, such as 'cpu' or 'cuda', got {device!r}"
        ) from None
    if compute_capability is not None:
        if not isinstance(compute_capability, (tuple, list)) or len(compute_capability) != 2:
            raise TypeError(
                f"explain: compute_capability must be (major, minor), such as (9, 0), got {compute_capability!r}"
            )
        for part in compute_capability:
            check_int("explain", "compute_capability", part, 0)
        return _plan_cuda(B, N, K, D, dtype, num_iters, medoids, given, farthest, compute_capability, "")
    acc = accumulate_dtype(dtype)
    probe: Any = _Probe(device, dtype)
    chosen = select(algorithm, probe)[0]
    name = chosen.name
    better = list(REGISTRY)[: list(REGISTRY).index(name)]
    reasons = {other: REGISTRY[other].why_not(algorithm, probe) for other in better}
    asked = os.environ.get(ENVIRONMENT)
    otherwise = f"{ENVIRONMENT}={asked} asks for another" if asked else "not preferred on this device"
    refusals = "; ".join(f"{other} ({reason or otherwise})" for other, reason in reasons.items())
    item = dtype.itemsize
    moved = B * (N * D + K * D) * item + B * N * 8
    problem = f"{_problem(B, N, K, D, num_iters, dtype, medoids)} on {device}"
    common: dict[str, Any] = dict(problem=problem, backend=name, bytes=moved, refusals=refusals)
    if name == "cpu":
        if loader.extension is None:
            raise RuntimeError(f"explain: plans for the CPU need the compiled extension: {loader.ops_reason}")
        forced = _forced("TOKENPOOL_EXT_CPU_PATH", loader.extension.cpu_paths)
        plan = loader.extension.plan_cpu((N, K, D, num_iters, acc.itemsize, given, farthest, medoids, forced))
        threads = torch.get_num_threads()
        return Plan(
            path=plan["path"],
            flops=B * plan["flops"],
            workspace_bytes=plan["workspace_bytes"] * min(threads, B),
            threads=threads,
            launches=None,
            reason=("TOKENPOOL_EXT_CPU_PATH forces it; " if forced >= 0 else "")
            + plan["reason"]
            + ("; one image a thread" if B >= threads else "; all threads inside each image"),
            **common,
        )
    if name == "reference":
        return Plan(
            path="direct",
            flops=2.0 * B * num_iters * 2 * N * K * D,
            workspace_bytes=acc.itemsize * B * (2 * N * D + N * K),
            threads=None,
            launches=None,
            reason="plain PyTorch: products with the centers, and sums through a one-hot product",
            **common,
        )
    if name == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return _plan_cuda(
            B,
            N,
            K,
            D,
            dtype,
            num_iters,
            medoids,
            given,
            farthest,
            (gpu.major, gpu.minor),
            refusals,
            gpu.multi_processor_count,
        )
    found = chosen.ops.explain(B, N, K, D, num_iters, dtype)
    return Plan(
        path=found["path"],
        flops=found["flops"],
        workspace_bytes=found["workspace_bytes"],
        threads=None,
        launches=found["launches"],
        reason=found["reason"],
        **common,
    )


def _plan_cuda(
    B: int,
    N: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    num_iters: int,
    medoids: bool,
    given: bool,
    farthest: bool,
    capability: tuple[int, int],
    refusals: str,
    multiprocessors: int = 0,
) -> Plan:
    if loader.extension is None:
        raise ValueError(f"explain: plans for CUDA need the compiled extension: {loader.ops_reason}")
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}.get(dtype)
    if code is None:
        raise ValueError(f"explain: the CUDA kernels take float32, bfloat16 and float16, got {dtype}")
    major, minor = capability
    paths = loader.extension.cuda_paths
    forced = _forced("TOKENPOOL_EXT_CUDA_PATH", paths)
    found = loader.extension.plan_cuda(
        (B, N, D, K, num_iters, code, medoids, given, major, minor, multiprocessors, 0, forced, farthest, False)
    )
    return Plan(
        problem=f"{_problem(B, N, K, D, num_iters, dtype, medoids)} on a GPU of compute capability {major}.{minor}",
        backend="cuda",
        path=found["path"],
        flops=found["flops"],
        bytes=found["bytes"],
        workspace_bytes=found["workspace_bytes"],
        threads=None,
        launches=found["launches"],
        reason=("TOKENPOOL_EXT_CUDA_PATH forces it; " if forced == paths.index(found["path"]) else "")
        + found["reason"],
        refusals=refusals,
    )


def _forced(variable: str, paths: list[str]) -> int:
    """The index of the path that this environment variable asks for, or -1."""
    path = os.environ.get(variable)
    if path and path not in paths:
        raise ValueError(f"explain: {variable} must be one of {', '.join(paths)}, got {path}")
    return paths.index(path) if path else -1


def _problem(B: int, N: int, K: int, D: int, num_iters: int, dtype: torch.dtype, medoids: bool) -> str:
    iterations = f"{num_iters} iterations" + (" of K-Medoids" if medoids else "")
    return f"{B} x {N} tokens x {D} features -> {K} clusters, {iterations}, {str(dtype).split('.')[-1]}"


class _Probe:
    """As much of a tensor as a backend asks about before it runs."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.dtype = dtype
        self.is_cpu, self.is_cuda = device.type == "cpu", device.type == "cuda"
