"""`Clusters.medoids` of K-Means: of each cluster the member nearest to its mean (contract 5), on every backend."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import DTYPES, TOLERANCES, assert_consistent, assert_identical, f64, positive_weights, tokens

import tokenpool_ext as tp


def assert_representatives(got, x, K, weights=None):
    """Exactly those of rational arithmetic, for labels as they came."""
    for b in range(len(x)):
        w = None if weights is None else f64(weights[b])
        want = oracle.representatives(np.nan_to_num(f64(x[b])), got.assignment[b].cpu().numpy(), K, w)
        assert got.medoids[b].tolist() == want.tolist(), f"image {b}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_representative_is_the_member_nearest_to_the_mean(backend, dtype, weighted):
    """Of random tokens no two are equally near, but pairs always tie without weights: the lower one."""
    for N, D, K, sort in ((24, 3, 7, False), (24, 5, 12, True), (9, 4, 9, False), (12, 390, 3, False), (7, 2, 1, True)):
        x = tokens(2, N, D, dtype, backend.device, seed=N + K)
        w = positive_weights(2, N, TOLERANCES[dtype].acc, backend.device) if weighted else None
        for num_iters in (1, 5):
            got = tp.kmeans(x, K, weights=w, num_iters=num_iters, sort=sort, backend=backend.name)
            assert_consistent(got, x, K, weights=w, sort=sort)
            assert_representatives(got, x, K, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_representative_ties_go_to_the_lowest_index(backend, dtype):
    """Means that are exact: tokens left and right of one are equally near, and of equal tokens the first is taken."""
    x = torch.tensor([[[9.0], [3.0], [7.0], [5.0], [1.0], [1.0], [-9.0], [-7.0]]], dtype=dtype, device=backend.device)
    init = torch.tensor([[2, 4, 6]], device=backend.device)
    got = tp.kmeans(x, 3, init=init, num_iters=1, backend=backend.name)
    assert got.assignment[0].tolist() == [0, 1, 0, 0, 1, 1, 2, 2]
    assert got.medoids[0].tolist() == [2, 4, 6]  # 7 is the mean; 1 and 1 before 3; -9 and -7 are equally near -8
    far = torch.tensor([[[0.0], [4.0], [1.0], [3.0]]], dtype=dtype, device=backend.device)
    one = tp.kmeans(far, 1, num_iters=1, backend=backend.name)
    assert one.medoids.tolist() == [[2]]  # 1 and 3 around 2
    same = tp.kmeans(torch.full_like(x, 5.3), 3, num_iters=5, backend=backend.name)
    assert_representatives(same, torch.full_like(x, 5.3), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_representative_ties_around_a_mean_that_is_rounded(backend, dtype):
    """A third is no number of any dtype: of small integers ties go to the lowest index all the same."""
    if backend.name in ("cuda", "triton"):
        pytest.skip("promised of the CPU and the reference")
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-4, 5, (2, 24, 1 + seed % 3), generator=generator).to(dtype)
        w = torch.randint(0, 4, (2, 24), generator=generator).to(TOLERANCES[dtype].acc) if seed % 2 else None
        assert_representatives(tp.kmeans(x, 4, weights=w, num_iters=1 + seed % 4, backend=backend.name), x, 4, w)


def test_representatives_of_weightless_and_unequal_members(backend):
    x = torch.tensor([[[0.0], [2.0], [10.0], [13.0], [17.0], [30.0]]], device=backend.device)
    init = torch.tensor([[0, 3, 5]], device=backend.device)
    for w, medoids in (
        ([1.0, 3, 1, 1, 1, 1], [1, 3, 5]),  # the heavier of two; 13 beside 13.3
        ([1.0, 1, 9, 0, 1, 1], [0, 2, 5]),  # equally heavy: the first; 10 beside 10.7
        ([1.0, 0, 1, 0, 1, 0], [0, 3, 5]),  # a token of weight zero is nearest to 13.5
        ([0.0, 0, 0, 0, 0, 0], [0, 3, 5]),  # no weights: the plain mean
        ([0.0, 1e-30, 0, 0, 0, 1], [1, 3, 5]),
    ):
        weights = torch.tensor([w], device=backend.device)
        got = tp.kmeans(x, 3, weights=weights, init=init, num_iters=1, backend=backend.name)
        assert got.assignment[0].tolist() == [0, 0, 1, 1, 1, 2]
        assert got.medoids[0].tolist() == medoids, w
        assert_representatives(got, x, 3, weights)
    twice = torch.tensor([[[5.3, 0.1], [5.3, 0.1], [-4.0, 9.0]]], device=backend.device)
    weights = torch.tensor([[1.0, 2.0, 1.0]], device=backend.device)
    init = torch.tensor([[0, 2]], device=backend.device)
    got = tp.kmeans(twice, 2, weights=weights, init=init, backend=backend.name)
    assert got.medoids.tolist() == [[0, 2]]  # equal tokens: the first, whatever they weigh


def test_representatives_with_a_mask_and_a_number_of_clusters_for_each_image(backend):
    B, N, K = 4, 20, 6
    x = tokens(B, N, 3, device=backend.device, seed=5)
    mask = torch.from_numpy(np.random.default_rng(8).random((B, N)) < 0.7).to(backend.device)
    mask[3] = False
    mask[3, [4, 11]] = True  # two tokens for six clusters
    counts = torch.tensor([6, 1, 3, 6], device=backend.device)
    spoiled = torch.where(mask[:, :, None], x, float("nan"))
    got = tp.kmeans(spoiled, counts, mask=mask, backend=backend.name)
    assert_consistent(got, torch.where(mask[:, :, None], x, 0), K, mask=mask, counts=[6, 1, 3, 2])
    assert_representatives(got, spoiled, K)
    assert (got.medoids >= 0).sum(1).tolist() == [6, 1, 3, 2]
    single = tp.kmeans(x[0], 4, backend=backend.name)
    assert single.medoids.shape == (4,) and not single.medoids.is_floating_point()


def test_representatives_where_tokens_are_not_numbers_are_members(backend):
    x = tokens(2, 12, 3, device=backend.device)
    x[0, 3], x[0, 7, 1] = float("nan"), float("inf")
    got = tp.kmeans(x, 4, backend=backend.name)
    for j, m in enumerate(got.medoids[0].tolist()):
        assert got.assignment[0, m] == j
    assert_identical(got.medoids[1], tp.kmeans(x[1], 4, backend=backend.name).medoids)
