"""Clocks: interleaved repeats, percentiles, peak memory. Knows nothing about clustering."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from pathlib import Path

PAUSE_S = 0.005  # lets another OpenMP runtime's spinning threads go to sleep between providers
L2_FLUSH_BYTES = 256 << 20  # larger than any GPU's L2


def percentile(values, q: float) -> float:
    """Linear interpolation between order statistics, q in [0, 100]."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("percentile of no values")
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values) -> dict:
    return {f"p{q}": percentile(values, q) for q in (20, 50, 80)}


class WallClock:
    """Host clock for CPU work."""

    def __init__(self, now=time.perf_counter):
        self.now = now

    def seconds(self, call, calls: int = 1) -> float:
        start = self.now()
        for _ in range(calls):
            call()
        return (self.now() - start) / calls


class CpuClock(WallClock):
    """CPU time of this process, all its threads: what one-threaded work costs even while others use the machine."""

    def __init__(self):
        super().__init__(time.process_time)


class CudaClock:
    """Device events; L2 is overwritten before every timed call."""

    def __init__(self):
        import torch

        self.torch = torch
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def seconds(self, call, calls: int = 1) -> float:
        total = 0.0
        for _ in range(calls):
            self.flush.random_(0, 7)
            start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            total += start.elapsed_time(stop) * 1e-3
        return total / calls


def interleave(
    calls: dict,
    *,
    repeats: dict | int,
    clock,
    calls_per_sample: dict | None = None,
    pause=PAUSE_S,
    deadline_s: float | None = None,
) -> tuple[dict, dict]:
    """Time every provider once a round, in rotating order, so that drift of the machine hits all alike.

    calls: provider -> callable. repeats: rounds, or provider -> rounds.
    Returns (provider -> list of seconds a call; None where the round was not run), (provider -> exception).
    A provider that raises is dropped from later rounds. After `deadline_s` no new round starts (at least 3 are run).
    """
    names = list(calls)
    rounds = {name: repeats if isinstance(repeats, int) else repeats[name] for name in names}
    samples: dict = {name: [] for name in names}
    errors: dict = {}
    began = time.perf_counter()
    for index in range(max(rounds.values(), default=0)):
        if deadline_s is not None and index >= 3 and time.perf_counter() - began > deadline_s:
            break
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if name in errors or index >= rounds[name]:
                samples[name].append(None)
                continue
            if pause:
                time.sleep(pause)
            try:
                samples[name].append(clock.seconds(calls[name], (calls_per_sample or {}).get(name, 1)))
            except Exception as error:  # the reason is recorded with the provider
                errors[name] = error
                samples[name].append(None)
    return samples, errors


def paired_ratios(samples, baseline) -> list[float]:
    """Ratios sample / baseline of the rounds in which both ran."""
    return [a / b for a, b in zip(samples, baseline) if a is not None and b]


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _trim() -> None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def peak_extra_bytes(call, device: str = "cpu") -> tuple[int | None, str, object]:
    """Run `call` once -> (bytes the process grew by at its peak, method, result). Outputs are included.

    CPU: the kernel's resident high-water mark, reset just before (free heap pages are returned first), so C++
    and BLAS buffers count too. CUDA: torch.cuda.max_memory_allocated.
    """
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "cuda.max_memory_allocated", result
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None, "not available: /proc/self/clear_refs is not writable", call()
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    if before is None or peak is None:
        return None, "not available: no /proc/self/status", result
    return max(0, peak - before), "VmHWM after reset - VmRSS", result
