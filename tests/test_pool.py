"""pool and unpool: means of any tensor over an assignment, and back (contract 6, 10)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DTYPES, TOLERANCES, assert_identical, assert_same_bits, f64, positive_weights, tokens, weighted_mean

import tokenpool_ext as tp

pytestmark = pytest.mark.one_path

SMALL = [(3, 20, 5, 4), (1, 1, 1, 1), (2, 7, 3, 7), (2, 9, 1, 2), (2, 16, 15, 5)]
LARGE = [(2, 197, 64, 49), (1, 300, 193, 300), (2, 33, 1537, 5)]


def labels(B, N, K, device="cpu", seed=0, padding=0.0, low=0):
    rng = np.random.default_rng(seed)
    a = rng.integers(low, K, (B, N))
    return torch.from_numpy(np.where(rng.random((B, N)) < padding, -1, a)).to(device)


def expected_pool(x, a, K, w=None):
    X, A = f64(x), a.cpu().numpy()
    W = np.ones(A.shape) if w is None else f64(w)
    out = np.zeros((len(X), K, X.shape[2]))
    for b in range(len(X)):
        for j in range(K):
            m = A[b] == j
            if m.any():
                out[b, j] = weighted_mean(X[b][m], W[b][m])
    return out


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SMALL + [pytest.param(s, marks=pytest.mark.large) for s in LARGE], ids=str)
def test_means(backend, shape, dtype, weighted):
    B, N, D, K = shape
    x, a = tokens(B, N, D, dtype, backend.device), labels(B, N, K, backend.device, padding=0.2)
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device) if weighted else None
    got = tp.pool(x, a, K, weights=w, backend=backend.name)
    assert got.shape == (B, K, D) and got.dtype == dtype and got.device == x.device
    np.testing.assert_allclose(f64(got), expected_pool(x, a, K, w), rtol=0, atol=TOLERANCES[dtype].center * 5)


def test_empty_clusters_and_padding_by_hand(backend):
    x = torch.tensor([[[1.0, 2], [3, 4], [9, 9], [5, 0]]], device=backend.device)
    a = torch.tensor([[2, 2, -1, 0]], device=backend.device)
    got = tp.pool(x, a, 4, backend=backend.name)
    assert got.tolist() == [[[5, 0], [0, 0], [2, 3], [0, 0]]]
    w = torch.tensor([[3.0, 1, 7, 0]], device=backend.device)
    got = tp.pool(x, a, 4, weights=w, backend=backend.name)
    assert got.tolist() == [[[5, 0], [0, 0], [1.5, 2.5], [0, 0]]], "weight zero: the plain mean"
    back = tp.unpool(got, a, backend=backend.name)
    assert back.tolist() == [[[1.5, 2.5], [1.5, 2.5], [0, 0], [5, 0]]]


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("D", [512, 509])  # rows of whole vectors, and rows that start anywhere
def test_large_outputs_equal_small_ones(backend, D, dtype, weighted):
    """Outputs above 4 MB are written in another order and past the caches (csrc/cpu/pool.h)."""
    B, N, K = 24 // dtype.itemsize, 400, 30
    x, a = tokens(B, N, D, dtype, backend.device), labels(B, N, K, backend.device, padding=0.1)
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device).requires_grad_() if weighted else None
    x.requires_grad_()
    centers = tp.pool(x, a, K, weights=w, backend=backend.name)
    grad = tokens(B, K, D, dtype, backend.device, seed=3)
    inputs = [x, w] if weighted else [x]
    whole = torch.autograd.grad(centers, inputs, grad)
    unpooled = tp.unpool(centers.detach(), a, backend=backend.name)
    assert unpooled[a < 0].eq(0).all() and whole[0][a < 0].eq(0).all()
    for b in (0, B - 1):
        xb, wb = x[b : b + 1].detach().requires_grad_(), w[b : b + 1].detach().requires_grad_() if weighted else None
        one = tp.pool(xb, a[b : b + 1], K, weights=wb, backend=backend.name)
        for got, want in zip(whole, torch.autograd.grad(one, [xb, wb] if weighted else [xb], grad[b : b + 1])):
            assert_same_bits(backend, got[b : b + 1], want)
        assert_same_bits(
            backend, unpooled[b : b + 1], tp.unpool(centers[b : b + 1].detach(), a[b : b + 1], backend=backend.name)
        )


def test_padding_may_hold_nan(backend):
    x, a = tokens(2, 12, 3, device=backend.device), labels(2, 12, 4, backend.device, padding=0.4)
    spoiled = torch.where((a < 0)[:, :, None], float("nan"), x)
    assert_identical(tp.pool(x, a, 4, backend=backend.name), tp.pool(spoiled, a, 4, backend=backend.name))


@pytest.mark.parametrize("ignored", [-1.0, 1e38, float("inf"), float("nan")])
def test_weights_of_ignored_tokens_are_not_looked_at(backend, ignored):
    x, a = tokens(2, 12, 3, device=backend.device), labels(2, 12, 4, backend.device, padding=0.4)
    w = positive_weights(2, 12, device=backend.device)
    spoiled = torch.where(a < 0, ignored, w)
    got = []
    for weights in (w, spoiled):
        inputs = [x.clone().requires_grad_(), weights.requires_grad_()]
        centers = tp.pool(inputs[0], a, 4, weights=inputs[1], backend=backend.name)
        got.append([centers, *torch.autograd.grad(centers.square().sum(), inputs)])
    assert_identical(*got)
    if ignored < 0 and backend.device == "cpu":
        with pytest.raises(ValueError, match="weights must be >= 0, got -1"):
            tp.pool(x, a.clamp(min=0), 4, weights=spoiled.detach(), backend=backend.name)


def test_nan_stays_in_its_cluster(backend):
    x, a = tokens(1, 12, 3, device=backend.device), (torch.arange(12, device=backend.device) % 4)[None]
    clean = tp.pool(x, a, 4, backend=backend.name)
    x[0, 5] = float("nan")
    got = tp.pool(x, a, 4, backend=backend.name)
    if backend.name != "reference":  # plain matrix products spread it over the image, never further
        assert_identical(clean[:, [0, 2, 3]], got[:, [0, 2, 3]])
    assert got[0, 1].isnan().all()


def test_ones_equal_none_and_scaling(backend):
    x, a = tokens(2, 20, 5, device=backend.device), labels(2, 20, 4, backend.device)
    w = positive_weights(2, 20, device=backend.device)
    ones = torch.ones_like(w)
    assert_identical(tp.pool(x, a, 4, backend=backend.name), tp.pool(x, a, 4, weights=ones, backend=backend.name))
    a1 = tp.pool(x, a, 4, weights=w, backend=backend.name)
    assert_identical(a1, tp.pool(x, a, 4, weights=w * 2.0**-40, backend=backend.name))
    for factor in (1e-30, 1e30):
        torch.testing.assert_close(a1, tp.pool(x, a, 4, weights=w * factor, backend=backend.name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e38])
def test_extreme_values_stay_finite(backend, scale):
    x = tokens(2, 20, 5, torch.float64, backend.device)
    x = x / x.abs().max()
    a, w = labels(2, 20, 4, backend.device), positive_weights(2, 20, device=backend.device)
    got = tp.pool((x * scale).float(), a, 4, weights=w, backend=backend.name)
    want = expected_pool(x, a, 4, w)
    np.testing.assert_allclose(f64(got) / scale, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_pooling_what_was_clustered_gives_the_centers(backend, dtype):
    """Assignment and pooling compose: the same tensor pools to the centers."""
    x, w = tokens(2, 24, 6, dtype, backend.device), positive_weights(2, 24, TOLERANCES[dtype].acc, backend.device)
    c = tp.kmeans(x, 5, weights=w, backend=backend.name)
    got = tp.pool(x, c.assignment, 5, weights=w, backend=backend.name)
    np.testing.assert_allclose(f64(got), f64(c.centers), atol=2 * TOLERANCES[dtype].center * 4)


def test_cluster_features_and_pool_values(backend):
    """Cluster one tensor, pool another of another width and dtype."""
    keys, values = tokens(2, 24, 6, device=backend.device), tokens(2, 24, 9, torch.bfloat16, backend.device, seed=8)
    a = tp.kmeans(keys, 5, backend=backend.name).assignment
    got = tp.pool(values, a, 5, backend=backend.name)
    assert got.shape == (2, 5, 9) and got.dtype == torch.bfloat16
    np.testing.assert_allclose(f64(got), expected_pool(values, a, 5), atol=TOLERANCES[torch.bfloat16].center * 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_unpool_gathers(backend, dtype):
    centers, a = tokens(3, 5, 7, dtype, backend.device), labels(3, 20, 5, backend.device, padding=0.2)
    got = tp.unpool(centers, a, backend=backend.name)
    assert got.shape == (3, 20, 7) and got.dtype == dtype
    want = torch.where((a < 0)[:, :, None], 0, centers.gather(1, a.clamp(min=0)[:, :, None].expand(-1, -1, 7)))
    assert_identical(got, want)


def test_k_equals_n_is_the_identity(backend):
    x = tokens(2, 12, 5, device=backend.device)
    a = torch.stack([torch.from_numpy(np.random.default_rng(i).permutation(12)) for i in range(2)]).to(backend.device)
    assert_identical(tp.unpool(tp.pool(x, a, 12, backend=backend.name), a, backend=backend.name), x)


def test_strides_and_integer_dtypes(backend):
    x, a = tokens(2, 20, 6, device=backend.device), labels(2, 20, 4, backend.device, padding=0.1)
    w = positive_weights(2, 20, device=backend.device)
    want = tp.pool(x, a, 4, weights=w, backend=backend.name)
    wide = torch.full((2, 41, 13), float("nan"), device=backend.device)
    wide[:, 1::2, 1::2] = x
    for view in (wide[:, 1::2, 1::2], x.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        for labelling in (a, a.int(), a.to(torch.int16), a.t().contiguous().t(), torch.stack([a, a], -1)[..., 1]):
            assert_same_bits(backend, want, tp.pool(view, labelling, 4, weights=w, backend=backend.name))
    centers = want
    back = tp.unpool(centers, a, backend=backend.name)
    assert_identical(
        back, tp.unpool(centers.transpose(1, 2).contiguous().transpose(1, 2), a.int(), backend=backend.name)
    )


def test_one_image(backend):
    x, a, w = tokens(1, 10, 3, device=backend.device), labels(1, 10, 3, backend.device), None
    got = tp.pool(x[0], a[0], 3, weights=w, backend=backend.name)
    assert_identical(tp.pool(x, a, 3, backend=backend.name)[0], got)
    assert_identical(tp.unpool(got[None], a, backend=backend.name)[0], tp.unpool(got, a[0], backend=backend.name))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_empty(backend, shape):
    B, N, D = shape
    a = torch.zeros(B, N, dtype=torch.int64, device=backend.device)
    got = tp.pool(torch.ones(shape, device=backend.device), a, 4, backend=backend.name)
    assert got.shape == (B, 4, D) and (N or not got.any())
    assert tp.unpool(got, a, backend=backend.name).shape == shape


def test_labels_out_of_range_do_not_crash(backend):
    """Ignored (the interface's rule), on every backend alike."""
    x = tokens(1, 6, 3, device=backend.device)
    a = torch.tensor([[0, 1, 99, -7, 1, 2**40]], device=backend.device)
    clean = torch.tensor([[0, 1, -1, -1, 1, -1]], device=backend.device)
    try:
        got = tp.pool(x, a, 2, backend=backend.name)
    except ValueError as error:  # also fine: refused with the name of the argument
        assert "assignment" in str(error)
        return
    assert_identical(got, tp.pool(x, clean, 2, backend=backend.name))
    assert_identical(tp.unpool(got, a, backend=backend.name), tp.unpool(got, clean, backend=backend.name))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, low):
    x, a = tokens(2, 12, 3, device=backend.device), labels(2, 12, 4, backend.device)
    want = tp.pool(x, a, 4, backend=backend.name)
    with torch.autocast(backend.device, dtype=low):
        got = tp.pool(x, a, 4, backend=backend.name)
        back = tp.unpool(got, a, backend=backend.name)
    assert_identical(want, got)
    assert back.dtype == torch.float32


def test_backends_agree_exactly_on_integers(backend):
    x = torch.from_numpy(np.random.default_rng(0).integers(-50, 50, (2, 16, 4))).float().to(backend.device)
    a = torch.tensor([[0] * 8 + [1] * 4 + [3] * 2 + [4] + [-1]] * 2, device=backend.device)
    assert f64(tp.pool(x, a, 5, backend=backend.name)).tolist() == expected_pool(x, a, 5).tolist()
