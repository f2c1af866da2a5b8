"""K-Medoids against brute force over all members, and against the objective as written (contract 3)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import DTYPES, TOLERANCES, assert_consistent, distance_slack, f64, positive_weights, spread_indices, tokens

import tokenpool_ext as tp

NEEDS_CPU = pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no compiled ops: {tp.backends()['cpu']}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("num_iters", [1, 4])
def test_each_medoid_beats_every_other_member(backend, dtype, weighted, num_iters):
    """sum_l w_l ||x_l - x_i||^2 over all members i, without the identity of the mean."""
    B, N, D, K = 3, 30, 4, 5
    x = tokens(B, N, D, dtype, backend.device)
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device) if weighted else None
    got = tp.kmedoids(
        x, K, weights=w, init=spread_indices(B, N, K, backend.device), num_iters=num_iters, backend=backend.name
    )
    assert_consistent(got, x, K, weights=w, algorithm="kmedoids")
    for b in range(B):
        slack = distance_slack(f64(x[b]), dtype)
        for j in range(K):
            members = (got.assignment[b] == j).nonzero()[:, 0].cpu().numpy()
            scores = np.ones(len(members)) if w is None else f64(w[b])[members]
            losses, best = oracle.best_medoid(f64(x[b])[members], scores)
            chosen = losses[list(members).index(int(got.medoids[b, j]))]
            assert chosen <= losses[best] + 2 * scores.sum() * slack + 1e-6 * losses[best] * (dtype != torch.float64)


def test_ties_go_to_the_lowest_member(backend):
    """A square: all four corners have the same loss.  A pair: both have."""
    x = torch.tensor(
        [[[64.0, 0], [1, 1], [-1, 1], [1, -1], [-1, -1], [66, 0], [0, 64], [0, 64]]], device=backend.device
    )
    got = tp.kmedoids(x, 3, init=torch.tensor([[5, 4, 7]], device=backend.device), num_iters=1, backend=backend.name)
    assert got.assignment[0].tolist() == [0, 1, 1, 1, 1, 0, 2, 2]
    assert got.medoids[0].tolist() == [0, 1, 6]


def test_the_mean_is_weighted(backend):
    """Two light tokens near each other and one heavy: the heavy one is the medoid."""
    x = torch.tensor([[[0.0], [1.0], [5.0]]], device=backend.device)
    for weights, medoid in ([1, 1, 1], 1), ([1, 1, 100], 2), ([100, 1, 1], 0), ([0, 0, 1], 2), ([0, 0, 0], 0):
        w = torch.tensor([weights], device=backend.device, dtype=torch.float32)
        got = tp.kmedoids(x, 1, weights=w, num_iters=1, backend=backend.name)
        assert got.medoids.item() == medoid, weights
        assert got.inertia.item() == pytest.approx(
            sum(u * (v - x[0, medoid, 0].item()) ** 2 for u, v in zip(weights, [0, 1, 5]))
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_centers_are_rows_of_x(backend, dtype):
    x = tokens(2, 20, 7, dtype, backend.device)
    x[0, 3, 2] = -0.0
    got = tp.kmedoids(x, 6, backend=backend.name)
    rows = x.gather(1, got.medoids[:, :, None].expand(-1, -1, 7))
    assert got.centers.view(torch.uint8).equal(rows.view(torch.uint8)), "bit for bit"
    for b in range(2):
        assert len(set(got.medoids[b].tolist())) == 6
        assert got.assignment[b, got.medoids[b]].tolist() == list(range(6)), "a medoid belongs to its own cluster"


@pytest.mark.large
def test_many_iterations_match_the_oracle(backend):
    """Weights without ties: the whole trajectory is the oracle's in float64."""
    dtype = backend.widest
    B, N, D, K = 6, 60, 5, 9
    x, w = tokens(B, N, D, dtype, backend.device), positive_weights(B, N, dtype, backend.device)
    init = spread_indices(B, N, K, backend.device)
    for num_iters in (2, 5, 20):
        got = tp.kmedoids(x, K, weights=w, init=init, num_iters=num_iters, backend=backend.name)
        for b in range(B):
            want = oracle.cluster(
                f64(x[b]), K, init=init[b].tolist(), weights=f64(w[b]), num_iters=num_iters, algorithm="kmedoids"
            )
            assert got.medoids[b].tolist() == want.medoids.tolist()
            assert got.assignment[b].tolist() == want.assignment.tolist()
            assert got.inertia[b].item() == pytest.approx(want.inertia, rel=1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.large
def test_not_worse_than_the_alternating_method_of_the_kmedoids_package(backend):
    """An independent implementation (without weights), from the same start, on squared distances, in the mean."""
    peer = pytest.importorskip("kmedoids")
    B, N, D, K = 6, 80, 5, 8
    x, init = tokens(B, N, D, torch.float32, backend.device, groups=K), spread_indices(B, N, K, backend.device)
    got = tp.kmedoids(x, K, init=init, num_iters=30, backend=backend.name)
    ratio = []
    for b in range(B):
        d = ((f64(x[b])[:, None] - f64(x[b])[None]) ** 2).sum(-1)
        ratio.append(got.inertia[b].item() / peer.alternating(d, init[b].cpu().numpy().astype(np.uint64)).loss)
    assert np.mean(ratio) <= 1.01


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "path", ["reference", pytest.param("gram", marks=NEEDS_CPU), pytest.param("direct", marks=NEEDS_CPU)]
)
def test_ties_that_the_rounding_of_a_mean_would_break(path, dtype, weighted, monkeypatch):
    """A third is no number of float32. Sums of small integers, far from the origin, too, are compared exactly."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randint(0, 4, (600, 11, 3), generator=generator)
        + torch.randint(0, 2, (600, 1, 1), generator=generator) * 96
    )
    w = torch.randint(1, 4, (600, 11), generator=generator) if weighted else torch.ones(600, 11, dtype=torch.int64)
    if path != "reference":
        monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
    got = tp.kmedoids(
        x.to(dtype), 2, weights=w if weighted else None, num_iters=1, backend="cpu" if path != "reference" else path
    )
    for image, weights, labels, medoids in zip(x, w, got.assignment, got.medoids):
        for j in range(2):
            members = (labels == j).nonzero()[:, 0]
            of = weights[members].numpy()  # of two the heavier one, also where both are the same token
            best = oracle.best_medoid(image[members].numpy(), of)[1] if len(members) != 2 else of.argmax()
            assert medoids[j] == members[best]
