"""Right to the last bits: sums of many members, weights of zero, far groups, ties, bad numbers (contract 2, 4, 7)."""

from __future__ import annotations

import pytest
import torch
from helpers import f64, squared_distances, tokens

import tokenpool_ext as tp

pytestmark = pytest.mark.one_path


def on(backend, **rest):
    if backend.interpreted or backend.device != "cpu":
        pytest.skip("the tokens are on the CPU, and too many for Triton's interpreter (test_numerics)")
    return dict(backend=backend.name, **rest)


def one_cluster(n):
    return torch.zeros(1, n, dtype=torch.int64)


@pytest.mark.parametrize("value", [1.0, 1000001.0, 0.1, -3e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_come_back_to_the_bit(backend, value, dtype):
    x = torch.full((1, 100_003, 1), value, dtype=dtype)
    assert tp.pool(x, one_cluster(100_003), 1, **on(backend)).item() == x[0, 0, 0].item()
    for k in (1, 3):
        got = tp.kmeans(x[:, :128], k, **on(backend))
        assert (got.centers == x[0, 0, 0]).all() and got.inertia.item() == 0


@pytest.mark.large
@pytest.mark.parametrize("n, spread, level", [(200_000, 0.01, 1.0), (50_000, 1.0, 1000.0), (131_072, 1.0, 0.0)])
def test_means_and_sums_of_many(backend, n, spread, level):
    x = (torch.rand(1, n, 2, generator=torch.Generator().manual_seed(0)) * spread + level).float()
    mean = f64(x)[0].mean(0)
    pooled = f64(tp.pool(x, one_cluster(n), 1, **on(backend)))[0, 0]
    assert abs(pooled - mean).max() <= 1e-6 * abs(mean).max()
    got = tp.kmeans(x, 2, num_iters=2, **on(backend))
    labels = got.assignment[0].numpy()
    for j in range(2):
        member_mean = f64(x)[0][labels == j].mean(0)
        assert abs(f64(got.centers)[0, j] - member_mean).max() <= 1e-6 * abs(member_mean).max()
    inertia = ((f64(x)[0] - f64(x)[0][labels == 0].mean(0)) ** 2).sum(1)[labels == 0].sum()
    inertia += ((f64(x)[0] - f64(x)[0][labels == 1].mean(0)) ** 2).sum(1)[labels == 1].sum()
    assert got.inertia.item() == pytest.approx(inertia, rel=1e-5)


@pytest.mark.large
def test_the_gradient_of_unpool_counts_beyond_float32(backend):
    centers = torch.ones(1, 1, 1, requires_grad=True)
    tp.unpool(centers, one_cluster(17_000_001), **on(backend)).sum().backward()
    assert centers.grad.item() == torch.tensor(17_000_001.0).item()


@pytest.mark.parametrize("outlier", [1e6, 3e30, float("nan")])
@pytest.mark.parametrize("init", ["farthest", "topk", "random", "kmeans++"])
def test_a_token_of_weight_zero_moves_nothing(backend, outlier, init):
    x, w = tokens(1, 41, 3), torch.ones(1, 41)
    x[0, 40], w[0, 40] = outlier, 0
    options = on(backend, init=init, generator=torch.Generator().manual_seed(0))
    got = tp.kmeans(x, 5, weights=w, **options)
    assert got.inertia.isfinite().all() and got.centers.isfinite().all() and got.centers.abs().max() < 10
    if init in ("farthest", "topk"):
        want = tp.kmeans(x[:, :40], 5, weights=w[:, :40], **options)
        assert torch.equal(got.assignment[:, :40], want.assignment)
        torch.testing.assert_close(got.centers, want.centers)


@pytest.mark.parametrize("init", ["farthest", "random"])
def test_a_featherweight_is_no_start(backend, init):
    x, w = tokens(1, 40, 3), torch.full((1, 40), 1e8)
    x[0, 7], w[0, 7] = 1e3, 1e-8
    options = on(backend, init=init, generator=torch.Generator().manual_seed(3))
    medoids = tp.kmedoids(x, 4, weights=w, num_iters=1, **options).medoids
    assert 7 not in medoids.tolist()[0]


def test_weighted_farthest_is_weight_times_squared_distance(backend):
    x = torch.tensor([[[0.0], [3.0], [-4.0], [1.0]]])
    w = torch.tensor([[10.0, 4.0, 2.0, 1.0]])  # 4 * 9 = 36 against 2 * 16 = 32
    assert tp.kmedoids(x, 2, weights=w, num_iters=1, **on(backend)).medoids.tolist() == [[0, 1]]


@pytest.mark.parametrize("apart", [1e2, 1e4])
def test_two_far_groups(backend, apart):
    x = tokens(2, 196, 64, torch.float32)
    x[:, ::2] += apart
    init = torch.arange(98).expand(2, 98).contiguous()
    got = tp.kmeans(x, 98, init=init, num_iters=1, **on(backend)).assignment
    for b in range(2):
        distance = squared_distances(f64(x)[b], f64(x)[b, :98])
        taken = distance[range(196), got[b].numpy()]
        assert (taken <= distance.min(1) * (1 + 1e-3) + 1e-6 * apart).all()


@pytest.mark.parametrize("length", [1e4, 1e5, 1e6])
def test_one_long_token_does_not_cost_the_others(backend, length):
    x = tokens(30, 17, 3, seed=4)
    x[:, 5] *= length
    options = on(backend, init="strided")
    losses = torch.stack([tp.kmeans(x, 13, num_iters=t, **options).inertia for t in (1, 2, 5, 9)])
    assert (losses.diff(dim=0) <= 1e-4 * losses[:-1] + 1e-5).all(), "inertia never rises"


def test_labels_settle_with_fewer_distinct_tokens_than_clusters(backend):
    x = torch.randn(4, 98, 96, generator=torch.Generator().manual_seed(1))
    x[:, :69] = x[:, :1]
    for init in ("strided", "farthest"):
        a, b = (tp.kmeans(x, 49, init=init, num_iters=t, **on(backend)) for t in (60, 61))
        assert torch.equal(a.assignment, b.assignment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_ties_go_to_the_lowest_index(backend, dtype):
    x = torch.randint(-4, 5, (4, 197, 64), generator=torch.Generator().manual_seed(2)).to(dtype)
    init = torch.arange(49).expand(4, 49).contiguous()
    got = tp.kmeans(x, 49, init=init, num_iters=1, **on(backend)).assignment
    for b in range(4):
        best = squared_distances(f64(x)[b], f64(x)[b, :49]).argmin(1)
        alone = torch.bincount(torch.from_numpy(best), minlength=49).min() > 0
        assert alone and (got[b].numpy() == best).all()


def test_a_bad_number_stays_in_its_cluster(backend):
    x = tokens(1, 12, 3)
    x[0, 3], x[0, 4] = float("nan"), float("inf")
    pooled = tp.pool(x, torch.arange(12)[None] % 6, 8, **on(backend))
    bad = ~pooled.isfinite().all(2)[0]
    assert bad.tolist() == [False, False, False, True, True, False, False, False]
    assert (pooled[0, 6:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_largest_numbers_have_finite_means(backend, dtype):
    largest = torch.finfo(dtype).max
    x = torch.full((1, 7, 2), largest, dtype=dtype)
    x[0, 2:4] = -largest
    for centers in (
        tp.kmeans(x, 2, init="strided", **on(backend)).centers,
        tp.pool(x, torch.tensor([[0, 0, 1, 1, 0, 0, 0]]), 2, **on(backend)),
    ):
        assert centers[0].abs().eq(largest).all() and centers.isfinite().all()
    mixed = tp.pool(x, one_cluster(7), 1, **on(backend))
    torch.testing.assert_close(mixed[0, 0, 0].double() / largest, torch.tensor(3 / 7).double(), rtol=1e-2, atol=0)


def test_nothing_to_unpool(backend):
    got = tp.unpool(torch.zeros(2, 0, 3), torch.full((2, 4), -1), **on(backend))
    assert got.shape == (2, 4, 3) and not got.any()
