"""The CUDA kernels' own source on the CPU (simulator/), against the float64 reference: every path and dtype.

The bodies that every backend shares run on the simulator too (the last test, on a part of their cases). All of them:
    python -m pytest --simulator tests/test_clustering.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import simulator
import torch
from helpers import assert_consistent, assert_identical, integer_tokens, positive_weights, spread_indices, tokens

from tokenpool_ext import reference
from tokenpool_ext.functional import Clusters
from tokenpool_ext.starts import initial

pytestmark = pytest.mark.skipif(simulator.compiler() is None, reason="no C++ compiler on PATH")
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def library():
    return simulator.build()


@pytest.fixture(params=simulator.PATHS)
def path(request):
    return request.param


@pytest.fixture(params=["kmeans", "kmedoids"])
def algorithm(request):
    return request.param


@pytest.fixture(params=list(simulator.DTYPES), ids=lambda d: str(d)[6:])
def dtype(request):
    return request.param


def cluster(sim, algorithm, x, init, k, *, weights=None, mask=None, counts=None, iters=3, sort=False) -> Clusters:
    return Clusters(*getattr(sim, algorithm)(x, weights, mask, counts, init, k, iters, sort))


def expected(algorithm, x, init, k, *, weights=None, mask=None, counts=None, iters=3, sort=False) -> Clusters:
    init = init if init.dtype == torch.int64 else init.double()
    weights = None if weights is None else weights.double()
    return Clusters(*getattr(reference, algorithm)(x.double(), weights, mask, counts, init, k, iters, sort))


def assert_close(got: Clusters, want: Clusters, x, *, flips=0.03):
    """Chaotic iterations: few labels differ, inertia agrees (contract section 8)."""
    assert (got.assignment != want.assignment).float().mean() <= flips
    torch.testing.assert_close(got.inertia.double(), want.inertia, rtol=1e-3 if flips == 0 else 2e-2, atol=1e-5)
    if bool((got.assignment == want.assignment).all()):
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[x.dtype]
        torch.testing.assert_close(got.centers.double(), want.centers, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.mass.double(), want.mass, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.medoids, want.medoids)


@pytest.mark.parametrize("shape", [(2, 37, 20, 7), (1, 1, 1, 1), (2, 9, 3, 9), (1, 70, 33, 40)], ids=str)
def test_clustering_agrees_with_the_reference(library, path, algorithm, dtype, shape):
    b, n, d, k = shape
    sim = simulator.Simulator(library, path=path)
    x = tokens(b, n, d, dtype, groups=max(1, k // 2))
    w = positive_weights(b, n) if n == 37 else None
    init = spread_indices(b, n, k)
    one = cluster(sim, algorithm, x, init, k, weights=w, iters=1)
    assert sim.taken == path
    assert_consistent(one, x, k, weights=w, algorithm=algorithm, init=init)
    got = cluster(sim, algorithm, x, init, k, weights=w, iters=4)
    assert_consistent(got, x, k, weights=w, algorithm=algorithm)
    assert_close(got, expected(algorithm, x, init, k, weights=w, iters=4), x)


def test_more_than_one_tile_of_tokens_and_centers(library, path, algorithm):
    sim = simulator.Simulator(library, path=path)
    x, init = tokens(1, 140, 12, torch.bfloat16, groups=30), spread_indices(1, 140, 70)
    got = cluster(sim, algorithm, x, init, 70, iters=2)
    assert_consistent(got, x, 70, algorithm=algorithm)
    assert_close(got, expected(algorithm, x, init, 70, iters=2), x)


def test_given_centers(library, path, dtype):
    sim = simulator.Simulator(library, path=path)
    x, start = tokens(2, 33, 9, dtype, groups=5), tokens(2, 5, 9, seed=4)
    got = cluster(sim, "kmeans", x, start, 5)
    assert_consistent(got, x, 5)
    assert_close(got, expected("kmeans", x, start, 5), x)


def test_mask_counts_weights_and_sort(library, path, algorithm):
    sim = simulator.Simulator(library, path=path)
    x, w = tokens(3, 26, 11, groups=6), positive_weights(3, 26)
    mask = torch.rand(3, 26, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[2] = False
    x[~mask] = float("nan")
    counts = torch.tensor([4, 6, 2])
    first = torch.stack(
        [torch.where(mask[b])[0][:6] if mask[b].any() else torch.zeros(6, dtype=torch.int64) for b in range(3)]
    )
    for sort in (False, True):
        got = cluster(sim, algorithm, x, first, 6, weights=w, mask=mask, counts=counts, sort=sort)
        want = expected(algorithm, x, first, 6, weights=w, mask=mask, counts=counts, sort=sort)
        assert_close(got, want, x, flips=0)
        assert (
            bool((got.assignment[2] == -1).all())
            and bool((got.centers[2] == 0).all())
            and bool((got.mass[2] == 0).all())
        )
        if algorithm == "kmedoids":
            assert bool((got.medoids[2] == -1).all())


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_tokens_are_repaired_to_k_clusters(library, path, algorithm, value):
    sim = simulator.Simulator(library, path=path)
    x = torch.full((2, 17, 5), value)
    got = cluster(sim, algorithm, x, torch.zeros(2, 6, dtype=torch.int64), 6)
    assert_consistent(got, x, 6, algorithm=algorithm)
    assert_identical(got.assignment, expected(algorithm, x, torch.zeros(2, 6, dtype=torch.int64), 6).assignment)


@pytest.mark.parametrize("power", [-100, -40, 30, 125])
def test_scaling_by_a_power_of_two_changes_no_bit(library, path, algorithm, power):
    """Also the second product of an image, when the first leaves the safe range."""
    sim = simulator.Simulator(library, path=path)
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens(1, 20, 6, dtype, groups=4).clamp(-3.9, 3.9)
        x = torch.where(x.abs() < 2.0**-5, 2.0**-5, x)
        init = spread_indices(1, 20, 4)
        plain = cluster(sim, algorithm, x, init, 4)
        scaled = cluster(sim, algorithm, torch.ldexp(x, torch.tensor(power)).to(dtype), init, 4)
        assert_identical(plain.assignment, scaled.assignment)
        assert_identical(plain.centers, torch.ldexp(scaled.centers.double(), torch.tensor(-power)).to(dtype))
        assert bool(torch.isfinite(scaled.inertia).all())
        mixed = torch.cat([x, torch.ldexp(x, torch.tensor(power)).to(dtype), x])  # images that need it beside others
        together = cluster(sim, algorithm, mixed, init.expand(3, -1), 4)
        for i, alone in enumerate((plain, scaled, plain)):
            assert_identical(alone, Clusters(*[None if t is None else t[i : i + 1] for t in together]))


def test_numbers_that_are_not_finite_stay_in_their_image(library, path, algorithm):
    sim = simulator.Simulator(library, path=path)
    x, init = tokens(3, 24, 6, groups=5), spread_indices(3, 24, 5)
    clean = cluster(sim, algorithm, x, init, 5)
    for bad in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[1, 3, 2] = bad
        got = cluster(sim, algorithm, dirty, init, 5)
        assert bool(((got.assignment >= 0) & (got.assignment < 5)).all())
        for a, b in zip(got, clean):
            if a is not None:
                assert_identical(a[::2], b[::2])


def test_no_bit_depends_on_batch_order_passes_layout_or_device(library, path, algorithm):
    sim = simulator.Simulator(library, path=path)
    x, w, init = tokens(3, 29, 16, torch.bfloat16, groups=5), positive_weights(3, 29), spread_indices(3, 29, 5)
    base = cluster(sim, algorithm, x, init, 5, weights=w)
    for other in (
        simulator.Simulator(library, path=path, reverse=True),
        simulator.Simulator(library, path=path, images_per_pass=2),
        simulator.Simulator(library, (8, 6), path=path),
        simulator.Simulator(library, (12, 0), path=path),
    ):
        assert_identical(base, cluster(other, algorithm, x, init, 5, weights=w))
    alone = cluster(sim, algorithm, x[1:2], init[1:2], 5, weights=w[1:2])
    assert_identical(alone, Clusters(*[None if t is None else t[1:2] for t in base]))
    assert_identical(base, cluster(sim, algorithm, x, torch.cat([init, init], 1)[:, :5], 5, weights=w))
    shared = init[:1].expand(3, 5)
    assert_identical(cluster(sim, algorithm, x, shared, 5), cluster(sim, algorithm, x, shared.contiguous(), 5))
    wide = torch.zeros(3, 29, 19, dtype=x.dtype)
    wide[:, :, 3:] = x
    assert_identical(base, cluster(sim, algorithm, wide[:, :, 3:], init, 5, weights=w))
    assert_identical(base, cluster(sim, algorithm, x.transpose(1, 2).contiguous().transpose(1, 2), init, 5, weights=w))
    assert_identical(
        cluster(sim, algorithm, x, init, 5), cluster(sim, algorithm, x, init, 5, weights=torch.ones(3, 29))
    )


def test_paths_agree_on_integers(library, algorithm):
    """Small integers, clusters of two: all arithmetic is exact, so the paths agree to the last bit."""
    x = torch.randint(-4, 5, (2, 16, 8), generator=torch.Generator().manual_seed(0)).float()
    x = torch.cat([x, x], 1)
    init = torch.arange(16).expand(2, 16).contiguous()
    results = [
        cluster(simulator.Simulator(library, path=p), algorithm, x.to(t), init, 16, iters=1)
        for p in simulator.PATHS
        for t in HALF
    ]
    for other in results[1:]:
        assert_identical(results[0].assignment, other.assignment)
        assert_identical(results[0].mass, other.mass)


@pytest.mark.parametrize("kind", ["line", "ties", "weighted", "unusual"])
@pytest.mark.parametrize("clusters", [5, 40])
def test_comparing_only_what_moved_changes_no_bit(library, algorithm, kind, clusters):
    """Built to compare every token with every center in every iteration, the kernels give the same bits."""
    n, given = 100, {}
    x = tokens(2, n, 6, torch.float32, seed=clusters)
    if kind == "ties":
        x = integer_tokens(2, n, 2, low=0, high=4)
    else:
        x = 0.2 * x.cumsum(1)  # a crooked line, on which centers move for long
    if kind == "weighted":
        given = dict(
            weights=positive_weights(2, n),
            mask=torch.rand(2, n, generator=torch.Generator().manual_seed(3)) > 0.2,
            counts=torch.tensor([clusters, clusters - 2]),
            sort=True,
        )
        given["weights"][:, ::7] = 0.0
    if kind == "unusual":
        x[0, 5, 2], x[1, 9], x[1, 17] = float("nan"), float("inf"), -(2.0**60)
    starts = [spread_indices(2, n, clusters), torch.empty(2, 0, dtype=torch.int64), spread_indices(2, n, clusters)]
    starts[2][:, 1::2] = starts[2][:, : clusters // 2 * 2 : 2]  # pairs that start alike
    if algorithm == "kmeans":
        starts.append(tokens(2, clusters, x.shape[2], seed=4))
    everything = simulator.build("compare_all")
    for path in ("resident", "gram", "spread"):
        for init in starts:
            some, each = (
                cluster(simulator.Simulator(built, path=path), algorithm, x, init, clusters, iters=6, **given)
                for built in (library, everything)
            )
            assert_identical(some, each)


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
def test_a_tie_between_a_center_that_moved_and_one_that_stayed(library, path, dtype):
    """Token 3 is 4 from centers 0 and 1; then 0 moves away and 2 comes to a distance of 4: the lowest is 1, which
    stayed."""
    x = torch.tensor([[[-4, 0], [4, 0], [0, 6], [0, 0], [-12, 0], [-12, 0], [0, 2]]], dtype=dtype)
    sim = simulator.Simulator(library, path=path)
    assert cluster(sim, "kmeans", x, torch.tensor([[0, 1, 2]]), 3, iters=1).assignment.tolist() == [
        [0, 1, 2, 0, 0, 0, 2]
    ]
    assert cluster(sim, "kmeans", x, torch.tensor([[0, 1, 2]]), 3, iters=2).assignment.tolist() == [
        [0, 1, 2, 1, 0, 0, 2]
    ]


def few_or_many(library, algorithm, x, init, k, **given):
    """The same call on a device with many multiprocessors (path "spread") and on one with none to spare
    ("resident")."""
    results = []
    for path in ("resident", "spread"):
        sim = simulator.Simulator(library, sm_count=x.shape[0] - (path == "resident"))
        if x.shape[0] == 1:
            sim.path = path
        results.append(cluster(sim, algorithm, x, init, k, **given))
        assert sim.taken == path
    return results


@pytest.mark.parametrize("shape", [(2, 41, 24, 9), (2, 100, 70, 40), (1, 33, 130, 33), (2, 7, 1, 3)], ids=str)
@pytest.mark.parametrize("start", ["indices", "farthest", "centers"])
def test_spread_over_the_device_gives_the_same_bits(library, algorithm, dtype, shape, start):
    b, n, d, k = shape
    if start == "centers" and algorithm == "kmedoids":
        pytest.skip("K-Medoids starts from tokens")
    x = tokens(b, n, d, dtype, groups=max(1, k // 2), offset=2.0)
    init = {
        "indices": spread_indices(b, n, k),
        "farthest": torch.empty(b, 0, dtype=torch.int64),
        "centers": tokens(b, k, d, seed=3),
    }[start]
    assert_identical(*few_or_many(library, algorithm, x, init, k, iters=5))
    x, w = tokens(b, n, d + 3, dtype, seed=1)[:, :, 3:], positive_weights(b, n)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) > 0.2
    mask[:, 0] = True
    w[:, 0] = 0.0
    x[~mask] = float("nan")
    if start == "indices":
        init = torch.zeros(b, k, dtype=torch.int64)
    counts = torch.arange(b) + max(1, k - 2)
    assert_identical(*few_or_many(library, algorithm, x, init, k, weights=w, mask=mask, counts=counts, sort=True))


def test_spread_gives_the_same_bits_on_unusual_numbers(library, algorithm, dtype):
    """Images that are formed twice (tiny, huge, both), zeros, constants, NaN and infinity: bit for bit what "resident"
    gives."""
    x, huge = tokens(8, 40, 36, torch.float32, groups=6), {torch.float16: 2.0**12}.get(dtype, 2.0**125)
    x = x.clamp(-3.9, 3.9)
    for image, factor in enumerate((2.0**-22, 2.0**-120, huge, 0.0, 1.0, 1.0, 1.0, 1.0)):
        x[image] *= factor
    x[4] = 3.7
    x[5, 3, 2] = float("nan")
    x[6, 5] = float("inf")
    x[7, 1] *= 2.0**-60
    for init in (spread_indices(8, 40, 9), torch.empty(8, 0, dtype=torch.int64)):
        resident, spread = few_or_many(library, algorithm, x.to(dtype), init, 9, iters=4)
        assert_identical(resident, spread)
        assert bool(((spread.assignment >= 0) & (spread.assignment < 9)).all())


def test_an_image_alone_has_the_bits_it_has_in_a_batch(library, algorithm):
    """The planner's own choice: one image of five is spread, five of five are not."""
    x, w, init = tokens(5, 45, 20, torch.bfloat16, groups=6), positive_weights(5, 45), spread_indices(5, 45, 8)
    sim = simulator.Simulator(library, sm_count=2)
    whole = cluster(sim, algorithm, x, init, 8, weights=w)
    assert sim.taken == "resident"
    for i in (0, 4):
        alone = cluster(sim, algorithm, x[i : i + 1], init[i : i + 1], 8, weights=w[i : i + 1])
        assert sim.taken == "spread"
        assert_identical(alone, Clusters(*[None if t is None else t[i : i + 1] for t in whole]))


FARTHEST_CASES = {
    "plain": dict(shape=(2, 40, 5, 9)),
    "weights": dict(shape=(2, 40, 5, 9), weights="random"),
    "integer weights, many ties": dict(shape=(2, 33, 2, 12), weights="integers"),
    "no weight at all": dict(shape=(1, 20, 3, 6), weights="zeros"),
    "mask and counts": dict(shape=(4, 30, 4, 8), weights="integers", masked=True),
    "duplicates": dict(shape=(2, 30, 1, 12), high=3),
    "one cluster": dict(shape=(2, 9, 3, 1)),
    "as many as tokens": dict(shape=(1, 17, 2, 17), high=3),
    "several blocks": dict(shape=(1, 300, 2, 5)),
}


def with_whole_mean(x, mask):
    """One token of each image changed so that its mean is whole: subtracting it (float32) then rounds nothing."""
    for image, valid in zip(x, torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask):
        if valid.any():
            image[valid.nonzero()[-1, 0]] -= image[valid].sum(0) % valid.sum()
    return x


@pytest.mark.parametrize("case", FARTHEST_CASES)
def test_farthest_start_inside_the_kernels(library, path, algorithm, case):
    """Small integers, one iteration: exactly what the start of tokenpool_ext.starts gives, on every path and dtype."""
    given = {"weights": None, "masked": False, "high": 5, **FARTHEST_CASES[case]}
    b, n, d, k = given["shape"]
    generator = torch.Generator().manual_seed(n)
    x = integer_tokens(b, n, d, high=given["high"])
    w = {
        None: None,
        "random": torch.rand(b, n, generator=generator),
        "zeros": torch.zeros(b, n),
        "integers": torch.randint(0, 3, (b, n), generator=generator).float(),
    }[given["weights"]]
    mask = counts = None
    if given["masked"]:
        mask = torch.rand(b, n, generator=generator) > 0.4
        mask[3] = False
        mask[2] = torch.arange(n) < 3  # fewer tokens than clusters
        counts = torch.tensor([8, 1, 8, 2])
    x = with_whole_mean(x, mask)
    if mask is not None:
        x[~mask] = float("nan")
    first = initial("farthest", x, k, w, mask, counts, None, True)
    empty = torch.empty(b, 0, dtype=torch.int64)
    for dtype in simulator.DTYPES:
        sim = simulator.Simulator(library, path=path)
        named = cluster(sim, algorithm, x.to(dtype), first, k, weights=w, mask=mask, counts=counts, iters=1)
        assert_identical(
            cluster(sim, algorithm, x.to(dtype), empty, k, weights=w, mask=mask, counts=counts, iters=1), named
        )
        assert sim.taken == path


def test_farthest_start_reaches_the_loss_of_the_reference(library, path, algorithm, dtype):
    sim = simulator.Simulator(library, path=path)
    x, w = tokens(2, 60, 12, dtype, groups=8, offset=3.0), positive_weights(2, 60)
    got = cluster(sim, algorithm, x, torch.empty(2, 0, dtype=torch.int64), 12, weights=w, iters=4)
    assert_consistent(got, x, 12, weights=w, algorithm=algorithm)
    want = expected(
        algorithm, x, initial("farthest", x.double(), 12, w.double(), None, None, None, True), 12, weights=w, iters=4
    )
    torch.testing.assert_close(got.inertia.double(), want.inertia, rtol=0.05, atol=1e-5)


def test_farthest_start_with_bad_numbers_stays_in_its_image(library, path):
    sim, empty = simulator.Simulator(library, path=path), torch.empty(3, 0, dtype=torch.int64)
    x = tokens(3, 24, 6, groups=5)
    clean = cluster(sim, "kmeans", x, empty, 5)
    for bad in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[1, ::5] = bad
        got = cluster(sim, "kmeans", dirty, empty, 5)
        assert bool(((got.assignment >= 0) & (got.assignment < 5)).all())
        for a, b in zip(got, clean):
            if a is not None:
                assert_identical(a[::2], b[::2])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("limit", [0, 512], ids=["shared", "global"])
def test_pool_and_its_gradient(library, dtype, weighted, limit):
    sim = simulator.Simulator(library, shared_limit=limit)
    b, n, d, k = 2, 41, 13, 7
    x, g = tokens(b, n, d, dtype), tokens(b, k, d, dtype, seed=3)
    labels = torch.randint(-1, k + 2, (b, n), generator=torch.Generator().manual_seed(2))
    labels[0][labels[0] == 2] = 3  # an empty cluster
    w = positive_weights(b, n) if weighted else None
    if weighted:
        w[1][labels[1] == 4] = 0.0
    w64 = None if w is None else w.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    centers, mass = sim.pool(x, labels, w, k)
    want, want_mass = reference.pool(x.double(), labels, w64, k)
    torch.testing.assert_close(centers.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mass.double(), want_mass, rtol=1e-5, atol=1e-6)
    before = g.clone()
    grad_x, grad_w = sim.pool_backward(g, x, centers, labels, w, mass)
    want_x, want_w = reference.pool_backward(g.double(), x.double(), centers.double(), labels, w64, mass.double())
    torch.testing.assert_close(grad_x.double(), want_x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_w.double(), want_w, rtol=1e-4, atol=1e-4)
    assert_identical(g, before)
    spread = g.transpose(1, 2).contiguous().transpose(1, 2)
    assert_identical(grad_x, sim.pool_backward(spread, x, centers, labels, w, mass)[0])


def test_unpool_and_its_gradient(library, dtype):
    sim = simulator.Simulator(library)
    labels = torch.randint(-1, 5, (2, 23), generator=torch.Generator().manual_seed(4))
    centers, grad = tokens(2, 5, 10, dtype), tokens(2, 23, 10, dtype, seed=5)
    assert_identical(sim.unpool(centers, labels), reference.unpool(centers, labels))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        sim.unpool_backward(grad, labels, 5).double(),
        reference.unpool_backward(grad.double(), labels, 5),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("shape", [(2, 3, 21, 37, 16), (1, 2, 140, 70, 12)], ids=str)
def test_attention_received(library, dtype, shape):
    sim = simulator.Simulator(library)
    b, h, nq, n, d = shape
    q, k = tokens(b * h, nq, d, dtype).view(b, h, nq, d), tokens(b * h, n, d, dtype, seed=1).view(b, h, n, d)
    want = reference.attention_received(q.double(), k.double(), 0.25, None)
    torch.testing.assert_close(sim.attention_received(q, k, 0.25, None).double(), want, rtol=1e-4, atol=1e-6)
    lse = torch.logsumexp(0.25 * q.float() @ k.float().transpose(-1, -2), -1)
    torch.testing.assert_close(sim.attention_received(q, k, 0.25, lse).double(), want, rtol=1e-4, atol=1e-6)
    heads_last = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_identical(sim.attention_received(heads_last, k, 0.25, lse), sim.attention_received(q, k, 0.25, lse))


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Output of the check program: every kernel on small shapes from exactly sized buffers, one line of checksums
    each."""
    folder = tmp_path_factory.mktemp("checks")

    def run(sanitizer, *arguments):
        program = folder / f"check_{sanitizer or 'plain'}"
        if not program.exists():
            command = simulator.command(sanitizer, program, simulator.HERE / "check.cpp", *simulator.units())
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and "cannot find" in done.stderr:
                pytest.skip(f"the {sanitizer} sanitizer's library is not installed")
            assert done.returncode == 0, done.stderr
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=600)
        # AddressSanitizer announces that it watches fibers with care; nothing else may be said
        said = [line for line in done.stderr.splitlines() if line and "makecontext/swapcontext" not in line]
        assert done.returncode == 0 and not said, done.stderr[:6000]
        return done.stdout

    return run


def test_the_order_of_threads_and_blocks_changes_nothing(checks):
    assert checks("") == checks("", "reverse")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_no_race_and_no_bad_index(checks, sanitizer):
    assert checks(sanitizer) == checks("")


@pytest.mark.parametrize(
    "sanitizer,fault,message",
    [
        ("", "fine", None),
        ("thread", "fine", None),
        ("address", "fine", None),
        ("", "deadlock", "left the kernel while others wait"),
        ("", "divergent", "deadlock"),
        ("thread", "race", "data race"),
        ("address", "bounds", "heap-buffer-overflow"),
    ],
)
def test_the_simulator_finds_faults(tmp_path, sanitizer, fault, message):
    """A missing barrier, a bad index, a barrier or warp operation that some threads skip."""
    program = tmp_path / "faults"
    command = simulator.command(sanitizer, program, simulator.HERE / "faults.cpp")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"the {sanitizer} sanitizer's library is not installed")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program), fault], capture_output=True, text=True, timeout=120)
    if message is None:
        assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr
    else:
        assert done.returncode != 0 and message in done.stderr, done.stderr


def test_the_bodies_every_backend_shares_pass_on_the_simulator(library, tmp_path):
    """On all four paths, as many cases as it takes for every value of every parameter to occur."""
    report, here = tmp_path / "report.xml", Path(__file__).parent
    bodies = [str(here / f"test_{name}.py") for name in ("clustering", "pool", "attention_received", "exactness")]
    options = ["-p", "no:cacheprovider", "--simulator", "--cover", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *bodies],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = [case.get("name") for case in ElementTree.parse(report).iter("testcase") if len(case) == 0]
    assert len(passed) >= 200, len(passed)
    for path in simulator.PATHS:
        assert sum(f"simulator_{path}" in name for name in passed) >= 40, path


def test_means_of_many_members(library, dtype):
    """Constants come back to the bit, the error does not grow with the members, and a weight of zero hides a NaN."""
    sim, labels = simulator.Simulator(library), torch.zeros(1, 5000, dtype=torch.int64)
    x = torch.full((1, 5000, 3), 1000.1).to(dtype)
    assert_identical(sim.pool(x, labels, None, 1)[0], x[:, :1])
    weights = positive_weights(1, 5000)
    weights[0, ::7] = 0.0
    x = tokens(1, 5000, 3, dtype, offset=1.0, spread=0.01)
    x[0, ::7] = float("nan")
    got, mass = sim.pool(x, labels, weights, 1)
    kept = weights[0].double() > 0
    share = weights[0, kept].double() / weights.double().sum()
    want = (share[:, None] * x[0, kept].double()).sum(0)
    assert float((got[0, 0].double() - want).abs().max()) < (1e-6 if dtype == torch.float32 else 8e-3)
    assert float((mass - weights.double().sum()).abs()) < 1e-6 * float(mass)
