"""Checks for bench/gpu.sh: parity with the float64 reference, invariants, small runs for the tools, times.

    python -m bench.gpu_checks parity|invariants|small|speed|profile [--backend cuda|triton] [--json FILE]
    python -m bench.gpu_checks parity --device cpu     the same code on the cpu backend: a rehearsal without a GPU
    python -m bench.gpu_checks tests ARGUMENTS...      pytest, which still says what failed when its time is up

A FILE that is there keeps its runs; this one is added.

The exit status is 1 when a check fails; every check is printed with its outcome. Real tokens come from bench/.cache
(see bench/tokens.py); without it they are random, and the check says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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
from bench.problem import Problem
from bench.tokens import make
from tokenpool_ext.backends import REGISTRY, run

PATHS = ("resident", "spread", "gram", "streaming")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative difference of the inertia after several iterations: a tie broken differently moves single images.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
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


def blobs(b, n, d, dtype, seed=0, offset=0.0, scale=1.0):
    """(b, n, d) tokens around n / 8 centers. Made on the CPU: what is copied to a GPU counts as written there."""
    generator = seeded(seed)
    middle = torch.randn(b, max(1, n // 8), d, generator=generator)
    pick = torch.randint(0, middle.shape[1], (b, n), generator=generator)
    x = torch.gather(middle, 1, pick[:, :, None].expand(-1, -1, d)) + 0.3 * torch.randn(b, n, d, generator=generator)
    return on_device(((x + offset) * scale).to(dtype))


def starts(b, n, k):
    return on_device((torch.arange(k) * n // k).expand(b, k).contiguous())


def targets() -> list[Target]:
    """Every path of every backend of this device that can run here."""
    present = tp.backends()
    if Place.device == "cpu":
        return [Target("cpu"), Target("cpu", "gram"), Target("cpu", "direct")]
    found = [Target("cuda"), *(Target("cuda", path) for path in PATHS)] if present.get("cuda") == "ok" else []
    if present.get("triton") == "ok":
        found += [Target("triton"), Target("triton", "gram"), Target("triton", "direct")]
    return [target for target in found if Place.backend in (None, target.backend)]


def backends() -> list[str]:
    return sorted({target.backend for target in targets()})


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


def compare(target, algorithm, x, k, iters, **given):
    """Inertia and consistency of one call against the reference in float64 on the same device."""
    got = target.run(algorithm, x, k, num_iters=iters, **given)
    wide = {
        name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in given.items()
    }
    want = getattr(tp, algorithm)(x.double(), k, num_iters=iters, backend="reference", **wide)
    require(bool(torch.isfinite(got.inertia).all() & torch.isfinite(got.mass).all()), "inertia or mass is not finite")
    scale = x.double().square().sum((1, 2)) * 1e-8 + 1e-300  # an image without any error has no ratio
    ratio = ((got.inertia.double() + scale) / (want.inertia + scale) - 1).mean().item()
    flips = (got.assignment != want.assignment).float().mean().item()
    require(abs(ratio) <= TOLERANCE[x.dtype], f"mean inertia is off by {ratio:.3g}; {flips:.3%} of labels differ")
    if algorithm == "kmeans":
        means = tp.pool(x.double(), got.assignment, k, weights=wide.get("weights"), backend="reference")
        error = (got.centers.double() - means).abs().max().item() / max(x.double().abs().max().item(), 1e-300)
        require(
            error <= {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[x.dtype],
            f"centers off by {error:.3g}",
        )
    return f"inertia {ratio:+.2e}, labels {flips:.3%}"


def parity(report: Report) -> None:
    shapes = [
        (8, 196, 384, 98),
        (4, 197, 65, 49),
        (2, 256, 384, 128),
        (2, 577, 96, 100),
        (1, 1030, 128, 343),
        (3, 33, 7, 33),
    ]
    if Place.rehearsal:
        shapes = [(2, 66, 33, 20), (3, 33, 7, 33)]
    for target in targets():
        for b, n, d, k in shapes:
            if n > 400 and target.path in ("resident", "spread"):
                continue  # they cannot hold it
            for dtype in DTYPES:
                x = blobs(b, n, d, dtype)
                for algorithm in ALGORITHMS:
                    name = f"{target} {algorithm} {b}x{n}x{d}->{k} {str(dtype)[6:]}"
                    report.check(name, lambda: compare(target, algorithm, x, k, 5, init=starts(b, n, k)))
                    report.check(name + " farthest", lambda: farthest(target, algorithm, x, k))
        unusual_inputs(report, target)
        report.check(f"{target} real tokens", lambda: real_tokens(target))
    for backend in backends():
        for dtype in DTYPES:
            report.check(f"{backend} pool, unpool and gradients {str(dtype)[6:]}", lambda: pooling(backend, dtype))
            report.check(f"{backend} attention received {str(dtype)[6:]}", lambda: attention(backend, dtype))


def farthest(target, algorithm, x, k):
    """The start made in the kernel against the same start made by the reference: the loss, for ties may fall
    otherwise."""
    got = target.run(algorithm, x, k, init="farthest")
    want = getattr(tp, algorithm)(x.double(), k, init="farthest", backend="reference")
    ratio = (got.inertia.double().sum() / want.inertia.sum().clamp(min=1e-300)).item() - 1
    require(abs(ratio) <= 0.03 or want.inertia.sum() == 0, f"inertia is off by {ratio:.3g}")
    if x.dtype == torch.float32 and algorithm == "kmeans":
        whole = (4 * x).round()
        whole = torch.cat([whole, -whole], 1)  # the mean is 0 and all arithmetic is exact
        got = target.run("kmeans", whole, k, init="farthest", num_iters=1)
        want = tp.kmeans(whole.double(), k, init="farthest", num_iters=1, backend="reference")
        require(torch.equal(got.assignment, want.assignment), "on whole numbers the start differs from the reference's")
    return f"inertia {ratio:+.2e}"


def real_tokens(target):
    n, d, k = (256, 384, 128) if not Place.rehearsal else (64, 48, 16)
    data = make(Problem("kmeans", 4, n, d, k, tokens="random" if Place.rehearsal else "real", device=Place.device))
    words = [
        compare(target, algorithm, data.x.to(dtype), k, 5, init=data.init)
        for dtype in DTYPES
        for algorithm in ALGORITHMS
    ]
    return f"{data.tokens}: {'; '.join(words)}"


def unusual_inputs(report, target):
    x, w = blobs(4, 100, 48, torch.float32, seed=1), on_device(torch.rand(4, 100, generator=seeded(0)) + 0.1)
    mask = on_device(torch.rand(4, 100, generator=seeded(5)) > 0.3)
    first = torch.stack([torch.where(mask[b])[0][:20] for b in range(4)])
    padded = torch.where(mask[:, :, None], x, float("nan"))
    zeros = on_device(torch.zeros(4, 20, dtype=torch.int64))
    counts = on_device(torch.tensor([20, 1, 7, 20]))
    whole = x[:, :8].round()
    repeated = torch.cat([whole, -whole], 1).repeat(1, 4, 1)  # whole numbers with mean 0: exact, ties and all

    def padding():
        clean = target.run("kmeans", x, 20, init=first, weights=w, mask=mask)
        identical(clean, target.run("kmeans", padded, 20, init=first, weights=w, mask=mask), "padding leaks")

    def bad_number():
        clean = {a: target.run(a, x, 20, init=starts(4, 100, 20)) for a in ALGORITHMS}
        for value in (float("nan"), float("inf")):
            dirty = x.clone()
            dirty[1, 17, 3] = value
            for algorithm in ALGORITHMS:
                for init in (starts(4, 100, 20), "farthest"):
                    got = target.run(algorithm, dirty, 20, init=init)
                    require(bool(((got.assignment >= 0) & (got.assignment < 20)).all()), "labels out of range")
                    if not isinstance(init, str):
                        for i in (0, 2, 3):
                            identical(
                                [t[i] if t is not None else None for t in clean[algorithm]],
                                [t[i] if t is not None else None for t in got],
                                f"image {i} is touched by {value} in image 1",
                            )

    def powers_of_two():
        for dtype in (torch.float32, torch.bfloat16):
            some = blobs(2, 60, 16, dtype).clamp(-3.5, 3.5)
            some = torch.where(some.abs() < 2.0**-5, torch.full_like(some, 2.0**-5), some)
            plain = target.run("kmeans", some, 12, init=starts(2, 60, 12))
            for power in (-100, 60, 120):
                scaled = target.run("kmeans", some * 2.0**power, 12, init=starts(2, 60, 12))
                identical([plain.assignment], [scaled.assignment], f"labels change under 2^{power}")
                require(bool(torch.isfinite(scaled.centers).all()), f"not finite under 2^{power}")

    check = report.check
    check(
        f"{target} weights, mask, sort",
        lambda: compare(target, "kmeans", x, 20, 4, init=first, weights=w, mask=mask, sort=True),
    )
    check(
        f"{target} zero weights",
        lambda: compare(target, "kmeans", x, 20, 4, init=starts(4, 100, 20), weights=(w > 0.6) * w),
    )
    check(f"{target} per-image K", lambda: compare_counts(target, x, counts))
    check(
        f"{target} common offset 100",
        lambda: compare(
            target, "kmeans", blobs(4, 100, 48, torch.float32, offset=100.0), 20, 3, init=starts(4, 100, 20)
        ),
    )
    check(
        f"{target} given centers",
        lambda: compare(target, "kmeans", x, 20, 3, init=on_device(torch.randn(4, 20, 48, generator=seeded(2)))),
    )
    check(
        f"{target} features not adjacent",
        lambda: compare(
            target, "kmeans", x.transpose(1, 2).contiguous().transpose(1, 2), 20, 3, init=starts(4, 100, 20)
        ),
    )
    for algorithm in ALGORITHMS:
        check(
            f"{target} {algorithm} constant images",
            lambda: compare(target, algorithm, torch.full_like(x, 3.7), 20, 3, init=zeros),
        )
        check(f"{target} {algorithm} zeros", lambda: compare(target, algorithm, torch.zeros_like(x), 20, 3, init=zeros))
        check(f"{target} {algorithm} duplicates", lambda: compare(target, algorithm, repeated, 20, 1, init=zeros))
    check(f"{target} padding of NaN", padding)
    check(f"{target} NaN and infinity stay in their image", bad_number)
    check(f"{target} powers of two", powers_of_two)


def compare_counts(target, x, counts):
    got = target.run("kmeans", x, counts, num_iters=3, init=starts(4, 100, 20))
    want = tp.kmeans(x.double(), counts, num_iters=3, init=starts(4, 100, 20), backend="reference")
    require(bool(((got.mass > 0).sum(1) == counts).all()), "wrong number of clusters")
    ratio = (got.inertia.double() / want.inertia - 1).abs().max().item()
    require(ratio <= 2e-3, f"inertia is off by {ratio:.3g}")


def pooling(backend, dtype):
    x = blobs(3, 150, 72, dtype).requires_grad_()
    w = (torch.rand(3, 150, generator=seeded(0)) + 0.1).to(Place.device).requires_grad_()
    labels = on_device(torch.randint(-1, 30, (3, 150), generator=seeded(1)))
    results = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        a, v = (
            x.detach().to(kind).requires_grad_(),
            w.detach().to(torch.float64 if kind == torch.float64 else torch.float32).requires_grad_(),
        )
        c = tp.pool(a, labels, 30, weights=v, backend=name)
        back = tp.unpool(c, labels, backend=name)
        (
            back.double() * torch.linspace(-1, 1, back.numel(), device=Place.device, dtype=torch.float64).view_as(back)
        ).sum().backward()
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
            require(
                torch.equal(p, q) or torch.equal(p.isnan(), q.isnan()) and torch.equal(p.nan_to_num(), q.nan_to_num()),
                what,
            )


def invariants(report: Report) -> None:
    n, d, k, many = (196, 384, 98, 256) if not Place.rehearsal else (60, 24, 20, 6)
    repeats = 1000 if not Place.rehearsal else 5
    for target in targets():
        for algorithm in ALGORITHMS:
            for init in (starts(16, n, k), "farthest"):
                name = f"{target} {algorithm} {'farthest' if isinstance(init, str) else 'indices'}"
                x = blobs(16, n, d, torch.bfloat16)
                min(16, many)

                def call(images=16):
                    return target.run(algorithm, x[:images], k, init=init if isinstance(init, str) else init[:images])

                if target.path in ("streaming", "direct") and isinstance(init, str):
                    times = max(1, repeats // 10)  # a start that takes K launches, or as many passes
                else:
                    times = repeats
                report.check(f"{name}: {times} runs are identical", lambda: repeat(call, times))
                if Place.device == "cuda":
                    report.check(f"{name}: no host synchronisation", lambda: no_synchronisation(call))
                    report.check(f"{name}: CUDA graph, 100 replays", lambda: graph(call))
                    report.check(f"{name}: two streams", lambda: two_streams(call, lambda: call(3)))
            for dtype in DTYPES:
                report.check(
                    f"{target} {algorithm} {str(dtype)[6:]}: the same bits alone and in a batch of {many}",
                    lambda: batch(target, algorithm, dtype, many, n, d, k),
                )
        report.check(f"{target} very many images", lambda: many_images(target))
    if any(target.path == "spread" for target in targets()):
        for algorithm in ALGORITHMS:
            for dtype in DTYPES:
                report.check(
                    f"resident and spread give the same bits: {algorithm} {str(dtype)[6:]}",
                    lambda: same_bits(algorithm, dtype, n, d, k),
                )


def repeat(call, times):
    first = call()
    for _ in range(times):
        identical(first, call(), "two runs differ")


def batch(target, algorithm, dtype, many, n, d, k):
    """The planner takes another path for one image than for 256: the bits must not change."""
    x, w = blobs(many, n, d, dtype), on_device(torch.rand(many, n, generator=seeded(3)))
    for given in (dict(init="farthest"), dict(init=starts(many, n, k)), dict(init=starts(many, n, k), weights=w)):
        whole = target.run(algorithm, x, k, **given)
        for i in (0, many // 2, many - 1):
            mine = {name: v[i : i + 1] if isinstance(v, torch.Tensor) else v for name, v in given.items()}
            alone = target.run(algorithm, x[i : i + 1], k, **mine)
            identical([None if t is None else t[i : i + 1] for t in whole], alone, f"image {i} depends on its batch")
        few = {name: v[:8] if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        identical(
            [None if t is None else t[:8] for t in whole],
            target.run(algorithm, x[:8], k, **few),
            "8 images differ from 256",
        )


def same_bits(algorithm, dtype, n, d, k):
    for x in (
        blobs(8, n, d, dtype),
        blobs(8, 41, 19, dtype),
        blobs(8, n, d, dtype) * 2.0**-30,
        torch.zeros(2, n, d, dtype=dtype, device=Place.device),
    ):
        clusters = min(k, x.shape[1])
        for init in (starts(x.shape[0], x.shape[1], clusters), "farthest"):
            one, other = (
                Target("cuda", path).run(algorithm, x, clusters, init=init, sort=True)
                for path in ("resident", "spread")
            )
            identical(one, other, f"{tuple(x.shape)} differs")


def no_synchronisation(call):
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call):
    """A CUDA graph of one call, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    return graph, got


def graph(call):
    want = call()
    replayed, got = captured(call)
    for _ in range(100):
        replayed.replay()
    torch.cuda.synchronize()
    identical(want, got, "a replayed graph differs")


def two_streams(call, other):
    """Two streams at once, with different batch sizes: neither may disturb the other's temporaries."""
    calls = (call, other)
    want = [each() for each in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    got = []
    for _ in range(10):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got.append((which, calls[which]()))
    torch.cuda.synchronize()
    for which, result in got:
        identical(want[which], result, "two streams disturb each other")


def many_images(target):
    count = 70000 if not Place.rehearsal else 300
    x = blobs(1, 8, 4, torch.float32).expand(count, 8, 4)
    got = target.run("kmeans", x, 3, init=starts(count, 8, 3), num_iters=2)
    require(bool((got.assignment == got.assignment[:1]).all()), "images differ")


def small(report: Report) -> None:
    """Every kernel once on small shapes, for compute-sanitizer."""
    paths = [target for target in targets() if target.path]
    for target in paths:
        for dtype in DTYPES:
            x, name = blobs(2, 70, 40, dtype), f"{target} {str(dtype)[6:]}"
            for algorithm in ALGORITHMS:
                for init in (starts(2, 70, 24), "farthest"):
                    report.check(
                        f"{name} {algorithm}", lambda: done(target.run(algorithm, x, 24, init=init, num_iters=2))
                    )
            ones, tiny = on_device(torch.ones(2, 40, 9, dtype=dtype)), blobs(2, 70, 40, dtype, scale=2.0**-24)
            report.check(
                f"{name} repair",
                lambda: done(target.run("kmeans", ones, 8, init=starts(2, 40, 8), num_iters=2, sort=True)),
            )
            report.check(
                f"{name} scaled twice", lambda: done(target.run("kmeans", tiny, 8, init=starts(2, 70, 8), num_iters=2))
            )
            report.check(
                f"{name} centers",
                lambda: done(target.run("kmeans", x, 8, init=on_device(torch.randn(2, 8, 40)), num_iters=2)),
            )
    for backend in {target.backend for target in paths}:
        for dtype in DTYPES:
            report.check(f"{backend} pool and gradients {str(dtype)[6:]}", lambda: done(operators(backend, dtype)))
    if any(
        target == Target("cuda", "gram") for target in paths
    ):  # more tokens than threads for two columns: no groups of threads
        x = blobs(1, 1154, 8, torch.bfloat16)
        report.check(
            "cuda/gram 1154 tokens",
            lambda: done(Target("cuda", "gram").run("kmeans", x, 100, init=starts(1, 1154, 100), num_iters=2)),
        )
    done(None)


def operators(backend, dtype):
    """All operators but clustering, from tensors that were copied to the device."""

    def made(*shape, seed):
        return on_device(torch.randn(shape, generator=seeded(seed)).to(dtype))

    x, grad, back = made(2, 70, 40, seed=1), made(2, 24, 40, seed=2), made(2, 70, 40, seed=3)
    w, labels = (
        on_device(torch.rand(2, 70, generator=seeded(4))),
        on_device(torch.randint(-1, 24, (2, 70), generator=seeded(5))),
    )
    chain = (REGISTRY[backend],)
    centers, mass = run(chain, "pool", x, labels, w, 24)
    run(chain, "pool_backward", grad, x, centers, labels, w, mass)
    run(chain, "unpool", centers, labels)
    run(chain, "unpool_backward", back, labels, 24)
    run(chain, "attention_received", made(2, 3, 70, 24, seed=6), made(2, 3, 70, 24, seed=7), 0.2, None)


def done(_):
    if Place.device == "cuda":
        torch.cuda.synchronize()


def speed(report: Report) -> None:
    """Microseconds a call of our own paths (peers: python -m bench): wall with Python, and the device alone (graph
    replays)."""
    shapes = [
        (196, 384, 98),
        (196, 192, 98),
        (256, 384, 128),
        (196, 768, 49),
        (576, 768, 288),
    ]  # what matters most first
    batches, dtypes = (1, 256, 8, 64), (torch.bfloat16, torch.float32)
    if Place.rehearsal:
        shapes, batches, dtypes = [(64, 32, 16)], (1, 4), (torch.float32,)
    for dtype in dtypes:
        for n, d, k in shapes:
            for b in batches:
                data = make(
                    Problem("kmeans", b, n, d, k, tokens="random" if Place.rehearsal else "real", device=Place.device)
                )
                x = data.x.to(dtype)
                if x.numel() * x.element_size() > 1 << 30:
                    continue
                for target in targets():
                    if (
                        target.path
                        and (n, d) not in ((196, 384), (64, 32))
                        or target.path in ("resident", "spread")
                        and n > 300
                    ):
                        continue  # forced paths at one shape only
                    for algorithm, init in (("kmeans", data.init), ("kmeans", "farthest"), ("kmedoids", data.init)):
                        if target.path in ("streaming", "direct") and isinstance(init, str):
                            continue
                        start = init if isinstance(init, str) else "indices"
                        report.check(
                            f"{target} {algorithm} {b}x{n}x{d}->{k} {str(dtype)[6:]} {start}",
                            lambda: measured(target, algorithm, x, k, init, data.tokens),
                        )


def measured(target, algorithm, x, k, init, tokens) -> dict:
    def call():
        return target.run(algorithm, x, k, init=init)

    found = {"wall_us": median_us(call), "tokens": tokens}
    if Place.device == "cuda":
        replayed, _ = captured(call)
        found["device_us"] = median_us(replayed.replay)
    return found


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


def profile(report: Report) -> None:
    for b in (256, 1):
        x, init = blobs(b, 196, 384, torch.bfloat16), starts(b, 196, 98)
        for _ in range(4):
            Target("cpu" if Place.device == "cpu" else "cuda").run("kmeans", x, 98, init=init)
    done(None)


def tests(arguments: list[str]) -> int:
    """pytest, with an interrupt instead of an end when its time is up: it then prints the failures it has seen."""
    import pytest

    def interrupt(*_):
        raise KeyboardInterrupt("out of time")

    signal.signal(signal.SIGTERM, interrupt)
    return int(pytest.main(arguments))


def main() -> int:
    if sys.argv[1:2] == ["tests"]:
        return tests(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = {"parity": parity, "invariants": invariants, "small": small, "speed": speed, "profile": profile}
    parser.add_argument("what", choices=list(modes))
    parser.add_argument("--json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal on the cpu backend")
    parser.add_argument("--backend", choices=["cuda", "triton", "cpu"], help="only this one")
    options = parser.parse_args()
    Place.device, Place.rehearsal, Place.backend = options.device, options.device == "cpu", options.backend
    needed = options.backend or options.device
    if tp.backends().get(needed) != "ok":
        print(f"the {needed} backend cannot run: {tp.backends()[needed]}")
        return 1
    report = Report()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # out of time: what was measured is written
    try:
        modes[options.what](report)
    finally:
        status = report.finish(options.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
