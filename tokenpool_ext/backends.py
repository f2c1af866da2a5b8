"""Which code runs an operator: an ordered registry, every refusal with its reason.

    cuda       hand-written CUDA kernels (torch.ops.tokenpool_ext, library _cuda)
    triton     portable GPU kernels (tokenpool_ext.triton)
    cpu        hand-written C++ kernels (torch.ops.tokenpool_ext, library _ops)
    reference  plain PyTorch (tokenpool_ext.reference), on any device

With `backend=None` the first that can run is taken, and a kernel that fails to compile on a device hands over to the
next with one warning. A backend asked for by name never falls back. TOKENPOOL_EXT_BACKEND=name asks for every call.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import loader, onnx, reference, triton  # which imports Triton itself only when asked
from .errors import KernelUnavailable

ENVIRONMENT = "TOKENPOOL_EXT_BACKEND"


class Backend:
    """A name, the operators, a reason for being absent, and one for refusing a problem.

    ops: a namespace with one function per op of ops.py. absent: () -> reason or None. refuses: (op, x) -> reason or
    None.
    """

    def __init__(
        self, name: str, ops: Any, absent: Callable[[], str | None], refuses: Callable[[str, Tensor], str | None]
    ) -> None:
        self.name = name
        self.ops = ops
        self.absent = absent
        self.refuses = refuses

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"

    def why_not(self, op: str, x: Tensor) -> str | None:
        """None when this backend can run `op` on tokens like `x`, else the reason why not."""
        return self.absent() or self.refuses(op, x)


def _cuda_absent() -> str | None:
    if loader.cuda_reason:
        return loader.cuda_reason
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _cuda_refuses(op: str, x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"the tokens are on {x.device}, not on a CUDA device"
    if op == "assign":
        return "there is no CUDA kernel for it yet"
    if x.dtype == torch.float64:
        return "the CUDA kernels take float32, bfloat16 and float16, not float64"
    return None


def _cpu_absent() -> str | None:
    return loader.ops_reason


def _cpu_refuses(op: str, x: Tensor) -> str | None:
    return None if x.is_cpu else f"the tokens are on {x.device}, not on the CPU"


REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", torch.ops.tokenpool_ext, _cuda_absent, _cuda_refuses),
        Backend("triton", triton, triton.unavailable, triton.why_not),
        Backend("cpu", torch.ops.tokenpool_ext, _cpu_absent, _cpu_refuses),
        Backend("reference", reference, lambda: None, lambda op, x: None),
    )
}

_CPU = (REGISTRY["cpu"],)
_ONNX = Backend("onnx", onnx, lambda: None, lambda op, x: None)  # in an export to ONNX, whoever is asked for


def backends() -> dict[str, str]:
    """Every backend by name: "ok", or the reason why it cannot run here. The order is the order of preference."""
    return {name: backend.absent() or "ok" for name, backend in REGISTRY.items()}


def select(op: str, x: Tensor, name: str | None = None) -> tuple[Backend, ...]:
    """The backends to try for `op` on tokens like `x`, best first; exactly one when asked for by name.

    Raises:
        ValueError: `name` (or TOKENPOOL_EXT_BACKEND) is not a backend.
        RuntimeError: it is, but cannot run this; the message has the reason.
    """
    source = "backend"
    if name is None and ENVIRONMENT in os.environ:
        name = os.environ[ENVIRONMENT] or None
        source = ENVIRONMENT
    if torch.onnx.is_in_onnx_export():
        return (_ONNX,)
    if name is None:
        return _CPU if x.is_cpu and loader.ops_reason is None else _willing(op, x)
    if not isinstance(name, str):
        raise TypeError(f"{op}: backend must be a string or None, got {type(name).__name__}")
    if name not in REGISTRY:
        raise ValueError(f"{op}: {source} must be one of {', '.join(map(repr, REGISTRY))}, got {name!r}")
    reason = REGISTRY[name].why_not(op, x)
    if reason:
        raise RuntimeError(
            f"{op}: {source}={name!r} cannot run this: {reason}. Leave it out to have a backend chosen, or run"
            " 'python -m tokenpool_ext info'"
        )
    return (REGISTRY[name],)


def _willing(op: str, x: Tensor) -> tuple[Backend, ...]:
    device = x.device.type
    order: tuple[str, ...]
    if device == "cpu":
        order = ("triton", "reference") if os.environ.get("TRITON_INTERPRET") == "1" else ("reference",)
        if order == ("reference",) and not torch.compiler.is_compiling() and ("cpu", "") not in _warned:
            _warned.add(("cpu", ""))
            warnings.warn(
                f"tokenpool_ext: calls on the CPU run on the slow backend 'reference': {loader.ops_reason}",
                RuntimeWarning,
                stacklevel=4,
            )
    elif device == "cuda":
        order = ("cuda", "triton", "reference")
    else:
        order = ("triton", "reference") if device == "xpu" else ("reference",)
    return tuple(REGISTRY[name] for name in order if REGISTRY[name].why_not(op, x) is None)


_warned: set[tuple[str, str]] = set()
_NOTHING = contextlib.nullcontext()


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which the dtype of the inputs rules, also under autocast."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return _NOTHING
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False)


def run(chain: tuple[Backend, ...], op: str, *args: Any) -> Any:
    """Run `op` on the first backend of `chain` whose kernel works, warning once for each that does not."""
    last = len(chain) - 1
    for place, backend in enumerate(chain):
        try:
            return getattr(backend.ops, op)(*args)
        except KernelUnavailable as error:
            if place == last:
                raise
            if (backend.name, op) not in _warned:
                _warned.add((backend.name, op))
                warnings.warn(
                    f"tokenpool_ext: {op} cannot run on backend {backend.name!r} here ({error}); using "
                    f"{chain[place + 1].name!r}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        except RuntimeError as error:
            _say_what_it_is(error, backend)
            raise


def _say_what_it_is(error: RuntimeError, backend: Backend) -> None:
    """The stable ABI loses the types of exceptions. Raise those of another type by which callers tell them apart."""
    text = str(error)
    if backend.name == "cuda" and "out of memory" in text and not isinstance(error, torch.OutOfMemoryError):
        raise torch.OutOfMemoryError(text) from None
    if backend.name == "cpu" and "TOKENPOOL_EXT_CPU_" in text:
        raise ValueError(text) from None
    if backend.name == "cpu" and loader.extension is not None and "tokenpool_ext: interrupted" in text:
        raise loader.extension.take_interruption() or error from None
