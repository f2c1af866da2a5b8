"""What bench/gpu_checks.py checks (backends with a path forced), on what tokens, and how: the record, bits, times."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import tokenpool_ext as tp
from bench import machine
from tokenpool_ext import loader

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGORITHMS = ("kmeans", "kmedoids")


@dataclass(frozen=True)
class Target:
    """A backend, and the path it is made to take (None: its planner's choice)."""

    backend: str
    path: str | None = None

    def __str__(self):
        return f"{self.backend}/{self.path or 'planned'}"

    @contextmanager
    def forced(self):
        variable = f"TOKENPOOL_EXT_{self.backend.upper()}_PATH"
        before = os.environ.pop(variable, None)
        if self.path:
            os.environ[variable] = self.path
        try:
            yield
        finally:
            os.environ.pop(variable, None)
            if before is not None:
                os.environ[variable] = before

    def run(self, algorithm, x, k, **given):
        with self.forced():
            return getattr(tp, algorithm)(x, k, backend=self.backend, **given)


class Place:
    """The device of the checks, and whether this is a rehearsal on a CPU (fewer repeats, smaller shapes)."""

    device = "cuda"
    rehearsal = False
    backend: str | None = None  # only this one


def on_device(tensor):
    return tensor.to(Place.device)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def blobs(b, n, d, dtype, seed=0, scale=1.0):
    """(b, n, d) tokens around n / 8 centers. Made on the CPU: what is copied to a GPU counts as written there."""
    generator = seeded(seed)
    middle = torch.randn(b, max(1, n // 8), d, generator=generator)
    pick = torch.randint(0, middle.shape[1], (b, n), generator=generator)
    x = torch.gather(middle, 1, pick[:, :, None].expand(-1, -1, d)) + 0.3 * torch.randn(b, n, d, generator=generator)
    return on_device((x * scale).to(dtype))


def starts(b, n, k):
    return on_device((torch.arange(k) * n // k).expand(b, k).contiguous())


def targets() -> list[Target]:
    """Every path of every backend of this device that can run here."""
    present = tp.backends()
    if Place.device == "cpu":
        return [Target("cpu"), Target("cpu", "gram"), Target("cpu", "direct")]
    found = []
    if present.get("cuda") == "ok":
        found += [Target("cuda"), *(Target("cuda", path) for path in loader.extension.cuda_paths)]
    if present.get("triton") == "ok":
        found += [Target("triton"), Target("triton", "gram"), Target("triton", "direct")]
    return [target for target in found if Place.backend in (None, target.backend)]


class Report:
    def __init__(self):
        self.records: list[dict] = []

    def check(self, name: str, body: Callable[[], object]) -> None:
        try:
            detail, ok = body(), True
        except Exception:
            detail, ok = traceback.format_exc(limit=4), False
        self.records.append({"check": name, "ok": ok, "detail": detail if isinstance(detail, dict) else str(detail)})
        print(("ok    " if ok else "FAIL  ") + name + ("" if detail is None else f": {detail}"), flush=True)

    def finish(self, path) -> int:
        failed = sum(not r["ok"] for r in self.records)
        if path:
            device = torch.cuda.get_device_name() if Place.device == "cuda" else "CPU (rehearsal)"
            record = {
                "device": device,
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "commit": machine.commit(),
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "command": " ".join(sys.argv),
                "failed": failed,
                "checks": self.records,
            }
            file = Path(path)
            runs = json.loads(file.read_text())["runs"] if file.exists() else []
            file.write_text(json.dumps({"runs": [*runs, record]}, indent=1) + "\n")
        print(f"{len(self.records)} checks, {failed} failed")
        return 1 if failed else 0


def require(condition, message):
    if not condition:
        raise RuntimeError(message)


def image(result, i: int | slice) -> list:
    """Of a result what belongs to image i, or to a slice of them."""
    return [t if t is None else t[i] for t in result]


def identical(a, b, what):
    for p, q in zip(a, b):
        if p is not None:
            same = (
                torch.equal(p, q) or torch.equal(p.isnan(), q.isnan()) and torch.equal(p.nan_to_num(), q.nan_to_num())
            )
            require(same, what)


def median_us(call, rounds: int = 9, calls: int = 20) -> float:
    """Median over rounds of the mean time of `calls` calls in a row."""
    times = []
    for _round_index in range(rounds + 2):
        if Place.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
        else:
            before = time.perf_counter()
            call()
            times.append((time.perf_counter() - before) * 1e6)
    return round(sorted(times[2:])[rounds // 2], 2)
