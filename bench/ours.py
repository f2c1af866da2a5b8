"""tokenpool_ext as a provider: the public functions, nothing else."""

from __future__ import annotations

import torch

from .machine import package_version

NAME = "tokenpool_ext"


def name(backend: str | None) -> str:
    return NAME if backend is None else f"{NAME}[{backend}]"


def version() -> str | None:
    try:
        import tokenpool_ext
    except ImportError:
        return None
    return getattr(tokenpool_ext, "__version__", None) or package_version("tokenpool_ext")


def variant(problem, backend: str | None) -> str | None:
    """What `explain` says about clustering this problem, in one line."""
    if problem.op not in ("kmeans", "kmedoids"):
        return None
    try:
        from tokenpool_ext import explain

        plan = explain(
            problem.B,
            problem.N,
            problem.K,
            problem.D,
            dtype=getattr(torch, problem.dtype),
            device=problem.device,
            num_iters=problem.iters,
            algorithm=problem.op,
        )
        return (f"[{backend}] " if backend else "") + " ".join(str(plan).split())
    except Exception as error:
        return f"explain failed: {type(error).__name__}: {error}"


def pooling_inputs(data):
    """Assignment (B, N) int64, mass (B, K) and a gradient (B, K, D) for timing a backward; made by one Lloyd step."""
    from .peers.torch_eager import assign

    p = data.problem
    assignment = assign(data.x32, data.centers)
    mass = torch.zeros(data.images, p.K, device=data.x.device).scatter_add_(
        1, assignment, torch.ones(assignment.shape, device=data.x.device)
    )
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(data.images, p.K, p.D, generator=generator).to(data.x.device, data.x.dtype)
    return assignment, mass, grad


def setup(data, backend: str | None = None):
    """-> call. Raises what the library raises (it becomes the recorded reason)."""
    import tokenpool_ext as tp

    p = data.problem
    if p.op == "attention_received":
        return lambda: tp.attention_received(data.x, data.k, backend=backend)
    if p.op == "pool_backward":
        from tokenpool_ext.backends import run, select

        assignment, _, grad = pooling_inputs(data)
        chain = select("pool", data.x, backend)
        pooled, mass = run(chain, "pool", data.x, assignment, None, p.K)
        return lambda: run(chain, "pool_backward", grad, data.x, pooled, assignment, None, mass)[
            0
        ]  # no autograd, as its peer
    cluster = getattr(tp, p.op)
    if p.mode == "forward":
        return lambda: cluster(data.x, p.K, init=data.init, num_iters=p.iters, backend=backend)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(data.images, p.K, p.D, generator=generator).to(data.x.device, data.x.dtype)
    x = data.x.detach().clone().requires_grad_(True)

    def call():
        result = cluster(x, p.K, init=data.init, num_iters=p.iters, backend=backend)
        torch.autograd.grad(result.centers, x, grad)
        return result

    return call


def centers(result, data):
    return result if isinstance(result, torch.Tensor) else result.centers.detach()
