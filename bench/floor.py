"""How fast could it be: this machine's peak rates, measured in the same run, and the work a problem needs at least.

CPU rates: a register-only multiply-add loop and a copy (bench/native/rates.cpp, compiled with g++ at first use; CPU
time of
each thread), and the library's GEMM. GPU rates: a large GEMM and a large copy by events (there is no register loop).
bfloat16 and float16 on a CPU without their own dot products run at the float32 multiply-add rate, and are floored so.

Floor of a problem, an image: the larger of
- flops / peak rate: gram N^2 D (the lower triangle of x x^T: half of 2 N^2 D), or direct 2 N K D (one product with the
  centers; of later iterations bounds may spare all), the cheaper;
- bytes / copy rate: tokens read once, centers and labels written once.
attention_received: 4 H N^2 d flops without a given log-sum-exp (two passes over q k^T), and read q, k once.
pool_backward: read the gradient of the centers and the labels, write the gradient of the tokens.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from pathlib import Path

import torch

from . import timing
from .machine import cpu_flags

SOURCE = Path(__file__).resolve().parent / "native" / "rates.cpp"
CACHE = Path(__file__).resolve().parent / ".cache"


def compiler_flags(flags: set[str]) -> list[str]:
    if "avx512f" in flags:
        return ["-mavx512f", "-mavx2", "-mfma"]
    return ["-mavx2", "-mfma"] if {"avx2", "fma"} <= flags else []


def build() -> Path:
    """Compile rates.cpp unless this source and these flags were compiled before -> path of the program."""
    options = ["-O3", "-std=c++17", *compiler_flags(cpu_flags()), "-pthread"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(options).encode()).hexdigest()[:12]
    program = CACHE / f"rates-{key}"
    if not program.exists():
        CACHE.mkdir(exist_ok=True)
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(program)], check=True, capture_output=True, text=True)
    return program


def _best(call, flops: float, clock, repeats: int = 7) -> float:
    """Rate in units a second at the fastest of a few calls."""
    call()
    return flops / min(clock.seconds(call) for _ in range(repeats))


def cpu_rates(threads: int, seconds: float = 0.1, runs: int = 4) -> dict:
    """GFLOP/s and GB/s of this CPU with `threads` threads: the best of a few short runs, since a peak is wanted."""
    command = [str(build()), str(threads), str(seconds), "256"]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(runs)
    ]
    rates = {key: max(f[key] for f in found) for key in found[0]}
    clock = timing.CpuClock() if threads == 1 else timing.WallClock()
    for name, n in (("gemm_float32", 1536), ("gemm_bfloat16", 256), ("gemm_float64", 1024)):
        dtype = getattr(torch, name.removeprefix("gemm_"))
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        rates[f"{name}_gflops"] = _best(lambda a=a, b=b: a @ b, 2 * n**3 * 1e-9, clock, 4)
    return {"device": "cpu", "date": time.strftime("%Y-%m-%d"), "compiler_flags": compiler_flags(cpu_flags()), **rates}


def cuda_rates() -> dict:
    clock = timing.CudaClock()
    rates = {"device": "cuda", "date": time.strftime("%Y-%m-%d")}
    n = 8192
    for name in ("float32", "bfloat16", "float16"):
        a, b = (torch.randn(n, n, device="cuda", dtype=getattr(torch, name)) for _ in range(2))
        rates[f"gemm_{name}_gflops"] = _best(lambda a=a, b=b: a @ b, 2 * n**3 * 1e-9, clock)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    rates["copy_gbytes"] = _best(lambda: target.copy_(source), 2 * source.numel() * 4e-9, clock)
    return rates


def measure(device: str, threads: int) -> dict:
    return cuda_rates() if device == "cuda" else cpu_rates(threads)


def peak_gflops(rates: dict, dtype: str) -> tuple[float, str]:
    if rates["device"] == "cuda":
        return rates.get(f"gemm_{dtype}_gflops", rates["gemm_float32_gflops"]), f"library GEMM, {dtype}"
    if dtype == "float64":
        return rates["fma_float64_gflops"], "multiply-add loop, float64"
    if dtype == "float32" or rates.get(f"gemm_{dtype}_gflops", 0) <= rates["fma_float32_gflops"]:
        return rates["fma_float32_gflops"], "multiply-add loop, float32"
    return rates[f"gemm_{dtype}_gflops"], f"library GEMM, {dtype} (beats the float32 loop)"


def work(problem) -> dict:
    """Least flops and bytes an image, and the path they belong to."""
    p, size = problem, problem.itemsize
    if p.op == "attention_received":
        return {
            "path": "two passes over q k^T",
            "flops": 4.0 * p.K * p.N**2 * p.D,
            "bytes": 2 * p.K * p.N * p.D * size + 4 * p.N,
        }
    if p.op == "pool_backward":
        return {"path": "copy", "flops": 0.0, "bytes": (p.N + p.K) * p.D * size + 8 * p.N}
    gram, direct = (
        float(p.N) ** 2 * p.D,
        2.0 * p.N * p.K * p.D,
    )  # direct: one product with the centers; bounds may spare the rest
    path = "gram" if gram <= direct else "direct"
    return {"path": path, "flops": gram if path == "gram" else direct, "bytes": (p.N + p.K) * p.D * size + 8 * p.N}


def over(problem, rates: dict, ms_per_image: dict) -> dict:
    """Fields of a record: the floor in ms an image and how many floors the measured time is."""
    need = work(problem)
    peak, source = peak_gflops(rates, problem.dtype)
    compute, memory = need["flops"] / peak * 1e-6, need["bytes"] / rates["copy_gbytes"] * 1e-6
    floor_ms = max(compute, memory)
    return {
        "floor_ms_per_image": floor_ms,
        "floor_path": need["path"],
        "floor_flops": need["flops"],
        "floor_bytes": need["bytes"],
        "floor_bound_by": "flops" if compute >= memory else "bytes",
        "floor_rate": source,
        "time_over_floor": {k: v / floor_ms for k, v in ms_per_image.items()},
    }


def describe(rates: dict) -> str:
    names = [(k.removesuffix("_gflops"), f"{v:.0f} GFLOP/s") for k, v in rates.items() if k.endswith("_gflops")]
    names += [("copy (read + written)", f"{rates['copy_gbytes']:.1f} GB/s")]
    return "; ".join(f"{name} {value}" for name, value in names)
