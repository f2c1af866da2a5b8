"""K-Means against scikit-learn, and what only K-Means has: centers as a start (contract 2, 5, 8)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import (
    TOLERANCES,
    assert_consistent,
    assert_identical,
    assert_nearest,
    f64,
    positive_weights,
    squared_distances,
    tokens,
)

import tokenpool_ext as tp


def lloyd(x, start, num_iters, weights=None):
    """scikit-learn's Lloyd from given centers.  Its labels_ and inertia_ belong to the final centers."""
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "did not converge" is the point
        model = cluster.KMeans(len(start), init=start, n_init=1, max_iter=num_iters, tol=0.0, algorithm="lloyd")
        return model.fit(x, sample_weight=weights)


def problem(B, N, D, K, seed, dtype=torch.float64, device="cpu"):
    x = tokens(B, N, D, dtype, device, seed=seed, groups=K)
    start = torch.stack([x[b, torch.from_numpy(np.random.default_rng(seed + b).permutation(N)[:K])] for b in range(B)])
    return x, start


@pytest.mark.large
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_one_iteration_matches_sklearn(backend, weighted):
    """Same centers after one update; and sklearn's labels are our next assignment, up to ties."""
    dtype = backend.widest
    B, N, D, K = 4, 120, 8, 10
    x, start = problem(B, N, D, K, 0, dtype, backend.device)
    w = positive_weights(B, N, dtype, backend.device) if weighted else None
    one = tp.kmeans(x, K, weights=w, init=start, num_iters=1, backend=backend.name)
    two = tp.kmeans(x, K, weights=w, init=start, num_iters=2, backend=backend.name)
    for b in range(B):
        assert_nearest(f64(x[b]), f64(start[b]), one.assignment[b].cpu().numpy(), dtype)
        peer = lloyd(f64(x[b]), f64(start[b]), 1, None if w is None else f64(w[b]))
        np.testing.assert_allclose(f64(one.centers[b]), peer.cluster_centers_, atol=100 * TOLERANCES[dtype].center)
        if len(np.unique(squared_distances(f64(x[b]), peer.cluster_centers_).argmin(1))) < K:
            continue  # a cluster became empty, and is repaired
        assert_nearest(f64(x[b]), peer.cluster_centers_, two.assignment[b].cpu().numpy(), dtype)
        assert (two.assignment[b].cpu().numpy() != peer.labels_).mean() <= 0.02


@pytest.mark.large
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("num_iters", [5, 20])
def test_inertia_matches_sklearn(backend, weighted, num_iters):
    """sklearn's inertia_ is taken between the final centers and labels assigned to them once more."""
    dtype = backend.widest
    B, N, D, K = 6, 150, 6, 12
    x, start = problem(B, N, D, K, 1, dtype, backend.device)
    w = positive_weights(B, N, dtype, backend.device) if weighted else None
    got = tp.kmeans(x, K, weights=w, init=start, num_iters=num_iters, backend=backend.name)
    assert_consistent(got, x, K, weights=w)
    for b in range(B):
        data, scores = f64(x[b]), np.ones(N) if w is None else f64(w[b])
        peer = lloyd(data, f64(start[b]), num_iters, scores if weighted else None)
        ours = ((data[:, None] - f64(got.centers[b])) ** 2).sum(-1).min(1) @ scores
        assert abs(ours / peer.inertia_ - 1) <= (1e-5 if dtype == torch.float64 else 1e-3)
        assert f64(got.inertia)[b] >= ours * (1 - 1e-5), "our pair is one half-step earlier"
        if num_iters == 20:  # converged: the same pair
            assert abs(f64(got.inertia)[b] / peer.inertia_ - 1) <= (1e-5 if dtype == torch.float64 else 1e-3)


@pytest.mark.large
def test_sixteen_bit_inertia_within_a_percent_of_sklearn(backend):
    for dtype in (torch.bfloat16, torch.float16):
        x, start = problem(8, 150, 16, 12, 2, dtype, backend.device)
        got = tp.kmeans(x, 12, init=start, num_iters=5, backend=backend.name)
        want = [lloyd(f64(x[b]), f64(start[b]), 5).inertia_ for b in range(8)]
        assert abs(np.mean(f64(got.inertia) / want) - 1) <= 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_start_from_centers(backend, dtype):
    B, N, D, K = 2, 24, 3, 4
    x, start = problem(B, N, D, K, 3, dtype, backend.device)
    start = start + torch.linspace(-0.2, 0.2, K, device=backend.device, dtype=dtype)[:, None]
    got = tp.kmeans(x, K, init=start, num_iters=1, backend=backend.name)
    assert_consistent(got, x, K)
    for b in range(B):
        assert_nearest(f64(x[b]), f64(start[b]), got.assignment[b].cpu().numpy(), dtype)


def test_centers_far_away_are_repaired(backend):
    """Starts that attract nobody: K rows all the same, by the repair rule."""
    x = torch.tensor([[[0.0], [1.0], [5.0], [6.0]]], device=backend.device)
    start = torch.tensor([[[1e6], [0.0], [-1e6]]], device=backend.device)
    got = tp.kmeans(x, 3, init=start, num_iters=1, backend=backend.name)
    assert got.assignment[0].tolist() == [1, 1, 2, 0]  # costs 0, 1, 25, 36: token 3 to cluster 0, token 2 to cluster 2
    for scale in (1e-30, 1e30):
        got = tp.kmeans(x * scale, 3, init=start, num_iters=1, backend=backend.name)
        assert_consistent(got, x * scale, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_starting_centers_stay_in_their_image(backend, bad):
    x, start = problem(3, 16, 3, 4, 4, torch.float32, backend.device)
    clean = tp.kmeans(x, 4, init=start, backend=backend.name)
    start = start.clone()
    start[1, 2, 0] = bad
    got = tp.kmeans(x, 4, init=start, backend=backend.name)
    assert_consistent(got, x, 4)  # the tokens are finite, so is the result
    for b in (0, 2):
        assert_identical(clean.centers[b], got.centers[b])
        assert_identical(clean.assignment[b], got.assignment[b])


def test_equal_distance_goes_to_the_lowest_center(backend):
    """Token 1 lies exactly between centers 0 and 2, in any order of the centers."""
    x = torch.tensor([[[0.0], [1.0], [2.0], [40.0]]], device=backend.device)
    for start, labels in (([0, 2, 40], [0, 0, 1, 2]), ([2, 0, 40], [1, 0, 0, 2]), ([40, 2, 0], [2, 1, 1, 0])):
        init = torch.tensor(start, device=backend.device, dtype=torch.float32)[None, :, None]
        got = tp.kmeans(x, 3, init=init, num_iters=1, backend=backend.name)
        assert got.assignment[0].tolist() == labels


def test_assignment_and_centers_are_of_the_same_iteration(backend):
    """After one iteration the centers are means of the assignment to the start, not of an assignment to the means."""
    x = torch.tensor([[[0.0], [1.0], [10.0], [14.0]]], device=backend.device)
    got = tp.kmeans(x, 2, init=torch.tensor([[0, 1]], device=backend.device), num_iters=1, backend=backend.name)
    assert got.assignment.tolist() == [[0, 1, 1, 1]]
    torch.testing.assert_close(got.centers[0, :, 0].cpu(), torch.tensor([0.0, 25 / 3]))
