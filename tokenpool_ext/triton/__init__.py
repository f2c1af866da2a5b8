"""The Triton backend: the same operators as every backend, as torch.library ops in namespace `tokenpool_ext_triton`.

Importing this package does not import Triton; the kernels are imported by the first call.  Map of the package:
heuristics.py (paths, tiles, plans) -> launch.py (faults) -> clustering.py, segments.py (host side) -> kernels in
prepare.py, start.py, gram.py, exact.py, direct.py, finish.py, pooling.py, attention.py, with their shared functions in
nearest.py, lists.py and device.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

import torch

from ..ops import SCHEMAS, register_fakes
from .errors import KernelUnavailable

__all__ = [
    "KernelUnavailable",
    "attention_received",
    "explain",
    "kmeans",
    "assign",
    "kmedoids",
    "plan",
    "pool",
    "pool_backward",
    "unavailable",
    "unpool",
    "unpool_backward",
    "warmup",
    "why_not",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Several kernels hand values from thread to thread through global memory, across a barrier of the block
# (tl.debug_barrier).  CUDA's barrier orders such accesses by definition.  On AMD this version of Triton, whose barrier
# was read in the machine code for gfx942 and gfx1100, or a later one is asked for; Intel's GPUs are refused until
# somebody has looked.
BARRIER_VERSION = (3, 9)


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """None, or why this backend cannot run in this process."""
    try:
        import triton
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {error}); pip install triton"
    if not hasattr(triton, "jit"):
        return f"the module 'triton' at {getattr(triton, '__file__', '?')} is not the Triton compiler"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def why_not(op: str, x: torch.Tensor, *args, **kwargs) -> str | None:
    """None, or why `op` cannot run on tensors like `x` (tokens, centers or q; only its device and dtype are read)."""
    if op not in SCHEMAS:
        return f"triton has no operator {op!r}; it has {', '.join(SCHEMAS)}"
    if x.dtype not in DTYPES:
        return f"triton computes float32, float16 and bfloat16, got {x.dtype}"
    if x.device.type != "cuda" and not (interpreting() and x.device.type == "cpu"):
        return f"triton needs a tensor on a CUDA or ROCm device, got one on {x.device}"
    return unavailable() or _unproven(x.device)


def _unproven(device: torch.device) -> str | None:
    """Why this GPU is refused, or None."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        import triton

        version = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in triton.__version__.split(".")[:2])
        needed = ".".join(map(str, BARRIER_VERSION))
        return None if version >= BARRIER_VERSION else f"on ROCm triton >= {needed} is needed, got {triton.__version__}"
    if (properties.major, properties.minor) < (7, 5):
        return f"triton supports compute capability 7.5 and later, got {properties.major}.{properties.minor}"
    return None


def plan(
    B: int, N: int, K: int, D: int, *, dtype=torch.float32, device="cuda", num_iters: int = 5, per_image: bool = False
):
    """What kmeans would do for this problem: a heuristics.Plan, printable, with path, launches, bytes and tiles.
    per_image: for a tensor num_clusters, whose largest is K."""
    from . import heuristics

    device = torch.device(device)
    where = heuristics.UNKNOWN
    if device.type == "cuda" and torch.cuda.is_available():
        where = heuristics.device_of(torch.empty(0, device=device))
    return heuristics.plan(B, N, K, D, dtype, num_iters, where, per_image=per_image)


def explain(B: int, N: int, K: int, D: int, num_iters: int, dtype: torch.dtype) -> dict:
    """The plan as tokenpool_ext.explain wants it: path, flops, workspace_bytes, launches (all chunks), reason."""
    found = plan(B, N, K, D, dtype=dtype, num_iters=num_iters)
    chunks = -(-B // found.images_per_chunk)
    launches = found.launches_before + found.launches_per_iteration * num_iters + found.launches_after
    return dict(
        path=found.path,
        flops=float(B * found.flops),
        workspace_bytes=float(found.workspace_bytes),
        launches=chunks * launches,
        reason=f"{found.reason}; {chunks} chunk{'s' * (chunks > 1)} of the batch; tiles not tuned on a GPU",
    )


# ---- operators ---------------------------------------------------------------------------------------------------


def _check(op: str, x: torch.Tensor, **others) -> None:
    """Memory-safety checks: device, dtype and shape of everything a kernel dereferences."""
    reason = why_not(op, x)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    for name, (tensor, shape, dtypes) in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, got {tensor.device}; move it there")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{op}: {name} must be one of {dtypes}, got {tensor.dtype}; convert it")


_F32, _I64 = (torch.float32,), (torch.int64,)


def _check_cluster(op, x, weights, mask, counts, init, K, num_iters):
    if x.dim() != 3 or K < 1 or num_iters < 1:
        raise ValueError(
            f"{op}: expected x (B, N, D), num_clusters >= 1 and num_iters >= 1, got "
            f"{tuple(x.shape)=}, {K=}, {num_iters=}"
        )
    B, N, D = x.shape
    centers = init.is_floating_point() and op == "kmeans"
    indices = (B, 0) if tuple(init.shape) == (B, 0) else (B, K)  # (B, 0): farthest-first, chosen here
    _check(
        op,
        x,
        weights=(weights, (B, N), _F32),
        mask=(mask, (B, N), (torch.bool,)),
        counts=(counts, (B,), _I64),
        init=(init, (B, K, D) if centers else indices, _F32 if centers else _I64),
    )


def _kmeans(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    _check_cluster("kmeans", x, weights, mask, counts, init, num_clusters, num_iters)
    from .clustering import cluster

    return cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, False)


def _kmedoids(x, weights, mask, counts, init, num_clusters, num_iters, sort):
    _check_cluster("kmedoids", x, weights, mask, counts, init, num_clusters, num_iters)
    from .clustering import cluster

    return cluster(x, weights, mask, counts, init, num_clusters, num_iters, sort, True)


def _assign(x, centers, mask):  # no kernel of its own yet
    from ..reference import assign as composed

    return composed(x, centers, mask)


def _pool(x, assignment, weights, num_clusters):
    _check("pool", x, assignment=(assignment, tuple(x.shape[:2]), _I64), weights=(weights, tuple(x.shape[:2]), _F32))
    from .segments import segment

    return segment(x, assignment, weights, num_clusters, True)


def _pool_backward(grad_centers, x, centers, assignment, weights, mass):
    B, N, D = x.shape
    K = centers.shape[1]
    _check(
        "pool_backward",
        x,
        grad_centers=(grad_centers, (B, K, D), DTYPES),
        centers=(centers, (B, K, D), DTYPES),
        assignment=(assignment, (B, N), _I64),
        weights=(weights, (B, N), _F32),
        mass=(mass, (B, K), _F32),
    )
    from .segments import pool_backward as run

    return run(grad_centers, x, centers, assignment, weights, mass)


def _unpool(centers, assignment):
    _check("unpool", centers, assignment=(assignment, (centers.shape[0], assignment.shape[-1]), _I64))
    from .segments import unpool as run

    return run(centers, assignment)


def _unpool_backward(grad, assignment, num_clusters):
    _check("unpool_backward", grad, assignment=(assignment, tuple(grad.shape[:2]), _I64))
    from .segments import segment

    return segment(grad, assignment, None, num_clusters, False)[0]


def _attention_received(q, k, scale, lse):
    B, H, Nq, d = q.shape
    _check("attention_received", q, k=(k, (B, H, k.shape[-2], d), DTYPES), lse=(lse, (B, H, Nq), _F32))
    from .segments import attention_received as run

    return run(q, k, scale, lse)


def _register() -> torch.library.Library:
    library = torch.library.Library("tokenpool_ext_triton", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, globals()[f"_{name}"], "CompositeExplicitAutograd")
    register_fakes("tokenpool_ext_triton", library)
    return library


_LIBRARY = _register()
kmeans = torch.ops.tokenpool_ext_triton.kmeans
kmedoids = torch.ops.tokenpool_ext_triton.kmedoids
assign = torch.ops.tokenpool_ext_triton.assign
pool = torch.ops.tokenpool_ext_triton.pool
pool_backward = torch.ops.tokenpool_ext_triton.pool_backward
unpool = torch.ops.tokenpool_ext_triton.unpool
unpool_backward = torch.ops.tokenpool_ext_triton.unpool_backward
attention_received = torch.ops.tokenpool_ext_triton.attention_received


def warmup(
    shapes: Iterable[tuple[int, int, int]],
    *,
    dtypes=(torch.bfloat16,),
    num_iters: int = 5,
    device="cuda",
    weighted: bool = True,
    farthest: bool = True,
    masked: bool = False,
    counts: bool = False,
    centers: bool = False,
    backward: bool = True,
) -> None:
    """Compile the kernels that kmeans, kmedoids, pool and unpool need for `shapes`, so that the first real call, also
    that of the layers, compiles nothing.  Sorted and unsorted, and with `backward` the gradients.

    shapes: (N, K, D) triples; a leading batch size (B, N, K, D) is accepted and ignored, for no kernel depends on it.
    weighted: for calls with weights (scores, sizes); False: for calls without.
    farthest: for the default start, which is chosen in a kernel of its own; False: for others.
    masked, counts, centers: also for calls with a mask, with a tensor num_clusters, with given centers (K-Means).
    Not covered: attention_received, and tokens that do not start at a multiple of 16 bytes.

    Runs each once on one image of `device`.  Sizes are runtime values, so shapes of the same feature bucket (16, 32,
    64, 128 and above) and path share their kernels.  Raises KernelUnavailable when a kernel cannot run.
    """
    for shape in shapes:
        for dtype in dtypes:
            N, K, D = tuple(shape)[-3:]
            calls = _warmup_calls(
                N, K, D, dtype, num_iters, device, weighted, farthest, masked, counts, centers, backward
            )
            for call in calls:
                call()


def _warmup_calls(N, K, D, dtype, num_iters, device, weighted, farthest, masked, counts, centers, backward) -> list:
    """Functions of no arguments that together launch every kernel."""
    x = torch.randn((1, N, D), device=device, dtype=torch.float32).to(dtype)
    weights = torch.ones((1, N), device=device, dtype=torch.float32) if weighted else None
    labels = torch.arange(N, device=device).remainder(K)[None]
    pooled, mass = (
        torch.zeros((1, K, D), device=device, dtype=dtype),
        torch.ones((1, K), device=device, dtype=torch.float32),
    )
    init = torch.arange(0 if farthest else K, device=device).remainder(N)[None]
    masks = (None, *((torch.ones((1, N), device=device, dtype=torch.bool),) if masked else ()))
    numbers = (None, *((torch.full((1,), K, device=device),) if counts else ()))
    starts = [(kmeans, init), (kmedoids, init)] + ([(kmeans, pooled.float())] if centers else [])
    calls = [
        functools.partial(run, x, weights, mask, number, start, K, num_iters, sort)
        for mask in masks
        for number in numbers
        for run, start in starts
        for sort in (False, True)
    ]
    calls += [functools.partial(pool, x, labels, weights, K), functools.partial(unpool, pooled, labels)]
    if backward:
        calls += [
            functools.partial(pool_backward, pooled, x, pooled, labels, weights, mass),
            functools.partial(unpool_backward, x, labels, K),
        ]
    return calls
