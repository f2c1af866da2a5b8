"""Starting kernels: try the plans in order, remember which one works, and turn failure into KernelUnavailable."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .errors import KernelUnavailable
from .heuristics import GRID_LIMIT, Config


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: object  # the triton.JITFunction
    programs: int
    arguments: dict  # by name: tensors, runtime numbers and constexpr flags
    config: Config


# _variant(...) -> index of the first plan that worked, where it is not 0; a failing plan is not tried twice.
_first_working: dict[tuple, int] = {}

# _variant(...) -> what each plan said, where none compiled and fitted: they are not tried again in this process.
_unusable: dict[tuple, list[str]] = {}

# Called before every launch with (kernel name, config); what it raises is treated as the compiler's failure.
_fault: Callable[[str, Config], None] | None = None

# Of every compilation, whatever the default of a Triton version: a * b + c may be one operation.
OPTIONS = dict(enable_fp_fusion=True)

# Per thread, `launches`: when a list, launches are appended to it and not run (see `record`).
_recorder = threading.local()


@contextlib.contextmanager
def inject_fault(hook: Callable[[str, Config], None]):
    """For tests: within the block, `hook(kernel name, config)` runs before every launch and may raise."""
    global _fault
    before, _fault = _fault, hook
    known = dict(_first_working), dict(_unusable)
    try:
        yield
    finally:
        _fault = before
        memory: Any
        for memory, old in zip((_first_working, _unusable), known):
            memory.clear()
            memory.update(old)


@contextlib.contextmanager
def record():
    """Within the block nothing runs: the list it yields collects the launches.  Outputs are not computed, so tensors
    may be on the meta device; plans, launch counts and compilation can be checked for any shape without a GPU."""
    before = getattr(_recorder, "launches", None)
    _recorder.launches = []
    try:
        yield _recorder.launches
    finally:
        _recorder.launches = before


def _is_device_error(error: BaseException) -> bool:
    """True for what another plan or backend cannot cure and must not hide: a fault of the device, or no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    accelerator = getattr(torch, "AcceleratorError", None)
    if accelerator is not None and isinstance(error, accelerator):
        return True
    text = str(error).lower()
    return any(
        sign in text
        for sign in (
            "illegal memory access",
            "unspecified launch failure",
            "device-side assert",
            "misaligned address",
            "out of memory",
            "no cuda gpus",
            "ecc error",
        )
    )


def _is_permanent(error: BaseException) -> bool:
    """True for what the same plan will say again: it does not compile, or does not fit.  Not a full disk or a killed
    ptxas, say."""
    from triton.errors import TritonError
    from triton.runtime.errors import PTXASError

    said = str(error)
    if isinstance(error, PTXASError) and ("error code -" in said or "no space left" in said.lower()):
        return False
    return isinstance(error, TritonError) or "out of resource" in said or "PassManager::run failed" in said


def _variant(kernel, x: torch.Tensor, configs: list[Config], arguments: dict) -> tuple:
    """What decides whether plans compile and fit: kernel, device, the plans, dtypes and constexpr flags."""
    kinds = (
        value.dtype if isinstance(value, torch.Tensor) else value if isinstance(value, (bool, str)) else None
        for value in arguments.values()
    )
    return kernel.fn.__name__, x.device, str(configs), tuple(kinds)


def launch(kernel, x: torch.Tensor, configs: list[Config], make: Callable[[Config], tuple[int, dict]]) -> None:
    """Run `kernel` on x's device with the first of `configs` that compiles and fits.

    make(config) -> (number of programs, runtime and constexpr arguments besides the config's own).
    Raises KernelUnavailable when no config can run; errors of the device pass through unchanged.
    """
    name = kernel.fn.__name__
    tried: list[str] = []
    cause: Exception | None = None
    permanent, start, key = True, 0, None
    if _first_working or _unusable:  # something has failed in this process: making the key is not free
        key = _variant(kernel, x, configs, make(configs[0])[1])
        start = _first_working.get(key, 0)
    for config in configs[start:]:
        programs, arguments = make(config)
        if programs <= 0:
            return
        if programs > GRID_LIMIT:
            raise KernelUnavailable(name, [f"{programs} programs exceed the grid limit {GRID_LIMIT}"])
        recorded = getattr(_recorder, "launches", None)
        if recorded is not None:
            recorded.append(Launch(kernel, programs, arguments, config))
            return
        if key in _unusable:
            raise KernelUnavailable(name, _unusable[key])
        try:
            if _fault is not None:
                _fault(name, config)
            with torch.cuda.device_of(x):
                kernel[(programs,)](**arguments, **config, **OPTIONS)
        except Exception as error:  # compilers raise many types; see _is_device_error for what is let through
            if _is_device_error(error):
                raise
            tried.append(f"{config}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            cause = error
            permanent = permanent and _is_permanent(error)
            continue
        if tried and permanent:
            _first_working[_variant(kernel, x, configs, arguments)] = start + len(tried)
        return
    key = _variant(kernel, x, configs, arguments)
    if permanent:
        _first_working.pop(key, None)
        _unusable[key] = tried
    raise KernelUnavailable(name, tried) from cause
