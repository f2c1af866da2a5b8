"""K-Means and K-Medoids share one contract; these bodies run for both, on every backend (contract 1-3, 5, 7, 8)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import (
    DTYPES,
    TOLERANCES,
    assert_consistent,
    assert_identical,
    assert_nearest,
    f64,
    integer_tokens,
    positive_weights,
    spread_indices,
    squared_distances,
    take,
    tokens,
    weighted_mean,
)

import tokenpool_ext as tp
from tokenpool_ext.starts import initial

pytestmark = pytest.mark.each_path
ALGORITHMS = ["kmeans", "kmedoids"]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    return request.param


def run(algorithm, backend, *args, **kwargs):
    return getattr(tp, algorithm)(*args, backend=backend.name, **kwargs)


def assert_follows(backend, algorithm, x, K, num_iters, *, init, weights=None):
    """The last of `num_iters` iterations follows from the one before it, up to ties.

    Two right answers part at a tie (two equal members of a medoid's cluster always tie), and the losses of two local
    optima may differ by anything.  So no other answer is a yardstick for many iterations: the one before is.
    """
    before, got = (
        run(algorithm, backend, x, K, weights=weights, init=init, num_iters=t) for t in (num_iters - 1, num_iters)
    )
    assert_consistent(got, x, K, weights=weights, algorithm=algorithm)
    X, W = f64(x), np.ones(x.shape[:2]) if weights is None else f64(weights)
    for b in range(len(x)):
        old = before.assignment[b].cpu().numpy()
        centers = X[b][before.medoids[b].cpu().numpy()]
        if algorithm == "kmeans":
            centers = np.stack([weighted_mean(X[b][old == j], W[b][old == j]) for j in range(K)])
        if len(np.unique(squared_distances(X[b], centers).argmin(1))) == K:  # nothing to repair
            assert_nearest(X[b], centers, got.assignment[b].cpu().numpy(), x.dtype, what=f"{num_iters}, image {b}:")


# One iteration from given tokens: exact up to ties ---------------------------------------------------------------

SMALL = [(3, 32, 8, 4), (2, 37, 3, 5), (1, 1, 1, 1), (2, 9, 4, 9), (2, 16, 5, 1), (2, 20, 1, 3), (1, 24, 15, 6)]
LARGE = [
    (2, 197, 64, 49),
    (1, 257, 192, 128),
    (2, 50, 80, 7),
    (1, 33, 1536, 8),
    (1, 577, 16, 288),
    (1, 40, 4096, 3),
    (3, 131, 7, 130),
]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SMALL + [pytest.param(s, marks=pytest.mark.large) for s in LARGE], ids=str)
def test_one_iteration(backend, algorithm, shape, dtype, weighted):
    B, N, D, K = shape
    x = tokens(B, N, D, dtype, backend.device)
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device) if weighted else None
    init = spread_indices(B, N, K, backend.device)
    if D == 1:  # rounding makes some values equal: start from distinct ones
        init = torch.stack([torch.from_numpy(np.unique(f64(x[b]).ravel(), return_index=True)[1][:K]) for b in range(B)])
        init = init.to(backend.device)
    got = run(algorithm, backend, x, K, weights=w, init=init, num_iters=1)
    assert_consistent(got, x, K, weights=w, algorithm=algorithm, init=init)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_each_iteration_follows_from_the_one_before(backend, algorithm, dtype, weighted):
    B, N, D, K = (4, 24, 4, 4) if backend.interpreted else (12, 64, 8, 8)
    x = tokens(B, N, D, dtype, backend.device, groups=K)
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device) if weighted else None
    for num_iters in (2, 5) if backend.interpreted else (2, 3, 6, 21):
        assert_follows(backend, algorithm, x, K, num_iters, init=spread_indices(B, N, K, backend.device), weights=w)


def test_large_common_offset_does_not_hurt(backend, algorithm):
    """Tokens far from the origin (DINOv2's last layer): float32 subtracts the mean before forming products."""
    B, N, D, K = 3, 32, 6, 4
    x = tokens(B, N, D, torch.float32, backend.device, groups=K, offset=100.0)
    init = spread_indices(B, N, K, backend.device)
    got = run(algorithm, backend, x, K, init=init, num_iters=1)
    assert_consistent(got, x, K, algorithm=algorithm, init=init)
    assert_follows(backend, algorithm, x, K, 5, init=init)


# Exact data: every backend must give the same bits ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_integer_ties_go_to_the_lowest_index(backend, algorithm, dtype, weighted):
    """Small integers, N a power of two: the products of iteration one are exact, so ties are ties, everywhere."""
    B, N, D, K = (3, 16, 3, 5) if backend.name == "triton" else (16, 32, 3, 6)
    x = integer_tokens(B, N, D, dtype, backend.device, low=-2, high=3)
    w = torch.from_numpy(np.random.default_rng(4).integers(1, 5, (B, N))).to(backend.device, TOLERANCES[dtype].acc)
    w = w if weighted else None
    init = spread_indices(B, N, K, backend.device)
    got = run(algorithm, backend, x, K, weights=w, init=init, num_iters=1)
    assert_consistent(got, x, K, weights=w, algorithm=algorithm)
    for b in range(B):
        want = oracle.cluster(
            f64(x[b]),
            K,
            init=init[b].cpu().numpy(),
            num_iters=1,
            algorithm=algorithm,
            exact=True,
            weights=None if w is None else f64(w[b]),
        )
        assert got.assignment[b].tolist() == want.assignment.tolist(), f"image {b}"
        assert got.mass[b].tolist() == want.mass.tolist()


@pytest.mark.parametrize("num_iters", [1, 2, 5])
def test_power_of_two_clusters_are_exact_to_the_last_bit(backend, algorithm, num_iters):
    """Well separated groups of 1, 2, 4 and 8 integer tokens: means, products and costs are all exact."""
    rng = np.random.default_rng(7)
    corners = 16 * np.array([[0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 0, 4], [4, 4, 4]])
    sizes = [1, 2, 4, 8, 1]
    rows = np.concatenate([c + rng.integers(-3, 4, (s, 3)) for c, s in zip(corners, sizes)])
    order = rng.permutation(len(rows))
    x = torch.from_numpy(rows[order]).to(backend.device, torch.float32)[None]
    group = np.repeat(np.arange(5), sizes)[order]
    init = torch.tensor([[int(np.flatnonzero(group == j)[-1]) for j in range(5)]], device=backend.device)
    got = run(algorithm, backend, x, 5, init=init, num_iters=num_iters)
    want = oracle.cluster(rows[order], 5, init=init[0].tolist(), num_iters=num_iters, algorithm=algorithm, exact=True)
    assert got.assignment[0].tolist() == want.assignment.tolist()
    assert got.centers[0].tolist() == want.centers.tolist()
    assert got.mass[0].tolist() == want.mass.tolist()
    assert got.inertia[0].item() == want.inertia
    if algorithm == "kmedoids":
        assert got.medoids[0].tolist() == want.medoids.tolist()


# Empty clusters ---------------------------------------------------------------------------------------------------


def case(values, init, *, weights=None, device="cpu", dtype=torch.float32):
    x = torch.tensor(values, dtype=dtype, device=device).reshape(1, len(values), -1)
    w = None if weights is None else torch.tensor([weights], dtype=dtype, device=device)
    return x, torch.tensor([init], device=device), w


REPAIRS = {
    # Two clusters start at equal tokens: the second is empty and takes the costliest token, 30 (cost 20^2).
    "farthest token": ([0, 0, 10, 30], [0, 1, 2], None, [0, 0, 2, 1]),
    # Three empty clusters, ascending: the costliest tokens go to 1, 2, 3 in falling order of cost.
    "ascending order": ([0, 0, 0, 0, 9, 5, 7, 1], [0, 1, 2, 3], None, [0, 0, 0, 0, 1, 3, 2, 0]),
    # Equal costs: the lowest token index first.
    "tie to lowest token": ([0, 0, 5, -5, 5, -5, 0, 0], [0, 1, 6], None, [0, 0, 1, 2, 0, 0, 0, 0]),
    # The cost is weighted: 100 * 3^2 beats 1 * 8^2.
    "weights decide": ([0, 0, 8, 3], [0, 1], [1, 1, 1, 100], [0, 0, 0, 1]),
    # Zero weight costs nothing: 8 is never the donor while 3 has weight.
    "zero weight": ([0, 0, 8, 3], [0, 1], [1, 1, 0, 1], [0, 0, 0, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", REPAIRS)
def test_repair_by_hand_kmeans(backend, name, dtype):
    values, init, weights, labels = REPAIRS[name]
    x, start, w = case(values, init, weights=weights, device=backend.device, dtype=dtype)
    w = None if w is None else w.to(TOLERANCES[dtype].acc)
    got = tp.kmeans(x, len(init), init=start, weights=w, num_iters=1, backend=backend.name)
    assert got.assignment[0].tolist() == labels
    assert_consistent(got, x, len(init), weights=w)


def test_repair_keeps_the_last_member_of_a_cluster(backend):
    """Cluster 0 holds 0 and 4, cluster 1 (far away) only 100: with 4 moved, 0 may not be taken as well."""
    x, _, _ = case([0, 4, 100, 101], [0], device=backend.device)
    start = torch.tensor([[[0.0], [100.5], [1e4], [1e4]]], device=backend.device)
    got = tp.kmeans(x, 4, init=start, num_iters=1, backend=backend.name)
    # costs: 16 (token 1), then .25 for tokens 2 and 3: the lowest index, 2, goes to cluster 3
    assert got.assignment[0].tolist() == [0, 2, 3, 1]


def test_medoids_named_twice_are_repaired(backend):
    """Two clusters start at the same token: it belongs to the lower one; the other takes the costliest token."""
    x, start, _ = case([0, 2, 7, 8], [1, 1, 2], device=backend.device)
    got = tp.kmedoids(x, 3, init=start, num_iters=1, backend=backend.name)
    assert got.assignment[0].tolist() == [1, 0, 2, 2]  # token 0 costs 4, token 3 costs 1
    assert got.medoids[0].tolist() == [1, 0, 2]


def test_a_medoid_belongs_to_its_own_cluster(backend):
    """Equal tokens as medoids: no repair is needed, each keeps its own."""
    x, start, _ = case([3, 3, 3, 9], [2, 0, 3], device=backend.device)
    got = tp.kmedoids(x, 3, init=start, num_iters=1, backend=backend.name)
    assert got.assignment[0].tolist() == [1, 0, 0, 2]
    assert got.medoids[0].tolist() == [1, 0, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-3])
@pytest.mark.parametrize("shape", [(7, 3, 4), (16, 2, 16), (9, 5, 1)], ids=str)
def test_constant_tokens_give_k_rows(backend, algorithm, value, dtype, shape):
    N, D, K = shape
    x = torch.full((2, N, D), value, dtype=dtype, device=backend.device)
    init = torch.arange(K, device=backend.device).expand(2, K)
    got = run(algorithm, backend, x, K, init=init)
    assert_consistent(got, x, K, algorithm=algorithm)
    rounding = 2 * float(torch.finfo(dtype).eps) * abs(value)
    assert (got.centers - value).abs().max().item() <= rounding
    if value == 0:
        assert got.inertia.tolist() == [0, 0]


def test_k_equals_n_gives_every_token_its_cluster(backend, algorithm):
    x = tokens(2, 12, 5, device=backend.device)
    init = spread_indices(2, 12, 12, backend.device)
    got = run(algorithm, backend, x, 12, init=init)
    assert_consistent(got, x, 12, algorithm=algorithm)
    for b in range(2):
        assert got.centers[b].equal(x[b, init[b]]), "a lone member is its own mean, exactly"
    assert f64(got.inertia).max() <= 12 * TOLERANCES[x.dtype].distance * f64(x).max() ** 2 * 5


def test_more_clusters_than_distinct_tokens(backend, algorithm):
    x = tokens(2, 3, 4, device=backend.device).repeat_interleave(5, 1)
    got = run(algorithm, backend, x, 8, init=spread_indices(2, 15, 8, backend.device))
    assert_consistent(got, x, 8, algorithm=algorithm)


# Weights ----------------------------------------------------------------------------------------------------------


def test_ones_equal_none_bit_for_bit(backend, algorithm):
    for dtype in backend.dtypes:
        x = tokens(2, 30, 6, dtype, backend.device)
        ones = torch.ones(2, 30, dtype=TOLERANCES[dtype].acc, device=backend.device)
        init = spread_indices(2, 30, 5, backend.device)
        a = run(algorithm, backend, x, 5, init=init)
        b = run(algorithm, backend, x, 5, init=init, weights=ones)
        assert_identical(a, b, what=str(dtype))


@pytest.mark.parametrize("power", [-60, -3, 7, 60])
def test_scaling_weights_by_a_power_of_two_changes_no_bit(backend, algorithm, power):
    x, w = tokens(2, 30, 6, device=backend.device), positive_weights(2, 30, device=backend.device)
    init = spread_indices(2, 30, 5, backend.device)
    a = run(algorithm, backend, x, 5, init=init, weights=w)
    b = run(algorithm, backend, x, 5, init=init, weights=w * 2.0**power)
    assert_identical(a.centers, b.centers)
    assert_identical(a.assignment, b.assignment)
    assert_identical(a.mass * 2.0**power, b.mass)
    assert_identical(a.inertia * 2.0**power, b.inertia)


@pytest.mark.parametrize("factor", [1e-30, 0.1, 3.0, 1e30])
def test_scaling_weights_changes_nothing(backend, algorithm, factor):
    x, w = tokens(2, 30, 6, groups=5, device=backend.device), positive_weights(2, 30, device=backend.device)
    a = run(algorithm, backend, x, 5, weights=w)
    b = run(algorithm, backend, x, 5, weights=w * factor)
    assert_identical(a.assignment, b.assignment)
    torch.testing.assert_close(a.centers, b.centers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.inertia * factor, b.inertia, rtol=1e-4, atol=0)


def test_integer_weights_equal_repeated_tokens(backend, algorithm):
    B, N, D, K = 2, 9, 3, 3
    x = tokens(B, N, D, torch.float32, backend.device, groups=K)
    times = torch.tensor([3, 1, 4, 2, 6, 5, 9, 7, 8], device=backend.device)  # distinct: two members never tie
    init = spread_indices(B, N, K, backend.device)
    first = times.cumsum(0) - times  # where each token's copies start
    a = run(algorithm, backend, x, K, weights=times.float().expand(B, N), init=init)
    b = run(algorithm, backend, x.repeat_interleave(times, 1), K, init=first[init])
    assert_identical(a.assignment.repeat_interleave(times, 1), b.assignment)
    torch.testing.assert_close(a.centers, b.centers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.mass, b.mass)
    torch.testing.assert_close(a.inertia, b.inertia, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 101])  # with 101 the member nearest to a mean weighs nothing
def test_zero_weight_tokens_are_assigned_but_move_nothing(backend, algorithm, seed):
    B, N, K = 2, 24, 4
    x = tokens(B, N, 3, device=backend.device, groups=K, seed=seed)
    w = positive_weights(B, N, device=backend.device)
    w[:, ::3] = 0
    init = torch.tensor([[1, 4, 7, 10]], device=backend.device).expand(B, -1)
    a = run(algorithm, backend, x, K, weights=w, init=init)
    assert_consistent(a, x, K, weights=w, algorithm=algorithm)
    keep = [i for i in range(N) if i % 3]
    b = run(
        algorithm,
        backend,
        x[:, keep],
        K,
        weights=w[:, keep],
        init=torch.tensor([[keep.index(i) for i in (1, 4, 7, 10)]], device=backend.device).expand(B, -1),
    )
    assert_identical(a.assignment[:, keep], b.assignment)
    torch.testing.assert_close(a.mass, b.mass)
    torch.testing.assert_close(a.inertia, b.inertia, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.centers, b.centers, rtol=1e-5, atol=1e-5)


def test_a_medoid_weighs_something(backend):
    x = torch.tensor([[[0.0], [2.0], [1.0], [4.0], [100.0]]], device=backend.device)
    w = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]], device=backend.device)
    x[0, 2, 0] = 2.001
    init = torch.tensor([[0, 4]], device=backend.device)
    got = run("kmedoids", backend, x, 2, weights=w, init=init)
    assert got.medoids.tolist() == [[1, 4]] and got.assignment.tolist() == [[0, 0, 0, 0, 1]]
    x[0, 1, 0], w[0, 1] = 2.1, 0.5  # the mean, 2.02, is nearest to the token that weighs nothing
    assert run("kmedoids", backend, x, 2, weights=w, init=init).medoids.tolist() == [[1, 4]]
    w[0, :4] = 0
    assert run("kmedoids", backend, x, 2, weights=w, init=init).medoids.tolist() == [[0, 4]], "no weights: the lowest"


def test_all_weights_zero_falls_back_to_plain_means(backend, algorithm):
    x = tokens(2, 20, 3, device=backend.device, groups=4)
    w = torch.zeros(2, 20, device=backend.device)
    init = spread_indices(2, 20, 4, backend.device)
    got = run(algorithm, backend, x, 4, weights=w, init=init)
    assert_consistent(got, x, 4, weights=w, algorithm=algorithm)
    assert got.inertia.tolist() == [0, 0] and not got.mass.any()
    if algorithm == "kmeans":
        same = run(algorithm, backend, x, 4, init=init)
        assert_identical(got.assignment, same.assignment)
        torch.testing.assert_close(got.centers, same.centers, rtol=1e-5, atol=1e-6)


# Masks and per-image K ---------------------------------------------------------------------------------------------


def padded_batch(backend, dtype=torch.float32, N=24, D=5, lengths=(24, 17, 9, 1), fill=float("nan")):
    x = tokens(len(lengths), N, D, dtype, backend.device, groups=4)
    mask = torch.arange(N, device=backend.device) < torch.tensor(lengths, device=backend.device)[:, None]
    return torch.where(mask[:, :, None], x, fill), mask


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_padding_never_leaks(backend, algorithm, fill, weighted):
    """What the padding holds changes no bit of the result."""
    x, mask = padded_batch(backend, fill=0.0)
    w = positive_weights(*mask.shape, device=backend.device) if weighted else None
    init = torch.arange(4, device=backend.device).expand(len(x), 4) % mask.sum(1, keepdim=True)
    a = run(algorithm, backend, x, 4, weights=w, mask=mask, init=init)
    spoiled = torch.where(mask[:, :, None], x, fill)
    b = run(
        algorithm,
        backend,
        spoiled,
        4,
        mask=mask,
        init=init,
        weights=None if w is None else torch.where(mask, w, float("nan")),
    )
    assert_identical(a, b)
    assert_consistent(a, x, 4, weights=w, mask=mask, algorithm=algorithm)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_padding_equals_one_call_per_item(backend, algorithm, dtype):
    x, mask = padded_batch(backend, dtype)
    lengths = mask.sum(1).tolist()
    counts = torch.tensor([min(4, n) for n in lengths], device=backend.device)
    init = torch.arange(4, device=backend.device).expand(len(x), 4).clone()
    got = run(algorithm, backend, x, counts, mask=mask, init=init)
    for b, n in enumerate(lengths):
        k = int(counts[b])
        alone = run(algorithm, backend, x[b : b + 1, :n], k, init=init[b : b + 1, :k])
        here = take(got, slice(b, b + 1))
        want = here._replace(
            centers=here.centers[:, :k],
            assignment=here.assignment[:, :n],
            mass=here.mass[:, :k],
            medoids=None if here.medoids is None else here.medoids[:, :k],
        )
        if backend.name == "reference":  # promises no bit-identity between shapes, and says so
            assert_identical(want.assignment, alone.assignment)
            torch.testing.assert_close(want.centers, alone.centers)
        else:
            assert_identical(want, alone, what=f"item {b} of length {n}")


def test_mask_with_holes(backend, algorithm):
    """Valid tokens anywhere: same result as the compacted image, up to rounding."""
    B, N, D, K = 3, 32, 4, 5
    x = tokens(B, N, D, backend.widest, backend.device, groups=K)
    mask = torch.from_numpy(np.random.default_rng(0).random((B, N)) < 0.6).to(backend.device)
    init = torch.stack([m.nonzero()[:K, 0] for m in mask])
    spoiled = torch.where(mask[:, :, None], x, float("nan"))
    got = run(algorithm, backend, spoiled, K, mask=mask, init=init)
    assert_consistent(got, torch.where(mask[:, :, None], x, 0), K, mask=mask, algorithm=algorithm)
    for b in range(B):
        alone = run(algorithm, backend, x[b : b + 1, mask[b]], K, init=torch.arange(K, device=backend.device)[None])
        assert_identical(got.assignment[b, mask[b]], alone.assignment[0])
        torch.testing.assert_close(got.centers[b], alone.centers[0])
        if algorithm == "kmedoids":
            assert mask[b].nonzero()[:, 0][alone.medoids[0]].tolist() == got.medoids[b].tolist()


def test_nothing_valid_gives_zeros(backend, algorithm):
    x = torch.full((2, 5, 3), float("nan"), device=backend.device)
    x[1] = tokens(1, 5, 3)[0].to(backend.device)
    mask = torch.zeros(2, 5, dtype=torch.bool, device=backend.device)
    mask[1] = True
    got = run(algorithm, backend, x, 2, mask=mask)
    assert got.assignment[0].tolist() == [-1] * 5
    assert not got.centers[0].any() and not got.mass[0].any() and got.inertia[0] == 0
    if algorithm == "kmedoids":
        assert got.medoids[0].tolist() == [-1, -1]
    assert (got.assignment[1] >= 0).all() and got.inertia[1] > 0


@pytest.mark.parametrize("sort", [False, True], ids=["init-order", "sorted"])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_per_image_k(backend, algorithm, sort, kind):
    N, D = 20, 4
    ks = [6, 1, 4, 3]
    x = tokens(4, N, D, device=backend.device, groups=6)
    counts = torch.tensor(ks, device=backend.device, dtype=kind)
    init = spread_indices(4, N, 6, backend.device)
    got = run(algorithm, backend, x, counts, init=init, sort=sort)
    assert got.centers.shape == (4, 6, D), "outputs are padded to the largest K"
    assert_consistent(got, x, 6, counts=ks, algorithm=algorithm, sort=sort)
    for b, k in enumerate(ks):
        alone = run(algorithm, backend, x[b : b + 1], k, init=init[b : b + 1, :k], sort=sort)
        assert_identical(got.assignment[b : b + 1], alone.assignment, what=f"image {b}")
        torch.testing.assert_close(got.centers[b : b + 1, :k], alone.centers, rtol=1e-5, atol=1e-5)


# The start a backend chooses itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "weighted", "padded", "padded-weighted-counts"])
def test_the_farthest_start_is_that_of_its_indices(backend, algorithm, case):
    """Exact arithmetic with many ties and duplicates: the kernel picks what the definition picks."""
    B, N, K = 3, 16, 7
    x = integer_tokens(B, N, 2, device=backend.device, low=-1, high=3)
    w = torch.from_numpy(np.random.default_rng(3).integers(0, 3, (B, N))).float().to(backend.device)
    w[0, 3:] = 0  # fewer tokens of weight than clusters
    mask = torch.ones(B, N, dtype=torch.bool, device=backend.device)
    mask[0, 1::2] = False
    mask[1, 4:] = False  # fewer valid tokens than clusters; a power of two, so that their mean is exact
    w = w if "weighted" in case else None
    mask = mask if "padded" in case else None
    counts = torch.tensor([7, 7, 3], device=backend.device) if "counts" in case else None
    index = initial("farthest", x, K, w, mask, counts, None, True)
    if mask is not None:
        x = torch.where(mask[:, :, None], x, float("nan"))
        w = None if w is None else torch.where(mask, w, float("nan"))
    got, want = (
        run(algorithm, backend, x, K if counts is None else counts, weights=w, mask=mask, init=init, num_iters=1)
        for init in ("farthest", index)
    )
    assert_identical(got, want)


def test_bad_numbers_do_not_reach_the_farthest_start_of_others(backend, algorithm):
    x, w = tokens(3, 12, 3, device=backend.device), positive_weights(3, 12, device=backend.device)
    clean = run(algorithm, backend, x[1:2], 4, weights=w[1:2], init="farthest", num_iters=1)
    x[0, 5], x[2, 5, 1], w[2, 3] = float("nan"), float("inf"), float("nan")
    got = run(algorithm, backend, x, 4, weights=w, init="farthest", num_iters=1)
    assert_identical(clean, take(got, slice(1, 2)))
    assert ((got.assignment >= 0) & (got.assignment < 4)).all()


# sort=True ---------------------------------------------------------------------------------------------------------


def test_sort_only_renames_clusters(backend, algorithm):
    x, w = tokens(3, 40, 4, device=backend.device), positive_weights(3, 40, device=backend.device)
    init = spread_indices(3, 40, 7, backend.device)
    a = run(algorithm, backend, x, 7, weights=w, init=init)
    b = run(algorithm, backend, x, 7, weights=w, init=init, sort=True)
    assert_consistent(b, x, 7, weights=w, algorithm=algorithm, sort=True)
    for i in range(3):
        order = torch.stack([(a.assignment[i] == j).nonzero()[0, 0] for j in range(7)]).argsort()
        assert_identical(order.argsort()[a.assignment[i]], b.assignment[i])
        if backend.name == "reference":  # its library sums depend on the place of a cluster in the output
            torch.testing.assert_close(a.centers[i, order], b.centers[i])
            torch.testing.assert_close(a.mass[i, order], b.mass[i])
        else:
            assert_identical(a.centers[i, order], b.centers[i])
            assert_identical(a.mass[i, order], b.mass[i])
        if algorithm == "kmedoids":
            assert_identical(a.medoids[i, order], b.medoids[i])
    torch.testing.assert_close(a.inertia, b.inertia, rtol=1e-5, atol=0)


# More iterations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_inertia_never_rises_with_iterations(backend, algorithm, dtype):
    B, N, D, K = (2, 24, 3, 5) if backend.name == "triton" else (6, 80, 6, 12)
    x = tokens(B, N, D, dtype, backend.device)
    x[0, ::2] = x[0, :1]  # duplicates, so that repair takes part
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device)
    init = spread_indices(B, N, K, backend.device)
    before = None
    for t in (1, 2, 4) if backend.interpreted else (1, 2, 3, 4, 6, 10):
        now = f64(run(algorithm, backend, x, K, weights=w, init=init, num_iters=t).inertia)
        if before is not None:
            assert (now <= before * (1 + 4 * TOLERANCES[dtype].inertia)).all(), f"{t} iterations: {before} -> {now}"
        before = now


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_fixed_point_stays_fixed(backend, algorithm, dtype):
    """Once converged, more iterations return the same bits; a warm start from there changes no label."""
    B, N, D, K = 1 if backend.interpreted else 3, 24, 4, 4
    x = tokens(B, N, D, dtype, backend.device, groups=K)
    init = spread_indices(B, N, K, backend.device)
    a = run(algorithm, backend, x, K, init=init, num_iters=50)
    assert_identical(a, run(algorithm, backend, x, K, init=init, num_iters=51))
    start = a.medoids if algorithm == "kmedoids" else a.centers
    for num_iters in (1, 5):
        warm = run(algorithm, backend, x, K, init=start, num_iters=num_iters)
        assert_identical(a.assignment, warm.assignment)


def test_warm_start_continues_the_iteration(backend, algorithm):
    """3 iterations, then 2 more from their result, are 5 iterations (float32; centers are returned unrounded)."""
    x = tokens(3, 30, 4, device=backend.device, groups=8)
    init = spread_indices(3, 30, 6, backend.device)
    five = run(algorithm, backend, x, 6, init=init, num_iters=5)
    three = run(algorithm, backend, x, 6, init=init, num_iters=3)
    two = run(algorithm, backend, x, 6, init=three.medoids if algorithm == "kmedoids" else three.centers, num_iters=2)
    assert_identical(five.assignment, two.assignment)


# Numbers: scales, dtypes, autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_scaling_tokens_by_a_power_of_two_changes_no_bit(backend, algorithm, power):
    x = tokens(2, 24, 5, device=backend.device, groups=4)
    init = spread_indices(2, 24, 4, backend.device)
    a = run(algorithm, backend, x, 4, init=init)
    b = run(algorithm, backend, x * 2.0**power, 4, init=init)
    assert_identical(a.assignment, b.assignment)
    assert_identical(a.centers * 2.0**power, b.centers)
    assert torch.isfinite(b.inertia).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e15, 1e30, 3e37])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_huge_and_tiny_tokens(backend, algorithm, scale, weighted):
    x = tokens(2, 24, 5, torch.float64, backend.device, groups=4)
    x = (x / x.abs().max() * scale).float()
    w = positive_weights(2, 24, device=backend.device) if weighted else None
    init = spread_indices(2, 24, 4, backend.device)
    got = run(algorithm, backend, x, 4, init=init, weights=w)
    if scale > 1e-37:
        assert_consistent(got, x, 4, weights=w, algorithm=algorithm)
        unit = run(algorithm, backend, (x.double() / scale).float(), 4, init=init, weights=w)
        assert_identical(got.assignment, unit.assignment)
    else:  # subnormal numbers: finite, in range, K rows
        assert all(torch.isfinite(t).all() for t in (got.centers, got.mass, got.inertia))


@pytest.mark.parametrize("token_power,weight_power", [(90, -100), (-90, 100), (60, 60), (-60, -60)])
def test_inertia_survives_opposite_scales(backend, algorithm, token_power, weight_power):
    """The true inertia fits float32 although one of its factors alone would not."""
    x, w = tokens(1, 16, 3, device=backend.device, groups=3), positive_weights(1, 16, device=backend.device)
    init = spread_indices(1, 16, 3, backend.device)
    a = run(algorithm, backend, x, 3, init=init, weights=w)
    b = run(algorithm, backend, x * 2.0**token_power, 3, init=init, weights=w * 2.0**weight_power)
    want = a.inertia.double() * 2.0 ** (2 * token_power + weight_power)
    want = want.clamp(max=torch.finfo(torch.float32).max)
    torch.testing.assert_close(b.inertia.double(), want, rtol=1e-5, atol=1e-45)


@pytest.mark.parametrize("magnitude", [1e4, 6e4])
def test_large_fp16_stays_finite(backend, algorithm, magnitude):
    x = tokens(2, 32, 8, torch.float64, backend.device, groups=4)
    x = (x / x.abs().max() * magnitude).half()
    init = spread_indices(2, 32, 4, backend.device)
    got = run(algorithm, backend, x, 4, init=init, num_iters=1)
    assert_consistent(got, x, 4, algorithm=algorithm, init=init)
    assert_follows(backend, algorithm, x, 4, 5, init=init)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, algorithm, low):
    """The inputs' dtype rules: the same bits with autocast on, and no dtype error for mixed inputs."""
    for dtype in (torch.float32, torch.bfloat16):
        x, w = tokens(2, 24, 5, dtype, backend.device), positive_weights(2, 24, device=backend.device)
        init = spread_indices(2, 24, 4, backend.device)
        plain = run(algorithm, backend, x, 4, weights=w, init=init)
        with torch.autocast(backend.device, dtype=low):
            assert_identical(plain, run(algorithm, backend, x, 4, weights=w, init=init))


def test_weights_of_another_float_dtype(backend, algorithm):
    x = tokens(2, 16, 3, torch.bfloat16, backend.device)
    w = positive_weights(2, 16, torch.bfloat16, backend.device)
    init = spread_indices(2, 16, 4, backend.device)
    assert_identical(
        run(algorithm, backend, x, 4, weights=w, init=init), run(algorithm, backend, x, 4, weights=w.float(), init=init)
    )


# Layout ------------------------------------------------------------------------------------------------------------


def layouts(x):
    """The same values with other strides."""
    B, N, D = x.shape
    yield "batch last", x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((B, N, 2 * D + 3), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, :, 3 : 3 + D] = x
    yield "columns of a wider tensor, misaligned", wide[:, :, 3 : 3 + D]
    wide = torch.full((B, N, 2 * D), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, :, ::2] = x
    yield "every second column", wide[:, :, ::2]
    long = torch.full((B, 3 * N + 1, D), float("nan"), dtype=x.dtype, device=x.device)
    long[:, 1::3] = x
    yield "every third row", long[:, 1::3]
    yield "after the CLS token", torch.cat([x[:, :1] * float("nan"), x], 1)[:, 1:]
    yield "expanded batch", x[:1].expand(B, N, D)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("D", [3, 16])
def test_strides_change_no_bit(backend, algorithm, dtype, D):
    x = tokens(2, 20, D, dtype, backend.device)
    x[1] = x[0]
    w = positive_weights(2, 20, TOLERANCES[dtype].acc, backend.device)
    init = spread_indices(1, 20, 4, backend.device).expand(2, 4)
    want = run(algorithm, backend, x, 4, weights=w, init=init.contiguous())
    for name, view in list(layouts(x))[:: 3 if backend.interpreted else 1]:
        got = run(algorithm, backend, view, 4, weights=w, init=init)
        if backend.name == "reference" or (backend.name == "triton" and not backend.interpreted):
            # Triton's compiler lays a tile out by how it is read, and adds it up in that order.
            assert_consistent(got, x, 4, weights=w, algorithm=algorithm)
            assert_identical(want.assignment, got.assignment, what=name)
        else:
            assert_identical(want, got, what=name)
    strided = torch.stack([w, w + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    assert_identical(want, run(algorithm, backend, x, 4, weights=strided, init=init))


def test_inputs_are_not_modified(backend, algorithm):
    x, w = tokens(2, 20, 4, device=backend.device), positive_weights(2, 20, device=backend.device)
    mask = torch.ones(2, 20, dtype=torch.bool, device=backend.device)
    mask[0, 3] = False
    init = torch.tensor([[0, 1, 2], [5, 5, 7]], device=backend.device)
    copies = [t.clone() for t in (x, w, mask, init)]
    run(algorithm, backend, x, 3, weights=w, mask=mask, init=init, sort=True)
    for before, after in zip(copies, (x, w, mask, init)):
        assert_identical(before, after)


def test_one_image_without_a_batch_dimension(backend, algorithm):
    x, w = tokens(1, 24, 4, device=backend.device), positive_weights(1, 24, device=backend.device)
    mask = torch.arange(24, device=backend.device)[None] < 20
    init = spread_indices(1, 20, 4, backend.device)
    batched = run(algorithm, backend, x, 4, weights=w, mask=mask, init=init)
    single = run(algorithm, backend, x[0], 4, weights=w[0], mask=mask[0], init=init[0])
    assert single.centers.shape == (4, 4) and single.assignment.shape == (24,) and single.inertia.shape == ()
    assert_identical(take(batched, 0), single)


@pytest.mark.parametrize("shape", [(0, 8, 4), (0, 0, 0), (2, 8, 0), (0, 8, 0)], ids=str)
def test_empty_inputs(backend, algorithm, shape):
    B, N, D = shape
    x = torch.zeros(shape, device=backend.device)
    got = run(algorithm, backend, x, 3)
    assert got.centers.shape == (B, 3, D) and got.assignment.shape == (B, N) and got.mass.shape == (B, 3)
    assert got.inertia.shape == (B,) and not got.inertia.any()
    assert got.assignment.dtype == torch.int64 and ((got.assignment >= 0) & (got.assignment < 3)).all()
    assert algorithm == "kmeans" or got.medoids.shape == (B, 3)


def test_images_without_tokens_cannot_give_k_rows(backend, algorithm):
    with pytest.raises(ValueError, match=r"\bnum_clusters\b"):
        run(algorithm, backend, torch.zeros(2, 0, 4, device=backend.device), 3)


@pytest.mark.large
def test_very_many_images(backend, algorithm):
    """More images than a GPU grid's y and z limits."""
    B = 70_000
    x = tokens(8, 5, 2, device=backend.device, seed=5).repeat(B // 8, 1, 1)
    init = torch.tensor([[0, 2]], device=backend.device).expand(B, 2)
    got = run(algorithm, backend, x, 2, init=init)
    want = run(algorithm, backend, x[:8], 2, init=init[:8])
    assert_identical(got.assignment.reshape(B // 8, 8, 5)[[0, 1, -1]], want.assignment.expand(3, 8, 5))
    assert (got.assignment.reshape(B // 8, 8, 5) == want.assignment).all()


# NaN and Inf -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["one value", "one token", "everything", "an initial token"])
def test_bad_numbers_stay_in_their_image(backend, algorithm, bad, dtype, where):
    B, N, D, K = 3, 20, 4, 5
    x = tokens(B, N, D, dtype, backend.device)
    w = positive_weights(B, N, device=backend.device)
    init = spread_indices(1, N, K, backend.device).expand(B, K)
    clean = run(algorithm, backend, x, K, weights=w, init=init)
    spot = {"one value": (1, 7, 2), "one token": (1, 7), "everything": (1,), "an initial token": (1, int(init[1, 2]))}
    x[spot[where]] = bad
    got = run(algorithm, backend, x, K, weights=w, init=init)
    for b in (0, 2):
        assert_identical(take(clean, slice(b, b + 1)), take(got, slice(b, b + 1)), what=f"image {b}")
    assert ((got.assignment >= 0) & (got.assignment < K)).all()
    if algorithm == "kmedoids":
        assert ((got.medoids >= 0) & (got.medoids < N)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("argument", ["x", "weights", "init"])
def test_check_finite(backend, algorithm, bad, argument):
    x, w = tokens(2, 12, 3, device=backend.device), positive_weights(2, 12, device=backend.device)
    init = x[:, :4].clone() if algorithm == "kmeans" else None
    if argument == "init" and init is None:
        pytest.skip("K-Medoids starts from tokens")
    run(algorithm, backend, x, 4, weights=w, init=init, check_finite=True)
    {"x": x, "weights": w, "init": init}[argument].view(2, -1)[1, 5] = bad
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        run(algorithm, backend, x, 4, weights=w, init=init, check_finite=True)


def test_check_finite_ignores_padding(backend, algorithm):
    x, mask = padded_batch(backend)
    w = torch.where(mask, positive_weights(*mask.shape, device=backend.device), float("nan"))
    run(algorithm, backend, x, 2, weights=w, mask=mask, check_finite=True)


# Manners -----------------------------------------------------------------------------------------------------------


def test_nothing_is_printed_and_no_state_changes(backend, algorithm, capfd):
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    seed = torch.get_rng_state()
    precision, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    run(algorithm, backend, tokens(2, 16, 3, device=backend.device), 4)
    assert capfd.readouterr() == ("", "")
    assert (threads, deterministic) == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    assert (precision, matmul) == (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
    assert_identical(seed, torch.get_rng_state())


def test_global_generator_is_untouched_when_one_is_given(backend, algorithm):
    x = tokens(2, 16, 3, device=backend.device)
    seed = torch.get_rng_state()
    run(algorithm, backend, x, 4, init="random", generator=torch.Generator(backend.device).manual_seed(0))
    assert_identical(seed, torch.get_rng_state())


def test_cpu_tensors_with_no_gpu_stay_on_the_cpu(backend, algorithm):
    x = tokens(2, 16, 3, device=backend.device)
    for t in run(algorithm, backend, x, 4):
        assert t is None or t.device == x.device
