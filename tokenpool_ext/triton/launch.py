"""Starting kernels: try the plans in order, remember which one works, and turn failure into KernelUnavailable."""
from __future__ import annotations

import contextlib
from typing import Callable, NamedTuple

import torch

from .errors import KernelUnavailable
from .heuristics import GRID_LIMIT, Config


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: object  # the triton.JITFunction
    programs: int
    arguments: dict  # by name: tensors, runtime numbers and constexpr flags
    config: Config


# (kernel name, device, the plans' key) -> index of the first plan that worked; a failing plan is not tried twice.
_first_working: dict[tuple, int] = {}

# Called before every launch with (kernel name, config); what it raises is treated as the compiler's failure.
_fault: Callable[[str, Config], None] | None = None

# When a list: launches are appended to it and not run (see `record`).
_record: list[Launch] | None = None


@contextlib.contextmanager
def inject_fault(hook: Callable[[str, Config], None]):
    """For tests: within the block, `hook(kernel name, config)` runs before every launch and may raise."""
    global _fault
    before, _fault = _fault, hook
    known = dict(_first_working)
    try:
        yield
    finally:
        _fault = before
        _first_working.clear()
        _first_working.update(known)


@contextlib.contextmanager
def record():
    """Within the block nothing runs: the list it yields collects the launches.  Outputs are not computed, so tensors
    may be on the meta device; plans, launch counts and compilation can be checked for any shape without a GPU."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def _is_device_error(error: BaseException) -> bool:
    """True for what another plan or backend cannot cure and must not hide: a fault of the device, or no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    accelerator = getattr(torch, "AcceleratorError", None)
    if accelerator is not None and isinstance(error, accelerator):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("illegal memory access", "unspecified launch failure", "device-side assert",
                                         "misaligned address", "out of memory", "no cuda gpus", "ecc error"))


def launch(kernel, x: torch.Tensor, configs: list[Config], make: Callable[[Config], tuple[int, dict]]) -> None:
    """Run `kernel` on x's device with the first of `configs` that compiles and fits.

    make(config) -> (number of programs, runtime and constexpr arguments besides the config's own).
    Raises KernelUnavailable when no config can run; errors of the device pass through unchanged.
    """
    name = kernel.fn.__name__
    key = (name, x.device, str(configs))
    tried: list[str] = []
    cause: Exception | None = None
    for index in range(_first_working.get(key, 0), len(configs)):
        config = configs[index]
        programs, arguments = make(config)
        if programs <= 0:
            return
        if programs > GRID_LIMIT:
            raise KernelUnavailable(name, [f"{programs} programs exceed the grid limit {GRID_LIMIT}"])
        if _record is not None:
            _record.append(Launch(kernel, programs, arguments, config))
            return
        try:
            if _fault is not None:
                _fault(name, config)
            with torch.cuda.device_of(x):
                kernel[(programs,)](**arguments, **config)
        except Exception as error:  # compilers raise many types; see _is_device_error for what is let through
            if _is_device_error(error):
                raise
            tried.append(f"{config}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            cause = error
            continue
        _first_working[key] = index
        return
    _first_working[key] = 0
    raise KernelUnavailable(name, tried) from cause
