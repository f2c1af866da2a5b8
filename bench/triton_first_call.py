"""What the first call of a shape bucket costs the Triton backend in a fresh process with an empty cache: compilation.

    python -m bench.triton_first_call [--capability 90 ...] [--repeats 5] [--json OUT]

Needs no GPU: the launches of a clustering are recorded, and their kernels compiled to machine code for the capability,
one after the other and side by side as the backend does it.  Each measurement is a process of its own; importing torch
and Triton is not counted, Triton's own start (it hashes its binaries) is.  `later process` is a fresh process that
finds
Triton's cache on disk filled by an earlier one, which is every process but the first on a machine.  Seconds, the median
of the repeats, and the greatest of those side by side; `processor` adds up all threads and ptxas.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import machine

BUCKETS = (
    ("gram", "kmeans", 196, 384, 98),
    ("direct", "kmeans", 4096, 64, 16),
    ("direct", "kmeans", 4096, 320, 16),
    ("gram", "kmedoids", 196, 384, 98),
)


def measure(path: str, algorithm: str, n: int, d: int, k: int, dtype: str, capability: int, together: bool) -> dict:
    """One process's measurement."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from tokenpool_ext.triton import clustering, heuristics, launch

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    triton.runtime.driver.set_active(Driver())
    device = heuristics.Device(capability, {80: 163, 90: 227, 100: 227}.get(capability, 99) * 1024)
    heuristics.device_of = lambda x: device
    x = torch.empty((1, n, d), dtype=getattr(torch, dtype), device="meta")
    init = torch.empty((1, k), dtype=torch.int64, device="meta")
    with launch.record() as launches:
        clustering._chunks(x, None, None, None, init, k, False, algorithm == "kmedoids", path, 1)

    def clock() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    start = clock()
    if together:
        launch.compile_together(launches)
    for one in launches:
        one.kernel.warmup(**one.arguments, **one.config, **launch.OPTIONS, grid=(1,))
    end = clock()
    return dict(seconds=end[0] - start[0], processor=end[1] - start[1], kernels=len({one.kernel for one in launches}))


def in_a_process(problem: dict, cache: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "bench.triton_first_call", "--one", json.dumps(problem)],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(bucket: tuple, dtype: str, capability: int, repeats: int) -> dict:
    """One row: every repeat's seconds, of each way to compile."""
    path, algorithm, n, d, k = bucket
    row = dict(path=path, algorithm=algorithm, n=n, d=d, k=k, dtype=dtype, capability=capability)
    samples = {"one_by_one": [], "together": [], "processor": [], "later": []}
    for together in (False, True) * repeats:
        with tempfile.TemporaryDirectory() as cache:
            first, again = (in_a_process({**row, "together": together}, cache) for _ in range(2))
        samples["together" if together else "one_by_one"].append(first["seconds"])
        if together:
            samples["processor"].append(first["processor"])
            samples["later"].append(again["seconds"])
    return {**row, "kernels": first["kernels"], "seconds": samples}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_first_call", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[90])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return 0
    rows = []
    print(f"{'bucket':<46}{'one by one':>12}{'together':>10}{'(most)':>8}{'processor':>11}{'later':>7}{'kernels':>9}")
    for capability in options.capability:
        for bucket in BUCKETS:
            for dtype in ("bfloat16", "float32"):
                rows.append(row := measured(bucket, dtype, capability, options.repeats))
                middle = {name: statistics.median(values) for name, values in row["seconds"].items()}
                path, algorithm, n, d, k = bucket
                print(
                    f"{f'sm_{capability} {algorithm} {path} {dtype} {n}x{d}->{k}':<46}{middle['one_by_one']:>12.1f}"
                    f"{middle['together']:>10.1f}{max(row['seconds']['together']):>8.1f}{middle['processor']:>11.1f}"
                    f"{middle['later']:>7.1f}{row['kernels']:>9}",
                    flush=True,
                )
    if options.json:
        content = {"schema": 1, **machine.stamp("bench.triton_first_call"), "first_call": rows}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
