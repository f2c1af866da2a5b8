"""Defects that were found in review, each with its smallest reproduction."""

import pytest
import torch

import tokenpool_ext as tp
from tokenpool_ext import loader

needs_cpu = pytest.mark.skipif(loader.extension is None, reason=str(loader.ops_reason))


def test_a_nan_weight_does_not_hide_negative_ones():
    w = torch.ones(2, 8)
    w[0, 0], w[1] = float("nan"), -1e3
    with pytest.raises(ValueError, match="weights must be >= 0, got -1000"):
        tp.kmeans(torch.randn(2, 8, 3), 2, weights=w)


@needs_cpu
def test_negative_weights_cannot_corrupt_memory():
    """The op itself, past the public checks: every label stays in range."""
    x = torch.arange(64.0)[None, :, None] * 100
    init = torch.full((1, 8, 1), 1e6)
    init[:, 0] = 0
    labels = torch.ops.tokenpool_ext.kmeans(x, torch.full((1, 64), -1e3), None, None, init, 8, 5, False)[1]
    assert labels.min() >= 0 and labels.max() < 8


def test_weights_of_padding_are_not_looked_at():
    mask = torch.tensor([[True] * 4 + [False] * 2])
    x = torch.randn(1, 6, 2)
    w = torch.tensor([[1.0, 1, 1, 1, -1, float("-inf")]])
    expected = tp.kmeans(x[:, :4], 2, weights=w[:, :4], init="topk")
    assert torch.equal(tp.kmeans(x, 2, weights=w, mask=mask, init="topk").assignment[:, :4], expected.assignment)


@pytest.mark.parametrize("size", [1e38, 1e-44])
@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_pool_with_huge_and_tiny_weights(size, name):
    x = torch.randn(1, 6, 2)
    pooled = tp.pool(x, torch.zeros(1, 6, dtype=torch.int64), 1, weights=torch.full((1, 6), size), backend=name)
    torch.testing.assert_close(pooled, x.mean(1, keepdim=True))


@pytest.mark.parametrize("factor", [1e20, 1e-20, 2.0**-60])
def test_bipartite_start_does_not_depend_on_the_scale(factor):
    x = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
    once = [tp.kmeans(x * f, 20, init="bipartite", num_iters=1).assignment for f in (1.0, factor)]
    assert torch.equal(*once)


def test_bipartite_start_refuses_few_clusters_also_with_a_mask():
    x = torch.randn(1, 32, 4)
    for options in ({"mask": torch.ones(1, 32, dtype=torch.bool)}, {"num_clusters": torch.tensor([3])}):
        with pytest.raises(ValueError, match="at least half"):
            tp.kmeans(x, **{"num_clusters": 3, "init": "bipartite", **options})


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_a_wrong_log_sum_exp_gives_infinity_not_garbage(name):
    q = torch.full((1, 1, 4, 4), 20.0)
    assert torch.isinf(tp.attention_received(q, q, lse=torch.zeros(1, 1, 4), backend=name)).all()


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_index_of_padding_means_the_next_valid_token(name):
    mask = torch.tensor([[False, True, True, False, True, False]])
    x = torch.randn(1, 6, 2)
    given, meant = torch.tensor([[0, 3, 5]]), torch.tensor([[1, 4, 4]])
    results = [tp.kmeans(x, 3, mask=mask, init=init, num_iters=1, backend=name).assignment for init in (given, meant)]
    assert torch.equal(*results)


def test_numbers_and_names_outside_their_range_are_named():
    x = torch.randn(1, 8, 2)
    with pytest.raises(ValueError, match="num_iters must be from 1 to"):
        tp.kmeans(x, 2, num_iters=2**70)
    with pytest.raises(TypeError, match="backend must be a string"):
        tp.kmeans(x, 2, backend=0)


def test_explain_tells_what_was_forced(monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_BACKEND", "reference")
    text = str(tp.explain(2, 16, 4, 8))
    assert "(None)" not in text and "'reference'" in text


# Found by a reader of the CPU kernels --------------------------------------------------------------------------------


def cpu_only():
    if tp.backends()["cpu"] != "ok":
        pytest.skip("no cpu backend")


def test_no_features_and_too_many_products_to_keep():
    cpu_only()
    got = tp.kmeans(torch.zeros(1, 8192, 0), 1024, num_iters=1, backend="cpu")
    assert got.centers.shape == (1, 1024, 0) and not got.inertia.any()


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_vmap_never_loses_a_gradient_silently(algorithm):
    cpu_only()
    cluster = getattr(tp, algorithm)

    def loss(z):
        return torch.func.vmap(lambda q: cluster(q, 3, backend="cpu").centers)(z).square().sum()

    z = torch.randn(3, 2, 12, 8, requires_grad=True)
    (want,) = torch.autograd.grad(cluster(z.flatten(0, 1), 3, backend="cpu").centers.square().sum(), z)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), want)


def test_a_nan_weight_alone_in_its_cluster_reaches_the_inertia():
    cpu_only()
    weights = torch.ones(1, 4)
    weights[0, 1] = torch.nan
    got = tp.kmeans(torch.randn(1, 4, 3), 4, weights=weights, init=torch.arange(4)[None], backend="cpu")
    assert got.mass.isnan().sum() == 1 and got.inertia.isnan().all()


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_repair_when_weight_times_distance_would_overflow(algorithm):
    cpu_only()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (1, 40, 4096), generator=generator) * 1.98 - 0.99
    x[:, :20] = x[:, :1]
    weights = torch.rand(1, 40, generator=generator) + 0.4
    init = torch.arange(10)[None]
    small = getattr(tp, algorithm)(x, 10, weights=weights, init=init, num_iters=1, backend="cpu")
    huge = getattr(tp, algorithm)(x * 2.0**39, 10, weights=weights * 2.0**39, init=init, num_iters=1, backend="cpu")
    assert torch.equal(small.assignment, huge.assignment)
