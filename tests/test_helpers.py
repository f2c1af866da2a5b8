"""The test helpers must themselves catch what they claim to catch."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from helpers import (
    Target,
    assert_consistent,
    assert_identical,
    assert_nearest,
    distance_slack,
    distinct_partitions,
    spread_indices,
    take,
    tokens,
    weighted_mean,
)


class Result(NamedTuple):
    centers: torch.Tensor
    assignment: torch.Tensor
    mass: torch.Tensor
    medoids: torch.Tensor
    inertia: torch.Tensor


def solved(x, K, init, algorithm="kmeans", **kwargs):
    """The oracle's answer for one image, as a batched result."""
    answer = oracle.cluster(x[0].double().numpy(), K, init=init[0].numpy(), algorithm=algorithm, **kwargs)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    medoids = answer.medoids
    if medoids is None:
        medoids = oracle.representatives(x[0].double().numpy(), answer.assignment, len(answer.mass))
    return Result(
        torch.from_numpy(answer.centers)[None].to(x.dtype),
        torch.from_numpy(answer.assignment)[None],
        torch.from_numpy(answer.mass)[None].to(acc),
        torch.from_numpy(medoids)[None],
        torch.tensor([answer.inertia]).to(acc),
    )


@pytest.fixture
def case():
    x, init = tokens(1, 40, 5, seed=3), spread_indices(1, 40, 6)
    return x, 6, init


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_a_right_result_is_accepted(case, algorithm):
    x, K, init = case
    assert_consistent(solved(x, K, init, algorithm), x, K, algorithm=algorithm)
    assert_consistent(solved(x, K, init, algorithm, num_iters=1), x, K, algorithm=algorithm, init=init)
    assert_consistent(solved(x, K, init, algorithm, sort=True), x, K, algorithm=algorithm, sort=True)


def broken(case, **changes):
    x, K, init = case
    return solved(x, K, init)._replace(**changes)


def test_each_wrong_field_is_refused(case):
    x, K, init = case
    good = solved(x, K, init)
    shifted = good.centers.clone()
    shifted[0, 2, 1] += 1e-3
    other = good.assignment.clone()
    other[0, 0] = (other[0, 0] + 1) % K
    outside = good.assignment.clone()
    outside[0, 5] = K
    emptied = good.assignment.clone()
    emptied[emptied == 2] = 3
    for change in [
        dict(centers=shifted),
        dict(assignment=other),
        dict(assignment=outside),
        dict(assignment=emptied),
        dict(mass=good.mass * 1.001),
        dict(inertia=good.inertia * 1.001),
        dict(medoids=good.assignment),
        dict(centers=good.centers.double()),
        dict(inertia=good.inertia * float("nan")),
        dict(assignment=good.assignment.int()),
    ]:
        with pytest.raises(AssertionError):
            assert_consistent(good._replace(**change), x, K)


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_wrong_medoid_and_padding_are_refused(case, algorithm):
    x, K, init = case
    good = solved(x, K, init, algorithm)
    members = (good.assignment[0] == good.assignment[0].mode().values).nonzero()[:, 0]
    j = int(good.assignment[0, members[0]])
    far = next(int(m) for m in members if m != good.medoids[0, j])
    medoids, centers = good.medoids.clone(), good.centers.clone()
    medoids[0, j] = far
    if algorithm == "kmedoids":
        centers[0, j] = x[0, far]
    with pytest.raises(AssertionError, match="nearest to its mean"):
        assert_consistent(good._replace(medoids=medoids, centers=centers), x, K, algorithm=algorithm)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 7] = False
    with pytest.raises(AssertionError, match="padding"):
        assert_consistent(solved(x, K, init), x, K, mask=mask)


def test_nearest_accepts_ties_only():
    x = np.array([[0.0], [1.0], [2.0]] * 20)
    centers = np.array([[0.0], [2.0]])
    labels = np.array([0, 0, 1] * 20)
    assert_nearest(x, centers, labels, torch.float32)
    labels[1] = 1  # the token in the middle: an exact tie
    assert_nearest(x, centers, labels, torch.float32)
    labels[0] = 1
    with pytest.raises(AssertionError, match="token 0"):
        assert_nearest(x, centers, labels, torch.float32)


def test_nearest_limits_the_number_of_flips():
    x = np.full((100, 1), 1.0) + 1e-9 * np.arange(100)[:, None]  # all within rounding of the middle
    x[0], x[1] = 0, 2
    centers = np.array([[0.0], [2.0]])
    right = ((x - centers.T) ** 2).argmin(1)
    assert_nearest(x, centers, right, torch.float32)
    with pytest.raises(AssertionError, match="differ from the float64 argmin"):
        assert_nearest(x, centers, np.where(np.arange(100) < 2, right, 0), torch.float32)


def test_slack_knows_that_float32_is_centered():
    x = np.random.default_rng(0).standard_normal((50, 8)) + 100
    assert distance_slack(x, torch.float64) < distance_slack(x, torch.float32) < distance_slack(x, torch.bfloat16)


def test_identical_sees_one_bit_and_nan():
    a = torch.tensor([1.0, float("nan"), 3.0])
    assert_identical((a, None), (a.clone(), None))
    b = a.clone()
    b[2] = torch.nextafter(b[2], torch.tensor(9.0))
    with pytest.raises(AssertionError, match=r"first at \(2,\)"):
        assert_identical(a, b)
    with pytest.raises(AssertionError):
        assert_identical(a, a.double())


def test_small_helpers():
    assert weighted_mean(np.array([[1.0], [3.0]]), np.array([0.0, 0.0])) == 2.0
    assert weighted_mean(np.array([[1.0], [3.0]]), np.array([1e300, 1e300]) * 1e8) == 2.0
    assert distinct_partitions(np.array([0, 0, 1]), np.array([1, 1, 1]))
    assert not distinct_partitions(np.array([0, 0, 1]), np.array([1, 1, 0]))
    r = take(Result(*[torch.arange(3)] * 3, None, torch.arange(3)), slice(1, 2))
    assert r.mass.tolist() == [1] and r.medoids is None
    with Target("cpu", env=(("SOME_VALUE_OF_A_TEST", "x"),)).active():
        assert os.environ["SOME_VALUE_OF_A_TEST"] == "x"
    assert "SOME_VALUE_OF_A_TEST" not in os.environ


# The oracle, against worked examples and against the definitions it shortcuts.


def test_oracle_worked_example():
    x = np.array([[0.0], [1.0], [10.0], [14.0]])
    a = oracle.cluster(x, 2, init=[0, 1], num_iters=1)  # 1 takes 10 and 14
    assert a.assignment.tolist() == [0, 1, 1, 1] and a.mass.tolist() == [1, 3]
    assert a.centers.ravel().tolist() == [0, 25 / 3]
    a = oracle.cluster(x, 2, init=[0, 1], num_iters=5)
    assert a.assignment.tolist() == [0, 0, 1, 1] and a.inertia == 0.5 + 8 and a.iterations == 3
    a = oracle.cluster(x, 2, init=[1, 0], num_iters=5, sort=True)
    assert a.assignment.tolist() == [0, 0, 1, 1]
    a = oracle.cluster(x, 2, init=[0, 1], weights=[1, 1, 3, 1], algorithm="kmedoids")
    assert a.medoids.tolist() == [0, 2] and a.inertia == 1 + 16


def test_oracle_exact_and_float_agree():
    rng = np.random.default_rng(0)
    for _seed in range(10):
        x = rng.integers(-8, 9, (16, 3)).astype(float)
        w = rng.integers(0, 4, 16).astype(float)
        for algorithm in ("kmeans", "kmedoids"):
            p = oracle.cluster(x, 4, init=[1, 5, 9, 13], weights=w, algorithm=algorithm, num_iters=1)
            q = oracle.cluster(x, 4, init=[1, 5, 9, 13], weights=w, algorithm=algorithm, num_iters=1, exact=True)
            assert p.assignment.tolist() == q.assignment.tolist()
            np.testing.assert_allclose(p.inertia, q.inertia, rtol=1e-12)


def test_mean_identity_of_the_medoid_update():
    rng = np.random.default_rng(1)
    for _ in range(50):
        x, w = rng.standard_normal((9, 4)), rng.random(9)
        losses, best = oracle.best_medoid(x, w)
        assert oracle._central(x, w, np.arange(9), oracle._mean(x, w)) == best
        mu = oracle._mean(x, w)
        const = (w * ((x - mu) ** 2).sum(-1)).sum()
        np.testing.assert_allclose(losses, w.sum() * ((x - mu) ** 2).sum(-1) + const)


def test_fractions_make_ties_exact():
    x = np.array([[0.1], [0.2], [0.30000000000000004]])
    assert isinstance(oracle._numbers(x, True)[0, 0], Fraction)
