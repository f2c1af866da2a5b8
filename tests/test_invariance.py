"""Same bits from run to run, for any batch mates, slot, batch size and number of threads (contract 7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    TOLERANCES,
    assert_consistent,
    assert_identical,
    f64,
    integer_tokens,
    positive_weights,
    spread_indices,
    take,
    tokens,
)

import tokenpool_ext as tp
from bench.gpu_checks import captured

# The last ones are large enough for the threads of a CPU to share one image and for tiles to have a rest.
SHAPES = [
    (20, 5, 4),
    pytest.param((61, 33, 17), marks=pytest.mark.large),
    pytest.param((300, 24, 40), marks=pytest.mark.large),
    pytest.param((1100, 16, 6), marks=pytest.mark.large),
]
OPS = ["kmeans", "kmedoids", "pool", "unpool", "attention_received"]


def problem(op, backend, shape, dtype=torch.float32, B=5):
    """(function of images -> result, number of images): `function(index)` runs the op on x[index]."""
    N, D, K = shape
    x, w = tokens(B, N, D, dtype, backend.device), positive_weights(B, N, TOLERANCES[dtype].acc, backend.device)
    init = spread_indices(B, N, K, backend.device)
    mask = torch.arange(N, device=backend.device) < torch.linspace(K, N, B, device=backend.device).long()[:, None]
    a = torch.from_numpy(np.random.default_rng(0).integers(-1, K, (B, N))).to(backend.device)
    name = backend.name
    if op == "pool":
        return lambda i: (tp.pool(x[i], a[i], K, weights=w[i], backend=name),)
    if op == "unpool":
        return lambda i: (tp.unpool(x[i, :K], a[i], backend=name),)
    if op == "attention_received":
        q = x.reshape(B, 1, N, D)
        return lambda i: (tp.attention_received(q[i], q[i].flip(2), backend=name),)
    function = getattr(tp, op)
    return lambda i: function(x[i], K, weights=w[i], mask=mask[i], init=init[i], num_iters=4, backend=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_run_to_run(backend, op, shape):
    run = problem(op, backend, shape, B=2)
    first = run([0, 1])
    for _ in range(2 if backend.interpreted else 20):
        assert_identical(first, run([0, 1]), what=op)


@pytest.mark.kernels  # library products may pick another kernel for another batch size, as the documents say
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_batch_mates_slot_and_size(backend, op, shape, dtype):
    run = problem(op, backend, shape, dtype)
    together = run(list(range(5)))
    for order in ([0], [4], [3, 1], [4, 3, 2, 1, 0], [2, 2, 2, 2, 2, 2, 2, 2, 2])[: 3 if backend.interpreted else 5]:
        got = run(order)
        for slot, image in enumerate(order):
            assert_identical(
                take(together, slice(image, image + 1)),
                take(got, slice(slot, slot + 1)),
                what=f"{op}, image {image} at slot {slot} of {len(order)}",
            )


@pytest.mark.kernels
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_number_of_threads(backend, op, shape, batch, threads):
    """One image a thread, or all threads in one image: the same bits."""
    if backend.name != "cpu":
        pytest.skip("the CPU kernels' promise")
    run = problem(op, backend, shape, B=batch)
    threads(1)
    want = run(list(range(batch)))
    for count in (2, 3, 5):
        threads(count)
        for _ in range(3):
            assert_identical(want, run(list(range(batch))), what=f"{op} with {count} threads")


@pytest.mark.kernels
@pytest.mark.parametrize("op", ["kmeans", "kmedoids", "pool", "unpool"])
def test_backward(backend, op, threads):
    B, N, D, K = (5, 12, 3, 4) if backend.interpreted else (5, 40, 6, 7)
    x, w = tokens(B, N, D, device=backend.device), positive_weights(B, N, device=backend.device)
    grad = tokens(B, N if op == "unpool" else K, D, device=backend.device, seed=3)
    a = torch.from_numpy(np.random.default_rng(0).integers(-1, K, (B, N))).to(backend.device)

    def run(i):
        xi, wi = x[i].clone().requires_grad_(), w[i].clone().requires_grad_()
        out = {
            "kmeans": lambda: tp.kmeans(xi, K, weights=wi, backend=backend.name).centers,
            "kmedoids": lambda: tp.kmedoids(xi, K, weights=w[i], backend=backend.name).centers,
            "pool": lambda: tp.pool(xi, a[i], K, weights=wi, backend=backend.name),
            "unpool": lambda: tp.unpool(xi[:, :K], a[i], backend=backend.name),
        }[op]()
        inputs = (xi, wi) if op in ("kmeans", "pool") else (xi,)
        return torch.autograd.grad(out, inputs, grad[i])

    together = run(list(range(B)))
    for order in ([1], [4, 0], [3, 3, 3]):
        got = run(order)
        for slot, image in enumerate(order):
            assert_identical(take(together, image), take(got, slot), what=f"{op} backward")
    if backend.name == "cpu":
        for count in (1, 3):
            threads(count)
            assert_identical(together, run(list(range(B))), what=f"{op} backward with {count} threads")


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_deterministic_mode_is_accepted(backend, algorithm):
    x = tokens(2, 20, 4, device=backend.device).requires_grad_()
    want = getattr(tp, algorithm)(x, 5, backend=backend.name)
    torch.use_deterministic_algorithms(True)
    try:
        got = getattr(tp, algorithm)(x, 5, backend=backend.name)
        got.centers.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_identical([t if t is None else t.detach() for t in want], [t if t is None else t.detach() for t in got])


# The two ways to compute the same thing (contract 4) ---------------------------------------------------------------


def on_path(monkeypatch, path, function):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
    return function()


@pytest.fixture
def both_paths(monkeypatch):
    if tp.backends()["cpu"] != "ok":
        pytest.skip(f"no cpu backend: {tp.backends()['cpu']}")
    return lambda function: tuple(on_path(monkeypatch, path, function) for path in ("gram", "direct"))


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(64, 8, 8), (197, 48, 49), (256, 24, 128), (90, 130, 3)], ids=str)
def test_gram_and_direct_agree(both_paths, algorithm, dtype, shape):
    N, D, K = shape
    B = 6
    x, w = tokens(B, N, D, dtype, groups=K), positive_weights(B, N, TOLERANCES[dtype].acc)
    init = spread_indices(B, N, K)

    def run(t):
        return getattr(tp, algorithm)(x, K, weights=w, init=init, num_iters=t, backend="cpu")

    gram, direct = both_paths(lambda: run(1))
    for result in (gram, direct):
        assert_consistent(result, x, K, weights=w, algorithm=algorithm, init=init)
    assert (gram.assignment != direct.assignment).float().mean() <= 0.01
    gram, direct = both_paths(lambda: run(5))
    ratio = f64(gram.inertia) / f64(direct.inertia) - 1
    limit = 1e-10 if dtype == torch.float64 else 5e-3
    assert abs(ratio.mean()) <= limit, f"inertia of gram over direct: {ratio}"


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_gram_and_direct_are_equal_on_integers(both_paths, algorithm):
    """Ties and repairs in exact arithmetic: not one label differs in the first iteration."""
    for seed in range(5):
        x = integer_tokens(8, 32, 3, seed=seed, low=-2, high=3)
        init = torch.from_numpy(np.random.default_rng(seed).integers(0, 32, (8, 6)))
        w = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (8, 32))).float()
        gram, direct = both_paths(
            lambda: getattr(tp, algorithm)(x, 6, weights=w, init=init, num_iters=1, backend="cpu")
        )
        reference = getattr(tp, algorithm)(x, 6, weights=w, init=init, num_iters=1, backend="reference")
        assert_identical(gram.assignment, direct.assignment)
        assert_identical(gram.assignment, reference.assignment)
        assert_identical(gram.mass, direct.mass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("n,d,k", [(1, 1, 1), (5, 0, 2), (25, 3, 7), (50, 200, 49), (97, 385, 20), (260, 33, 130)])
def test_sharing_bounds_changes_no_bit(monkeypatch, algorithm, dtype, n, d, k):
    """In large problems several centers share a bound: other distances are computed, to the same end."""
    if tp.backends()["cpu"] != "ok":
        pytest.skip("no cpu backend")
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, n, d, generator=generator).to(dtype)
    w = torch.rand(3, n, generator=generator)
    starts = [None, "farthest"] + ([torch.randn(3, k, d, generator=generator)] if algorithm == "kmeans" else [])
    for init in starts:
        got = {}
        for path in ("direct", "grouped"):
            monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
            got[path] = getattr(tp, algorithm)(x, k, weights=w, init=init, backend="cpu")
        assert_identical([t for t in got["direct"] if t is not None], [t for t in got["grouped"] if t is not None])


@pytest.mark.parametrize("path", ["gram", "direct", "grouped"])
def test_an_unknown_path_is_named(monkeypatch, path):
    if tp.backends()["cpu"] != "ok":
        pytest.skip("no cpu backend")
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path + "s")
    with pytest.raises((ValueError, RuntimeError), match="TOKENPOOL_EXT_CPU_PATH"):
        tp.kmeans(tokens(1, 8, 3), 2, backend="cpu")


# GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_no_host_synchronisation(backend, algorithm):
    if backend.device != "cuda":
        pytest.skip("a GPU's promise")
    x, w = tokens(4, 64, 16, device="cuda"), positive_weights(4, 64, device="cuda")

    def run():
        return getattr(tp, algorithm)(x, 8, weights=w, backend=backend.name)

    want = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_identical(want, got)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_captured_graph_replays(backend, algorithm):
    if backend.device != "cuda":
        pytest.skip("a GPU's promise")
    x = tokens(4, 64, 16, device="cuda")

    def run():
        return getattr(tp, algorithm)(x, 8, backend=backend.name)

    want = run()
    graph, got = captured(run)
    for _ in range(100):
        graph.replay()
    assert_identical(want, got)
