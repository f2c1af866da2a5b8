"""What the first call of a shape bucket costs the Triton backend in a fresh process with an empty cache: compilation.

    python -m bench.triton_first_call [--capability 90] [--repeats 3]

Needs no GPU: the launches of a clustering are recorded, and their kernels compiled to machine code for the capability,
one after the other and side by side as the backend does it.  Each measurement is a process of its own; importing torch
and Triton is not counted, Triton's own start (it hashes its binaries) is.  `later process` is a fresh process that finds
Triton's cache on disk filled by an earlier one, which is every process but the first on a machine.  Seconds, the least of
the repeats; `processor` adds up all threads and ptxas.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

BUCKETS = (("gram", "kmeans", 196, 384, 98), ("direct", "kmeans", 4096, 64, 16), ("direct", "kmeans", 4096, 320, 16),
           ("gram", "kmedoids", 196, 384, 98))


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
    done = subprocess.run([sys.executable, "-m", "bench.triton_first_call", "--one", json.dumps(problem)],
                          env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    print(f"{'bucket':<44}{'one by one':>12}{'together':>12}{'processor':>12}{'later process':>15}{'kernels':>9}")
    for path, algorithm, n, d, k in BUCKETS:
        for dtype in ("bfloat16", "float32"):
            found = {}
            for together in (False, True) * options.repeats:
                problem = dict(path=path, algorithm=algorithm, n=n, d=d, k=k, dtype=dtype, capability=options.capability,
                               together=together)
                with tempfile.TemporaryDirectory() as cache:
                    one, again = (in_a_process(problem, cache) for _ in range(2))
                one["later"] = again["seconds"]
                best = found.setdefault(together, one)
                for field in ("seconds", "processor", "later"):
                    best[field] = min(best[field], one[field])
            print(f"{f'{algorithm}, {path}, {dtype}, {n}x{d}->{k}':<44}{found[False]['seconds']:>12.1f}"
                  f"{found[True]['seconds']:>12.1f}{found[True]['processor']:>12.1f}{found[True]['later']:>15.1f}"
                  f"{found[True]['kernels']:>9}", flush=True)


if __name__ == "__main__":
    main()
