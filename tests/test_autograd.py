"""Gradients with the assignment held constant (contract 6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DTYPES, TOLERANCES, assert_identical, f64, positive_weights, spread_indices, tokens

import tokenpool_ext as tp

pytestmark = pytest.mark.one_path

ALGORITHMS = ["kmeans", "kmedoids"]


def float64_or_skip(backend):
    if backend.name in ("cuda", "triton"):
        pytest.skip(f"{backend.name} takes no float64; its backward is compared with the formula below")


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradcheck_clustering(backend, algorithm, weighted, masked):
    float64_or_skip(backend)
    B, N, D, K = 2, 9, 2, 4
    x = tokens(B, N, D, torch.float64, backend.device).requires_grad_()
    w = (
        positive_weights(B, N, torch.float64, backend.device).requires_grad_(algorithm == "kmeans")
        if weighted
        else None
    )
    mask = torch.arange(N) < torch.tensor([[N], [6]]) if masked else None
    init = spread_indices(B, 6, K)

    def centers(x, w):
        return getattr(tp, algorithm)(x, K, weights=w, mask=mask, init=init, num_iters=2, backend=backend.name).centers

    assert torch.autograd.gradcheck(centers, (x, w), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sorted_clusters_have_the_same_gradient(backend, algorithm):
    """Sorting puts the clusters in another order: the gradient of each still goes to its own members."""
    B, N, D, K = 2, 20, 3, 5
    x = tokens(B, N, D, device=backend.device).requires_grad_()
    weight = tokens(B, K, D, device=backend.device, seed=1)
    init = spread_indices(B, N, K, device=backend.device).flip(1)
    found = []
    for sort in (False, True):
        clusters = getattr(tp, algorithm)(x, K, init=init, num_iters=2, sort=sort, backend=backend.name)
        if sort:  # the weight of the cluster that each token was in
            weight = torch.empty_like(weight).scatter_(
                1,
                clusters.assignment[..., None].expand_as(x),
                weight.gather(1, found[0][0].assignment[..., None].expand_as(x)),
            )
        found.append((clusters, *torch.autograd.grad((clusters.centers * weight).sum(), x)))
    assert not torch.equal(found[0][0].assignment, found[1][0].assignment)
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradcheck_pool_and_unpool(backend, weighted):
    float64_or_skip(backend)
    x = tokens(2, 8, 3, torch.float64).requires_grad_()
    w = positive_weights(2, 8, torch.float64).requires_grad_() if weighted else None
    a = torch.tensor([[0, 1, 1, -1, 3, 3, 3, 0], [2, 2, 2, 2, 2, 2, 0, -1]])
    assert torch.autograd.gradcheck(lambda x, w: tp.pool(x, a, 4, weights=w, backend=backend.name), (x, w))
    c = tokens(2, 4, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: tp.unpool(c, a, backend=backend.name), (c,))
    # through both: reconstruction error of a clustering
    assert torch.autograd.gradcheck(
        lambda x: (x - tp.unpool(tp.pool(x, a, 4, backend=backend.name), a, backend=backend.name)).square().sum(), (x,)
    )


def formula(x, a, K, grad, w=None):
    """contract 6, in float64: (dL/dx, dL/dw); plain mean and no weight gradient where the weights add up to zero."""
    X, A, G = f64(x), a.cpu().numpy(), f64(grad)
    W = np.ones(A.shape) if w is None else f64(w)
    gx, gw = np.zeros(X.shape), np.zeros(A.shape)
    for b in range(len(X)):
        for j in range(K):
            m = np.flatnonzero(A[b] == j)
            if not len(m):
                continue
            total = W[b][m].sum()
            p = W[b][m] / total if total else np.full(len(m), 1 / len(m))
            gx[b][m] = p[:, None] * G[b, j]
            if total:
                gw[b][m] = ((X[b][m] - p @ X[b][m]) @ G[b, j]) / total
    return gx, gw


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape",
    [(2, 20, 5, 4), (1, 1, 1, 1), (2, 9, 7, 9), pytest.param((2, 197, 65, 49), marks=pytest.mark.large)],
    ids=str,
)
@pytest.mark.parametrize("op", ["kmeans", "pool"])
def test_backward_is_the_formula(backend, op, shape, dtype):
    B, N, D, K = shape
    acc = TOLERANCES[dtype].acc
    x = tokens(B, N, D, dtype, backend.device).requires_grad_()
    w = positive_weights(B, N, acc, backend.device)
    if N > 4:
        w[0, ::2] = 0
    w.requires_grad_()
    grad = tokens(B, K, D, dtype, backend.device, seed=9)
    if op == "kmeans":
        result = tp.kmeans(
            x, K, weights=w, init=spread_indices(B, N, K, backend.device), num_iters=2, backend=backend.name
        )
        centers, a = result.centers, result.assignment
    else:
        a = torch.from_numpy(np.random.default_rng(0).integers(-1, K, (B, N))).to(backend.device)
        centers = tp.pool(x, a, K, weights=w, backend=backend.name)
    gx, gw = torch.autograd.grad(centers, (x, w), grad)
    assert gx.dtype == dtype and gw.dtype == w.dtype and gx.shape == x.shape and gw.shape == w.shape
    want_x, want_w = formula(x, a, K, grad, w)
    np.testing.assert_allclose(f64(gx), want_x, rtol=4 * TOLERANCES[dtype].center, atol=8 * TOLERANCES[dtype].center)
    # (x - c) . g / W with c rounded to x.dtype: an error of |c| u_x |g| sqrt(D) / W
    scale = np.sqrt(D) * 8 / max(f64(w)[f64(w) > 0].min(), 0.1)
    np.testing.assert_allclose(
        f64(gw), want_w, rtol=1e-3 if dtype != torch.float64 else 1e-9, atol=scale * TOLERANCES[dtype].center * 2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_unpool_backward_sums_over_members(backend, dtype):
    B, N, D, K = 2, 30, 5, 4
    c = tokens(B, K, D, dtype, backend.device).requires_grad_()
    a = torch.from_numpy(np.random.default_rng(0).integers(-1, K - 1, (B, N))).to(backend.device)
    grad = tokens(B, N, D, dtype, backend.device, seed=4)
    (gc,) = torch.autograd.grad(tp.unpool(c, a, backend=backend.name), c, grad)
    want = np.stack([[f64(grad[b])[(a[b] == j).cpu().numpy()].sum(0) for j in range(K)] for b in range(B)])
    assert gc.dtype == dtype
    np.testing.assert_allclose(f64(gc), want, rtol=2 * TOLERANCES[dtype].center, atol=30 * TOLERANCES[dtype].center)
    assert not gc[:, K - 1].any(), "an empty cluster has gradient zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_kmedoids_backward_is_a_scatter(backend, dtype):
    B, N, D, K = 2, 20, 5, 6
    x = tokens(B, N, D, dtype, backend.device).requires_grad_()
    w = positive_weights(B, N, TOLERANCES[dtype].acc, backend.device).requires_grad_()
    counts = torch.tensor([6, 3], device=backend.device)
    got = tp.kmedoids(x, counts, weights=w, backend=backend.name)
    grad = tokens(B, K, D, dtype, backend.device, seed=4)
    gx, gw = torch.autograd.grad(got.centers, (x, w), grad, allow_unused=True)
    want = torch.zeros_like(x)
    for b in range(B):
        for j in range(int(counts[b])):
            want[b, got.medoids[b, j]] += grad[b, j]
    assert_identical(want, gx)
    assert gw is None or not gw.any(), "the weights of K-Medoids have no gradient"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_gets_no_gradient(backend, algorithm):
    x = tokens(2, 12, 3, device=backend.device)
    mask = torch.arange(12, device=backend.device) < torch.tensor([[12], [7]], device=backend.device)
    x = torch.where(mask[:, :, None], x, float("nan")).requires_grad_()
    w = torch.where(mask, positive_weights(2, 12, device=backend.device), float("nan")).requires_grad_()
    c = getattr(tp, algorithm)(x, 4, weights=w, mask=mask, backend=backend.name).centers
    gx, gw = torch.autograd.grad(c.sum(), (x, w), allow_unused=True)
    assert torch.isfinite(gx).all() and not gx[1, 7:].any()
    assert gw is None or (torch.isfinite(gw).all() and not gw[1, 7:].any())


def test_a_cluster_without_weight_has_the_plain_mean(backend):
    x = tokens(1, 6, 3, device=backend.device).requires_grad_()
    w = torch.tensor([[0.0, 0, 0, 1, 2, 3]], device=backend.device, requires_grad=True)
    a = torch.tensor([[0, 0, 0, 1, 1, 1]], device=backend.device)
    gx, gw = torch.autograd.grad(tp.pool(x, a, 2, weights=w, backend=backend.name).sum(), (x, w))
    torch.testing.assert_close(gx[0, :, 0].cpu(), torch.tensor([1, 1, 1, 0.5, 1, 1.5]) / 3)
    assert not gw[0, :3].any() and torch.isfinite(gw).all()


@pytest.mark.parametrize("op", ["kmeans", "kmedoids", "pool", "unpool"])
def test_incoming_gradients_and_inputs_are_not_modified(backend, op):
    x, w = tokens(2, 12, 3, device=backend.device).requires_grad_(), positive_weights(2, 12, device=backend.device)
    a = torch.arange(12, device=backend.device).expand(2, 12) % 4
    out = {
        "kmeans": lambda: tp.kmeans(x, 4, weights=w, backend=backend.name).centers,
        "kmedoids": lambda: tp.kmedoids(x, 4, weights=w, backend=backend.name).centers,
        "pool": lambda: tp.pool(x, a, 4, weights=w, backend=backend.name),
        "unpool": lambda: tp.unpool(x[:, :4], a, backend=backend.name),
    }[op]()
    grad = tokens(*out.shape, device=backend.device, seed=3)
    kept, before = grad.clone(), x.detach().clone()
    (first,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    assert_identical(grad, kept)
    assert_identical(x.detach(), before)
    (again,) = torch.autograd.grad(out, x, grad)
    assert_identical(first, again, what="run to run")
    assert first.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("op", ["kmeans", "kmedoids", "pool", "unpool"])
def test_gradients_of_any_stride(backend, op):
    """sum().backward() sends an expanded scalar; slices send holes."""
    x = tokens(2, 12, 3, device=backend.device).requires_grad_()
    a = torch.arange(12, device=backend.device).expand(2, 12) % 4
    out = {
        "kmeans": lambda: tp.kmeans(x, 4, backend=backend.name).centers,
        "kmedoids": lambda: tp.kmedoids(x, 4, backend=backend.name).centers,
        "pool": lambda: tp.pool(x, a, 4, backend=backend.name),
        "unpool": lambda: tp.unpool(x[:, :4], a, backend=backend.name),
    }[op]()
    grad = tokens(*out.shape, device=backend.device, seed=3)
    want = torch.autograd.grad(out, x, grad, retain_graph=True)
    for view in (grad.transpose(0, 2).contiguous().transpose(0, 2), torch.stack([grad, grad], -1)[..., 1]):
        got = torch.autograd.grad(out, x, view, retain_graph=True)
        torch.testing.assert_close(want, got)
    ones = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    assert_identical(ones, torch.autograd.grad(out.sum(), x))


def test_what_has_no_gradient_says_so(backend):
    x = tokens(2, 12, 3, device=backend.device).requires_grad_()
    w = positive_weights(2, 12, device=backend.device).requires_grad_()
    for algorithm in ALGORITHMS:
        got = getattr(tp, algorithm)(x, 4, weights=w, backend=backend.name)
        assert got.centers.requires_grad
        for t in (got.assignment, got.mass, got.medoids, got.inertia):
            assert t is None or not t.requires_grad
    plain, start = x.detach(), x.detach()[:, :4].clone().requires_grad_()
    assert not tp.kmeans(plain, 4, init=start, backend=backend.name).centers.requires_grad
    with torch.no_grad():
        assert not tp.kmeans(x, 4, weights=w, backend=backend.name).centers.requires_grad


def test_only_weights_or_only_tokens(backend):
    x, w = tokens(2, 12, 3, device=backend.device), positive_weights(2, 12, device=backend.device)
    a = torch.arange(12, device=backend.device).expand(2, 12) % 4
    only_w = w.clone().requires_grad_()
    tp.pool(x, a, 4, weights=only_w, backend=backend.name).square().sum().backward()
    only_x = x.clone().requires_grad_()
    tp.pool(only_x, a, 4, weights=w, backend=backend.name).square().sum().backward()
    both_x, both_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    tp.pool(both_x, a, 4, weights=both_w, backend=backend.name).square().sum().backward()
    assert_identical(both_w.grad, only_w.grad)
    assert_identical(both_x.grad, only_x.grad)


def test_weights_in_their_own_dtype(backend):
    """bfloat16 scores get a bfloat16 gradient although they are used in float32."""
    x = tokens(2, 12, 3, torch.bfloat16, backend.device).requires_grad_()
    w = positive_weights(2, 12, torch.bfloat16, backend.device).requires_grad_()
    tp.kmeans(x, 4, weights=w, backend=backend.name).centers.float().square().sum().backward()
    assert w.grad.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16


def test_one_image_gradient(backend):
    x = tokens(1, 12, 3, device=backend.device)
    a = x.clone().requires_grad_()
    tp.kmeans(a, 4, backend=backend.name).centers.square().sum().backward()
    b = x[0].clone().requires_grad_()
    tp.kmeans(b, 4, backend=backend.name).centers.square().sum().backward()
    assert_identical(a.grad[0], b.grad)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0)], ids=str)
def test_empty_gradients(backend, shape):
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    for algorithm in ALGORITHMS:
        getattr(tp, algorithm)(x, 2, backend=backend.name).centers.sum().backward()
        assert x.grad.shape == shape


def test_checkpointing_gives_the_same_gradient(backend):
    from torch.utils.checkpoint import checkpoint

    x = tokens(2, 12, 3, device=backend.device)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()

    def step(t):
        return tp.kmeans(t * 2, 4, backend=backend.name).centers.tanh()

    step(a).sum().backward()
    checkpoint(step, b, use_reentrant=False).sum().backward()
    assert_identical(a.grad, b.grad)


def test_backward_under_autocast(backend):
    x = tokens(2, 12, 3, device=backend.device)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    tp.kmeans(a, 4, backend=backend.name).centers.sum().backward()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        tp.kmeans(b, 4, backend=backend.name).centers.sum().backward()
    assert_identical(a.grad, b.grad)


def test_fifty_steps_lower_a_loss(backend):
    """Trainable: a linear map before pooling learns to reach given cluster means."""
    steps = 12 if backend.name == "triton" else 50
    x, target = tokens(2, 12, 3, device=backend.device, groups=3), tokens(2, 3, 3, device=backend.device, seed=5)
    layer = torch.eye(3, device=backend.device).requires_grad_()
    optimiser = torch.optim.SGD([layer], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (tp.kmeans(x @ layer, 3, backend=backend.name).centers - target).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.95
