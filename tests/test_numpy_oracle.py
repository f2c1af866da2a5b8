"""The reference backend against an oracle that shares nothing with it (tests/oracle.py)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import f64, integer_tokens, positive_weights, spread_indices, tokens

import tokenpool_ext as tp

ALGORITHMS = ["kmeans", "kmedoids"]


def check(got, x, K, init, algorithm, num_iters, weights=None, mask=None, counts=None, sort=False):
    for b in range(len(x)):
        k = K if counts is None else counts[b]
        want = oracle.cluster(
            f64(x[b]),
            k,
            init=init[b].numpy(),
            weights=None if weights is None else f64(weights[b]),
            mask=None if mask is None else mask[b].numpy(),
            num_iters=num_iters,
            algorithm=algorithm,
            sort=sort,
            num_clusters=K,
        )
        assert got.assignment[b].tolist() == want.assignment.tolist(), f"image {b}"
        np.testing.assert_allclose(f64(got.centers[b]), want.centers, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(f64(got.mass[b]), want.mass, rtol=1e-12)
        np.testing.assert_allclose(f64(got.inertia[b]), want.inertia, rtol=1e-9, atol=1e-12)
        if algorithm == "kmedoids":
            assert got.medoids[b].tolist() == want.medoids.tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sort", [False, True], ids=["init-order", "sorted"])
@pytest.mark.parametrize("num_iters", [1, 2, 5, 30])
def test_weighted_masked_per_image_k(algorithm, num_iters, sort):
    B, N, D, K = 5, 40, 4, 9
    x, w = tokens(B, N, D, torch.float64), positive_weights(B, N, torch.float64)
    w[:, 5::7] = 0
    mask = torch.from_numpy(np.random.default_rng(3).random((B, N)) < 0.8)
    mask[4] = False
    mask[4, [3, 9]] = True  # two valid tokens, K = 9
    counts = [9, 4, 1, 7, 9]
    init = torch.zeros(B, K, dtype=torch.int64)
    for b in range(B):
        valid = mask[b].nonzero()[:, 0]
        init[b] = valid[torch.arange(K) * 2 % len(valid)] if len(valid) < 2 * K else valid[torch.arange(K) * 2]
    spoiled = torch.where(mask[:, :, None], x, float("nan"))
    got = getattr(tp, algorithm)(
        spoiled,
        torch.tensor(counts),
        weights=w,
        mask=mask,
        init=init,
        num_iters=num_iters,
        sort=sort,
        backend="reference",
    )
    check(got, x, K, init, algorithm, num_iters, w, mask, counts, sort)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unweighted_clusters_of_any_size(algorithm):
    """Random starts: clusters of one, of many; without weights two members tie, so K-Medoids runs one iteration."""
    for N, K in [(12, 12), (25, 3), (50, 20), (7, 1)]:
        x = tokens(3, N, 5, torch.float64, seed=N)
        init = spread_indices(3, N, K)
        num_iters = 5 if algorithm == "kmeans" else 1
        got = getattr(tp, algorithm)(x, K, init=init, num_iters=num_iters, backend="reference")
        want = [
            oracle.cluster(f64(x[b]), K, init=init[b].numpy(), num_iters=num_iters, algorithm=algorithm)
            for b in range(3)
        ]
        assert got.assignment.tolist() == [a.assignment.tolist() for a in want]
        if algorithm == "kmeans":
            check(got, x, K, init, algorithm, num_iters)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(6))
def test_repair_on_integers_with_many_duplicates(algorithm, seed):
    """Tokens from a handful of values, starts at duplicates: several repairs with ties, all in exact arithmetic."""
    B, N, D, K = 8, 16, 2, 7
    x = integer_tokens(B, N, D, torch.float64, seed=seed, low=0, high=3)
    w = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (B, N))).double()
    init = torch.from_numpy(np.random.default_rng(seed).integers(0, N, (B, K)))
    got = getattr(tp, algorithm)(x, K, weights=w, init=init, num_iters=1, backend="reference")
    for b in range(B):
        want = oracle.cluster(
            f64(x[b]), K, init=init[b].numpy(), weights=f64(w[b]), num_iters=1, algorithm=algorithm, exact=True
        )
        assert got.assignment[b].tolist() == want.assignment.tolist(), f"image {b}"


def test_stopping_early_and_running_on_agree():
    """The oracle stops when the assignment repeats; the result after that is the fixed point."""
    x = tokens(1, 30, 3, torch.float64, groups=4)
    init = spread_indices(1, 30, 4)
    stopped = oracle.cluster(f64(x[0]), 4, init=init[0].numpy(), num_iters=100)
    assert stopped.iterations < 100
    got = tp.kmeans(x, 4, init=init, num_iters=100, backend="reference")
    assert got.assignment[0].tolist() == stopped.assignment.tolist()
    np.testing.assert_allclose(f64(got.centers[0]), stopped.centers, rtol=1e-12)
