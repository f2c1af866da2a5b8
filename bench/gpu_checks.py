"""Checks that need a GPU, for bench/gpu.sh: parity with the float64 reference, invariants, and small runs for the tools.

    python -m bench.gpu_checks parity|invariants|small|profile [--json FILE]

The exit status is 1 when a check fails; every check is printed with its outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from contextlib import contextmanager
from typing import Callable, Dict, List

import torch

import tokenpool_ext as tp

PATHS = ("resident", "gram", "streaming")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative difference of the inertia after several iterations: a tie broken differently moves single images.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@contextmanager
def cuda_path(name):
    """Make the CUDA backend take one of its paths."""
    before = os.environ.pop("TOKENPOOL_EXT_CUDA_PATH", None)
    if name:
        os.environ["TOKENPOOL_EXT_CUDA_PATH"] = name
    try:
        yield
    finally:
        os.environ.pop("TOKENPOOL_EXT_CUDA_PATH", None)
        if before is not None:
            os.environ["TOKENPOOL_EXT_CUDA_PATH"] = before


def blobs(b, n, d, dtype, seed=0, offset=0.0):
    """(b, n, d) tokens around n / 8 centers, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(b, max(1, n // 8), d, generator=generator)
    pick = torch.randint(0, middle.shape[1], (b, n), generator=generator)
    x = torch.gather(middle, 1, pick[:, :, None].expand(-1, -1, d)) + 0.3 * torch.randn(b, n, d, generator=generator)
    return (x + offset).to(dtype).cuda()


def starts(b, n, k):
    return (torch.arange(k) * n // k).expand(b, k).contiguous().cuda()


def targets():
    """(backend, CUDA path) of every GPU backend that can run here."""
    present = tp.backends()
    found = [("cuda", path) for path in PATHS] if present.get("cuda") == "ok" else []
    if present.get("triton") == "ok":
        found.append(("triton", None))
    return found


class Report:
    def __init__(self):
        self.records: List[Dict] = []

    def check(self, name: str, body: Callable[[], object]) -> None:
        try:
            detail, ok = body(), True
        except Exception:
            detail, ok = traceback.format_exc(limit=4), False
        self.records.append({"check": name, "ok": ok, "detail": str(detail)})
        print(("ok    " if ok else "FAIL  ") + name + ("" if detail is None else f": {detail}"), flush=True)

    def finish(self, path) -> int:
        failed = sum(not r["ok"] for r in self.records)
        if path:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
            record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
                      "commit": commit, "command": " ".join(sys.argv), "failed": failed, "checks": self.records}
            with open(path, "w") as file:
                json.dump(record, file, indent=1)
        print(f"{len(self.records)} checks, {failed} failed")
        return 1 if failed else 0


def require(condition, message):
    if not condition:
        raise RuntimeError(message)


def compare(algorithm, backend, path, x, k, iters, **given):
    """Inertia and consistency of one call against the reference in float64 on the same device."""
    with cuda_path(path):
        got = getattr(tp, algorithm)(x, k, num_iters=iters, backend=backend, **given)
    wide = {name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in given.items()}
    want = getattr(tp, algorithm)(x.double(), k, num_iters=iters, backend="reference", **wide)
    ratio = (got.inertia.double() / want.inertia.clamp(min=1e-300) - 1).mean().item()
    flips = (got.assignment != want.assignment).float().mean().item()
    require(abs(ratio) <= TOLERANCE[x.dtype], f"mean inertia is off by {ratio:.3g}; {flips:.3%} of labels differ")
    means, mass = tp.pool(x.double(), got.assignment, k, weights=wide.get("weights"), backend="reference"), got.mass
    if algorithm == "kmeans":
        error = (got.centers.double() - means).abs().max().item() / x.double().abs().max().item()
        require(error <= {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[x.dtype], f"centers off by {error:.3g}")
    require(bool(torch.isfinite(mass).all()), "mass is not finite")
    return f"inertia {ratio:+.2e}, labels {flips:.3%}"


def parity(report: Report) -> None:
    shapes = [(8, 196, 384, 98), (4, 197, 65, 49), (2, 256, 384, 128), (2, 577, 96, 100), (1, 1030, 128, 343), (3, 33, 7, 33)]
    for backend, path in targets():
        for b, n, d, k in shapes:
            for dtype in DTYPES:
                for algorithm in ("kmeans", "kmedoids"):
                    x = blobs(b, n, d, dtype)
                    name = f"{backend}/{path} {algorithm} {b}x{n}x{d}->{k} {str(dtype)[6:]}"
                    report.check(name, lambda: compare(algorithm, backend, path, x, k, 5, init=starts(b, n, k)))
        x, w = blobs(4, 100, 48, torch.float32, seed=1), torch.rand(4, 100, generator=torch.Generator().manual_seed(0)).cuda() + 0.1
        mask = (torch.rand(4, 100, generator=torch.Generator().manual_seed(5)) > 0.3).cuda()
        first = torch.stack([torch.where(mask[b])[0][:20] for b in range(4)])
        report.check(f"{backend}/{path} weights, mask, sort",
                     lambda: compare("kmeans", backend, path, x, 20, 4, init=first, weights=w, mask=mask, sort=True))
        report.check(f"{backend}/{path} common offset 100",
                     lambda: compare("kmeans", backend, path, blobs(4, 100, 48, torch.float32, offset=100.0), 20, 3, init=starts(4, 100, 20)))
        report.check(f"{backend}/{path} given centers",
                     lambda: compare("kmeans", backend, path, x, 20, 3, init=torch.randn(4, 20, 48, generator=torch.Generator().manual_seed(2)).cuda()))
    for backend in sorted({name for name, _ in targets()}):
        for dtype in DTYPES:
            report.check(f"{backend} pool, unpool and gradients {str(dtype)[6:]}", lambda: pooling(backend, dtype))
            report.check(f"{backend} attention received {str(dtype)[6:]}", lambda: attention(backend, dtype))


def pooling(backend, dtype):
    x = blobs(3, 150, 72, dtype).requires_grad_()
    w = (torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) + 0.1).cuda().requires_grad_()
    labels = torch.randint(-1, 30, (3, 150), generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        a, v = x.detach().to(kind).requires_grad_(), w.detach().to(torch.float64 if kind == torch.float64 else torch.float32).requires_grad_()
        c = tp.pool(a, labels, 30, weights=v, backend=name)
        back = tp.unpool(c, labels, backend=name)
        (back.double() * torch.linspace(-1, 1, back.numel(), device="cuda", dtype=torch.float64).view_as(back)).sum().backward()
        results.append([t.double() for t in (c, back, a.grad, v.grad)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for got, want in zip(*results):
        error = (got - want).abs().max().item() / want.abs().max().item()
        require(error <= tolerance, f"off by {error:.3g}")


def attention(backend, dtype):
    q, k = blobs(2 * 3, 197, 64, dtype, 1).view(2, 3, 197, 64), blobs(2 * 3, 197, 64, dtype, 2).view(2, 3, 197, 64)
    got = tp.attention_received(q, k, backend=backend).double()
    want = tp.attention_received(q.double(), k.double(), backend="reference")
    error = (got - want).abs().max().item() / want.max().item()
    require(error <= 1e-3, f"off by {error:.3g}")


def identical(a, b, what):
    for p, q in zip(a, b):
        if p is not None:
            require(torch.equal(p, q) or torch.equal(p.isnan(), q.isnan()) and torch.equal(p.nan_to_num(), q.nan_to_num()), what)


def invariants(report: Report) -> None:
    for backend, path in targets():
        for algorithm in ("kmeans", "kmedoids"):
            run = getattr(tp, algorithm)
            x, init = blobs(16, 196, 384, torch.bfloat16), starts(16, 196, 98)

            def repeat():
                with cuda_path(path):
                    first = run(x, 98, init=init, backend=backend)
                    for _ in range(50):
                        identical(first, run(x, 98, init=init, backend=backend), "two runs differ")

            def batch():
                with cuda_path(path):
                    whole = run(x, 98, init=init, backend=backend)
                    for i in (0, 7, 15):
                        alone = run(x[i : i + 1], 98, init=init[i : i + 1], backend=backend)
                        identical([None if t is None else t[i : i + 1] for t in whole], alone, f"image {i} depends on its batch")

            def no_synchronisation():
                with cuda_path(path):
                    run(x, 98, init=init, backend=backend)
                    torch.cuda.set_sync_debug_mode("error")
                    try:
                        run(x, 98, init=init, backend=backend)
                    finally:
                        torch.cuda.set_sync_debug_mode("default")

            def graph():
                with cuda_path(path):
                    want = run(x, 98, init=init, backend=backend)
                    side = torch.cuda.Stream()
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        run(x, 98, init=init, backend=backend)
                    torch.cuda.current_stream().wait_stream(side)
                    captured = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(captured):
                        got = run(x, 98, init=init, backend=backend)
                    for _ in range(100):
                        captured.replay()
                    torch.cuda.synchronize()
                    identical(want, got, "a replayed graph differs")

            def two_streams():
                with cuda_path(path):
                    want = run(x, 98, init=init, backend=backend)
                    streams = [torch.cuda.Stream() for _ in range(2)]
                    torch.cuda.synchronize()
                    got = []
                    for _ in range(10):
                        for stream in streams:
                            with torch.cuda.stream(stream):
                                got.append(run(x, 98, init=init, backend=backend))
                    torch.cuda.synchronize()
                    for result in got:
                        identical(want, result, "two streams disturb each other")

            for name, body in (("50 runs are identical", repeat), ("batch-invariant", batch), ("no host synchronisation", no_synchronisation),
                               ("CUDA graph, 100 replays", graph), ("two streams", two_streams)):
                report.check(f"{backend}/{path} {algorithm} {name}", body)

        def many_images():
            with cuda_path(path):
                x = blobs(1, 8, 4, torch.float32).expand(70000, 8, 4)
                got = tp.kmeans(x, 3, init=starts(70000, 8, 3), num_iters=2, backend=backend)
                require(bool((got.assignment == got.assignment[:1]).all()), "images differ")

        report.check(f"{backend}/{path} 70000 images", many_images)


def small(report: Report) -> None:
    """Every kernel once on small shapes, for compute-sanitizer."""
    for path in PATHS:
        for dtype in DTYPES:
            for algorithm in ("kmeans", "kmedoids"):
                x = blobs(2, 70, 40, dtype)
                with cuda_path(path):
                    report.check(f"{path} {algorithm} {dtype}", lambda: getattr(tp, algorithm)(x, 24, init=starts(2, 70, 24), num_iters=2, backend="cuda") and None)
            with cuda_path(path):
                report.check(f"{path} repair {dtype}", lambda: tp.kmeans(torch.ones(2, 40, 9, dtype=dtype, device="cuda"), 8, num_iters=2, sort=True, backend="cuda") and None)
                report.check(f"{path} centers {dtype}", lambda: tp.kmeans(x, 8, init=torch.randn(2, 8, 40, device="cuda"), num_iters=2, backend="cuda") and None)
    for dtype in DTYPES:
        report.check(f"pool and gradients {dtype}", lambda: pooling("cuda", dtype))
        report.check(f"attention {dtype}", lambda: attention("cuda", dtype))
    torch.cuda.synchronize()


def profile(report: Report) -> None:
    x, init = blobs(256, 196, 384, torch.bfloat16), starts(256, 196, 98)
    for _ in range(4):
        tp.kmeans(x, 98, init=init, backend="cuda")
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["parity", "invariants", "small", "profile"])
    parser.add_argument("--json")
    options = parser.parse_args()
    if tp.backends().get("cuda") != "ok":
        print("the CUDA backend cannot run: " + tp.backends()["cuda"])
        return 1
    report = Report()
    {"parity": parity, "invariants": invariants, "small": small, "profile": profile}[options.what](report)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
