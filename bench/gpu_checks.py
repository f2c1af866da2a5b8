"""Checks for bench/gpu.sh: parity with the float64 reference, invariants, small runs for the tools, times.

Each path is forced, and the planner's choice taken, on a ViT's shapes. What holds on small ones stands in tests/
(stages tests_cuda and tests_triton).

    python -m bench.gpu_checks parity|invariants|small|speed|profile [--backend cuda|triton] [--json FILE]
    python -m bench.gpu_checks parity --device cpu     the same code on the cpu backend: a rehearsal without a GPU
    python -m bench.gpu_checks tests ARGUMENTS...      pytest, which still says what failed when its time is up

A FILE that is there keeps its runs; this one is added.

The exit status is 1 when a check fails; every check is printed with its outcome. Real tokens come from bench/.cache
(see bench/tokens.py); without it they are random, and the check says so.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys

import torch

import tokenpool_ext as tp
from bench.gpu_targets import (
    ALGORITHMS,
    DTYPES,
    Place,
    Report,
    Target,
    blobs,
    identical,
    image,
    median_us,
    on_device,
    require,
    seeded,
    starts,
    targets,
)
from bench.problem import Problem
from bench.tokens import make
from tokenpool_ext.backends import REGISTRY, run

# Relative difference of the inertia after several iterations: a tie broken differently moves single images.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def compare(target, algorithm, x, k, iters, **given):
    """Inertia and consistency of one call against the reference in float64 on the same device."""
    got = target.run(algorithm, x, k, num_iters=iters, **given)
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in given.items()}
    want = getattr(tp, algorithm)(x.double(), k, num_iters=iters, backend="reference", **wide)
    require(bool(torch.isfinite(got.inertia).all() & torch.isfinite(got.mass).all()), "inertia or mass is not finite")
    scale = x.double().square().sum((1, 2)) * 1e-8 + 1e-300  # an image without any error has no ratio
    ratio = ((got.inertia.double() + scale) / (want.inertia + scale) - 1).mean().item()
    flips = (got.assignment != want.assignment).float().mean().item()
    require(abs(ratio) <= TOLERANCE[x.dtype], f"mean inertia is off by {ratio:.3g}; {flips:.3%} of labels differ")
    if algorithm == "kmeans":
        means = tp.pool(x.double(), got.assignment, k, weights=wide.get("weights"), backend="reference")
        error = (got.centers.double() - means).abs().max().item() / max(x.double().abs().max().item(), 1e-300)
        allowed = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[x.dtype]
        require(error <= allowed, f"centers off by {error:.3g}")
    return f"inertia {ratio:+.2e}, labels {flips:.3%}"


def parity(report: Report) -> None:
    shapes = [(8, 196, 384, 98), (4, 197, 65, 49), (2, 256, 384, 128), (2, 577, 96, 100), (1, 1030, 128, 343)]
    shapes = [(2, 66, 33, 20)] if Place.rehearsal else shapes
    for target in targets():
        for b, n, d, k in [*shapes, (3, 33, 7, 33)]:
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
    every = itertools.product(DTYPES, ALGORITHMS)
    words = [compare(target, algorithm, data.x.to(dtype), k, 5, init=data.init) for dtype, algorithm in every]
    return f"{data.tokens}: {'; '.join(words)}"


def unusual_inputs(report, target):
    x, w = blobs(4, 100, 48, torch.float32, seed=1), on_device(torch.rand(4, 100, generator=seeded(0)) + 0.1)
    mask = on_device(torch.rand(4, 100, generator=seeded(5)) > 0.3)
    first = torch.stack([torch.where(mask[b])[0][:20] for b in range(4)])
    padded = torch.where(mask[:, :, None], x, float("nan"))
    zeros, even = torch.zeros_like(first), starts(4, 100, 20)
    whole = x[:, :8].round()
    repeated = torch.cat([whole, -whole], 1).repeat(1, 4, 1)  # whole numbers with mean 0: exact, ties and all

    def padding():
        clean = target.run("kmeans", x, 20, init=first, weights=w, mask=mask)
        identical(clean, target.run("kmeans", padded, 20, init=first, weights=w, mask=mask), "padding leaks")

    def bad_number(algorithm, value):
        dirty = x.clone()
        dirty[1, 17, 3] = value
        for init in (even, "farthest"):
            got = target.run(algorithm, dirty, 20, init=init)
            require(bool(((got.assignment >= 0) & (got.assignment < 20)).all()), "labels out of range")
            clean = target.run(algorithm, x, 20, init=init)
            for i in (0, 2, 3):
                identical(image(clean, i), image(got, i), f"image {i} is touched by {value} in image 1")

    def per_image_k():
        counts = on_device(torch.tensor([20, 1, 7, 20]))
        got = target.run("kmeans", x, counts, num_iters=3, init=even)
        want = tp.kmeans(x.double(), counts, num_iters=3, init=even, backend="reference")
        require(bool(((got.mass > 0).sum(1) == counts).all()), "wrong number of clusters")
        ratio = (got.inertia.double() / want.inertia - 1).abs().max().item()
        require(ratio <= 2e-3, f"inertia is off by {ratio:.3g}")

    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    centers = on_device(torch.randn(4, 20, 48, generator=seeded(2)))
    for name, tokens, iters, given in (
        ("weights, mask, sort", x, 4, dict(init=first, weights=w, mask=mask, sort=True)),
        ("zero weights", x, 4, dict(init=even, weights=(w > 0.6) * w)),
        ("common offset 100", x + 100, 3, dict(init=even)),
        ("given centers", x, 3, dict(init=centers)),
        ("features not adjacent", strided, 3, dict(init=even)),
    ):
        report.check(f"{target} {name}", lambda: compare(target, "kmeans", tokens, 20, iters, **given))
    for algorithm in ALGORITHMS:
        for name, tokens, iters in (("constant images", torch.full_like(x, 3.7), 3), ("duplicates", repeated, 1)):
            call = f"{target} {algorithm} {name}"
            report.check(call, lambda: compare(target, algorithm, tokens, 20, iters, init=zeros))
        for value in (float("nan"), float("inf")):
            report.check(f"{target} {algorithm} {value} stays in its image", lambda: bad_number(algorithm, value))
    report.check(f"{target} per-image K", per_image_k)
    report.check(f"{target} padding of NaN", padding)


def invariants(report: Report) -> None:
    n, d, k, many = (196, 384, 98, 256) if not Place.rehearsal else (60, 24, 20, 6)
    repeats = 1000 if not Place.rehearsal else 5
    for target in targets():
        for algorithm in ALGORITHMS:
            for init in (starts(16, n, k), "farthest"):
                name = f"{target} {algorithm} {'farthest' if isinstance(init, str) else 'indices'}"
                x = blobs(16, n, d, torch.bfloat16)
                # A start that takes K launches, or as many passes, less often.
                slow = target.path in ("streaming", "direct") and isinstance(init, str)
                times = max(1, repeats // 10) if slow else repeats

                def call(images=16):
                    return target.run(algorithm, x[:images], k, init=init if isinstance(init, str) else init[:images])

                report.check(f"{name}: {times} runs are identical", lambda: repeat(call, times))
                if Place.device == "cuda":
                    report.check(f"{name}: no host synchronisation", lambda: no_synchronisation(call))
                    report.check(f"{name}: CUDA graph, 100 replays", lambda: graph(call))
                    report.check(f"{name}: two streams", lambda: two_streams(call, lambda: call(3)))
            for dtype in DTYPES:
                name = f"{target} {algorithm} {str(dtype)[6:]}: the same bits alone and in a batch of {many}"
                report.check(name, lambda: batch(target, algorithm, dtype, many, n, d, k))
    if any(target.path == "spread" for target in targets()):
        for algorithm in ALGORITHMS:
            for dtype in DTYPES:
                name = f"resident and spread give the same bits: {algorithm} {str(dtype)[6:]}"
                report.check(name, lambda: same_bits(algorithm, dtype, n, d, k))


def repeat(call, times):
    first = call()
    for _ in range(times):
        identical(first, call(), "two runs differ")


def batch(target, algorithm, dtype, many, n, d, k):
    """The planner takes another path for one image than for 256: the bits must not change."""
    x, w = blobs(many, n, d, dtype), on_device(torch.rand(many, n, generator=seeded(3)))
    for given in (dict(init="farthest"), dict(init=starts(many, n, k)), dict(init=starts(many, n, k), weights=w)):
        whole = target.run(algorithm, x, k, **given)
        for part in (slice(0, 1), slice(many // 2, many // 2 + 1), slice(many - 1, many), slice(0, 8)):
            mine = {name: v[part] if isinstance(v, torch.Tensor) else v for name, v in given.items()}
            alone = target.run(algorithm, x[part], k, **mine)
            identical(image(whole, part), alone, f"images {part.start} to {part.stop - 1} depend on their batch")


def same_bits(algorithm, dtype, n, d, k):
    nothing = torch.zeros(2, n, d, dtype=dtype, device=Place.device)
    for x in (blobs(8, n, d, dtype), blobs(8, 41, 19, dtype), blobs(8, n, d, dtype) * 2.0**-30, nothing):
        clusters = min(k, x.shape[1])
        for init in (starts(x.shape[0], x.shape[1], clusters), "farthest"):
            given = dict(init=init, sort=True)
            one, other = (Target("cuda", path).run(algorithm, x, clusters, **given) for path in ("resident", "spread"))
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


def small(report: Report) -> None:
    """Every kernel once on small shapes, for compute-sanitizer."""
    paths = [target for target in targets() if target.path]
    for target in paths:
        for dtype in DTYPES:
            x, tiny = blobs(2, 70, 40, dtype), blobs(2, 70, 40, dtype, scale=2.0**-24)
            ones = on_device(torch.ones(2, 40, 9, dtype=dtype))
            centers = on_device(torch.randn(2, 8, 40))
            for name, algorithm, tokens, k, given in (
                *(("indices", algorithm, x, 24, dict(init=starts(2, 70, 24))) for algorithm in ALGORITHMS),
                *(("farthest", algorithm, x, 24, dict(init="farthest")) for algorithm in ALGORITHMS),
                ("repair", "kmeans", ones, 8, dict(init=starts(2, 40, 8), sort=True)),
                ("scaled twice", "kmeans", tiny, 8, dict(init=starts(2, 70, 8))),
                ("centers", "kmeans", x, 8, dict(init=centers)),
            ):
                call = f"{target} {str(dtype)[6:]} {algorithm} {name}"
                report.check(call, lambda: done(target.run(algorithm, tokens, k, num_iters=2, **given)))
    for backend in {target.backend for target in paths}:
        for dtype in DTYPES:
            report.check(f"{backend} pool and gradients {str(dtype)[6:]}", lambda: done(operators(backend, dtype)))
    gram = Target("cuda", "gram")
    if gram in paths:  # more tokens than threads for two columns: no groups of threads
        x, init = blobs(1, 1154, 8, torch.bfloat16), starts(1, 1154, 100)
        report.check(f"{gram} 1154 tokens", lambda: done(gram.run("kmeans", x, 100, init=init, num_iters=2)))
    done(None)


def operators(backend, dtype):
    """All operators but clustering, from tensors that were copied to the device."""

    def made(*shape, seed):
        return on_device(torch.randn(shape, generator=seeded(seed)).to(dtype))

    x, grad, back = made(2, 70, 40, seed=1), made(2, 24, 40, seed=2), made(2, 70, 40, seed=3)
    w = on_device(torch.rand(2, 70, generator=seeded(4)))
    labels = on_device(torch.randint(-1, 24, (2, 70), generator=seeded(5)))
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
    # What matters most first; forced paths at the first shape only.
    shapes = [(196, 384, 98), (196, 192, 98), (256, 384, 128), (196, 768, 49), (576, 768, 288)]
    batches, dtypes, kind = (1, 256, 8, 64), (torch.bfloat16, torch.float32), "real"
    if Place.rehearsal:
        shapes, batches, dtypes, kind = [(64, 32, 16)], (1, 4), (torch.float32,), "random"
    for dtype, (n, d, k), b in itertools.product(dtypes, shapes, batches):
        data = make(Problem("kmeans", b, n, d, k, tokens=kind, device=Place.device))
        x = data.x.to(dtype)
        if x.numel() * x.element_size() > 1 << 30:
            continue
        for target in targets():
            if target.path and (n, d, k) != shapes[0]:
                continue
            for algorithm, init in (("kmeans", data.init), ("kmeans", "farthest"), ("kmedoids", data.init)):
                if target.path in ("streaming", "direct") and isinstance(init, str):
                    continue
                start = init if isinstance(init, str) else "indices"
                name = f"{target} {algorithm} {b}x{n}x{d}->{k} {str(dtype)[6:]} {start}"
                report.check(name, lambda: measured(target, algorithm, x, k, init, data.tokens))


def measured(target, algorithm, x, k, init, tokens) -> dict:
    def call():
        return target.run(algorithm, x, k, init=init)

    found = {"wall_us": median_us(call), "tokens": tokens}
    if Place.device == "cuda":
        replayed, _ = captured(call)
        found["device_us"] = median_us(replayed.replay)
    return found


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
