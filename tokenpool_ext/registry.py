"""Which code runs an operator: an ordered registry, every refusal with its reason.

    cuda       hand-written CUDA kernels (torch.ops.tokenpool_ext, library _cuda)
    triton     portable GPU kernels (tokenpool_ext.triton)
    cpu        hand-written C++ kernels (torch.ops.tokenpool_ext, library _C)
    reference  plain PyTorch (tokenpool_ext.reference), on any device

With `backend=None` the first that can run is taken, and a kernel that fails to compile on a device hands over to the
next with one warning. A backend asked for by name never falls back. TOKENPOOL_EXT_BACKEND=name asks for every call.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import loader, reference, triton  # which imports Triton itself only when asked
from .errors import KernelUnavailable

OPS = ("kmeans", "kmedoids", "pool", "pool_backward", "unpool", "unpool_backward", "attention_received")
ENVIRONMENT = "TOKENPOOL_EXT_BACKEND"


class Backend:
    """A name, a reason for being absent, a check of one problem, and the operators."""

    def __init__(
        self, name: str, unavailable: Callable, refuses: Callable, ops: Callable, starts: tuple[str, ...] = ()
    ):
        self.name = name
        self.unavailable = unavailable  # () -> reason or None
        self.refuses = refuses  # (op, x) -> reason or None
        self.ops = ops  # () -> namespace with one function per op
        self.starts = starts  # strategies of `init` that kmeans and kmedoids choose themselves when given no indices

    def can_run(self, op: str, x: Tensor) -> str | None:
        """None when this backend can run `op` on tokens like `x`, else the reason why not."""
        return self.unavailable() or self.refuses(op, x)


def _cuda_unavailable() -> str | None:
    if loader.cuda_reason:
        return loader.cuda_reason
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _cuda_refuses(op: str, x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"the tokens are on {x.device}, not on a CUDA device"
    if x.dtype == torch.float64:
        return "the CUDA kernels take float32, bfloat16 and float16, not float64"
    return None


def _cpu_unavailable() -> str | None:
    return loader.extension_reason


def _cpu_refuses(op: str, x: Tensor) -> str | None:
    return None if x.is_cpu else f"the tokens are on {x.device}, not on the CPU"


REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", _cuda_unavailable, _cuda_refuses, lambda: torch.ops.tokenpool_ext, starts=("farthest",)),
        Backend("triton", triton.unavailable, triton.can_run, lambda: triton, starts=("farthest",)),
        Backend("cpu", _cpu_unavailable, _cpu_refuses, lambda: torch.ops.tokenpool_ext, starts=("farthest",)),
        Backend("reference", lambda: None, lambda op, x: None, lambda: reference, starts=("farthest",)),
    )
}


def backends() -> dict[str, str]:
    """Every backend by name: "ok", or the reason why it cannot run here. The order is the order of preference."""
    return {name: backend.unavailable() or "ok" for name, backend in REGISTRY.items()}


def select(op: str, x: Tensor, name: str | None = None) -> tuple[str, ...]:
    """The backends to try for `op` on tokens like `x`, best first; exactly one when asked for by name.

    Raises:
        ValueError: `name` (or TOKENPOOL_EXT_BACKEND) is not a backend.
        RuntimeError: it is, but cannot run this; the message has the reason.
    """
    source = "backend"
    if name is None and ENVIRONMENT in os.environ:
        name = os.environ[ENVIRONMENT] or None
        source = ENVIRONMENT
    if name is None:
        return _willing(op, x)
    if not isinstance(name, str):
        raise TypeError(f"{op}: backend must be a string or None, got {type(name).__name__}")
    if name not in REGISTRY:
        raise ValueError(f"{op}: {source} must be one of {', '.join(map(repr, REGISTRY))}, got {name!r}")
    reason = REGISTRY[name].can_run(op, x)
    if reason:
        raise RuntimeError(
            f"{op}: {source}={name!r} cannot run this: {reason}. Leave it out to have a backend chosen, or run"
            " 'python -m tokenpool_ext info'"
        )
    return (name,)


def _willing(op: str, x: Tensor) -> tuple[str, ...]:
    if x.is_cpu and REGISTRY["cpu"].can_run(op, x) is None:
        return ("cpu",)
    device = x.device.type
    if device == "cpu":
        order = ("triton", "reference") if os.environ.get("TRITON_INTERPRET") == "1" else ("reference",)
    elif device == "cuda":
        order = ("cuda", "triton", "reference")
    else:
        order = ("triton", "reference") if device == "xpu" else ("reference",)
    return tuple(name for name in order if REGISTRY[name].can_run(op, x) is None)


_NOTHING = contextlib.nullcontext()


def no_autocast(x: Tensor):
    """A context in which the dtype of the inputs rules, also under autocast."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return _NOTHING
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False)


_warned = set()


def call(chain: tuple[str, ...], op: str, *args):
    """Run `op` on the first backend of `chain` whose kernel works, warning once for each that does not."""
    for name in chain[:-1]:
        try:
            return _run(name, op, args)
        except KernelUnavailable as error:
            if (name, op) not in _warned:
                _warned.add((name, op))
                warnings.warn(
                    f"tokenpool_ext: {op} cannot run on backend {name!r} here ({error}); using "
                    f"{chain[chain.index(name) + 1]!r}",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return _run(chain[-1], op, args)


def _run(name: str, op: str, args: tuple):
    try:
        return getattr(REGISTRY[name].ops(), op)(*args)
    except RuntimeError as error:  # the stable ABI loses the type, by which callers know that a smaller batch may do
        if name == "cuda" and "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise
