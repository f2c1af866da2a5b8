"""Starting kernels: try the plans in order, remember which one works, and turn failure into KernelUnavailable.  The
kernels of an operator's first call are compiled side by side, ahead of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from .errors import KernelUnavailable
from .heuristics import GRID_LIMIT, Config, bucket


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

# Operators and kinds of arguments whose kernels `ahead` has seen to.
_seen: set[tuple] = set()

# The kernels that take longest to compile, longest first.
SLOW_TO_COMPILE = ("assign_kernel", "iterate_kernel", "update_kernel", "received_kernel", "gram_kernel")


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


def ahead(op: str, arguments: tuple, run: Callable, sample: Callable | None = None):
    """run(), after the kernels it launches have been compiled in parallel if no call of `op` with arguments of this
    kind came before.  The compiler gives up Python's lock, so with a core for each kernel this takes about as long as
    the slowest one.  sample(): launches the same kernels on less memory (nothing runs, but workspaces are made)."""
    kind = (op, *(_kind(argument) for argument in arguments))
    if kind not in _seen and not _interpreting() and _fault is None and getattr(_recorder, "launches", None) is None:
        _seen.add(kind)
        with record() as launches:
            (sample or run)()
        compile_together(launches)
    return run()


def compile_calls(calls: list[Callable]) -> None:
    """Compile what the calls launch, all of it side by side; nothing runs."""
    if not _interpreting() and _fault is None and getattr(_recorder, "launches", None) is None:
        with record() as launches:
            for call in calls:
                call()
        compile_together(launches)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kind(argument):
    """What of an argument may decide which kernels run: of a tensor's sizes the power of two, never the batch."""
    if not isinstance(argument, torch.Tensor):
        return bucket(argument, 1, GRID_LIMIT) if type(argument) is int else argument
    regular = argument.is_contiguous() and argument.data_ptr() % 16 == 0
    return argument.dtype, argument.device, regular, tuple(bucket(size, 1, GRID_LIMIT) for size in argument.shape[1:])


# CPython's ast.parse, which the compiler's front end calls all the time, is not safe in several threads (up to 3.12, at
# least, it raises SystemError).  The front end holds Python's lock anyway: taking turns in it costs nothing.
_front_end = threading.Lock()


@functools.cache
def one_at_a_time():
    """Triton's ASTSource, whose front end waits for its turn."""
    from triton.compiler import ASTSource

    class Source(ASTSource):
        def make_ir(self, *args, **kwargs):
            with _front_end:
                return super().make_ir(*args, **kwargs)

    return Source


def compile_together(launches: list[Launch]) -> None:
    """Compile the kernels of recorded launches in threads.  Whatever goes wrong here comes again, and is dealt with,
    where the kernel is launched; a Triton without asynchronous compilation compiles there too."""
    try:
        from triton import AsyncCompileMode
        from triton.runtime import driver

        source = one_at_a_time()
    except ImportError:
        return
    order = {name: place for place, name in enumerate(SLOW_TO_COMPILE)}
    launches = sorted(launches, key=lambda one: order.get(one.kernel.fn.__name__, len(order)))
    workers = max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    with (
        contextlib.suppress(Exception),
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        for one in launches:
            tensor = next(value for value in one.arguments.values() if isinstance(value, torch.Tensor))
            with torch.cuda.device_of(tensor), _front_end:
                one.kernel.device_caches[driver.active.get_current_device()]  # sets the attribute that follows
                one.kernel.ASTSource = source
                one.kernel.warmup(**one.arguments, **one.config, **OPTIONS, grid=(one.programs,))


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
