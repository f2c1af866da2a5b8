"""Second derivatives, forward mode, torch.func and torch.compile around it (contract 6: the assignment is constant)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import f64, positive_weights, spread_indices, tokens
from torch.autograd import gradcheck, gradgradcheck

import tokenpool_ext as tp

pytestmark = pytest.mark.one_path

B, N, D, K = 2, 7, 2, 4
LABELS = [[0, 1, 1, -1, 3, 3, 3], [2, 2, 2, 2, 0, -1, -1]]
OPS = ["kmeans", "kmeans-plain", "kmedoids", "pool", "pool-plain", "unpool"]


def smooth(op, backend, labels=None):
    """(function of x and w, its inputs): a public function, everything that is not differentiated fixed."""
    init, name = spread_indices(B, N, K), backend.name
    labels = torch.tensor(LABELS)
    x, w = tokens(B, N, D, torch.float64), positive_weights(B, N, torch.float64)
    functions = {
        "kmeans": lambda x, w: tp.kmeans(x, K, weights=w, init=init, num_iters=2, backend=name).centers,
        "kmeans-plain": lambda x: tp.kmeans(x, K, init=init, num_iters=2, backend=name).centers,
        "kmedoids": lambda x, w: tp.kmedoids(x, K, weights=w, init=init, num_iters=2, backend=name).centers,
        "pool": lambda x, w: tp.pool(x, labels, K, weights=w, backend=name),
        "pool-plain": lambda x: tp.pool(x, labels, K, backend=name),
        "unpool": lambda x: tp.unpool(x[:, :K], labels, backend=name),
    }
    inputs = (x,) if op in ("kmeans-plain", "pool-plain", "unpool") else (x, w)
    return functions[op], tuple(t.requires_grad_() for t in inputs)


@pytest.fixture
def exact(backend):
    if backend.name in ("cuda", "triton"):
        pytest.skip(f"{backend.name} takes no float64; it shares every formula with the others")
    return backend


@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_every_kind(exact, op):
    function, inputs = smooth(op, exact)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


def test_the_hessian_of_a_mean_by_hand(exact):
    """f = |c|^2 of one cluster: d2f/dx_i dx_l = 2 p_i p_l; and d2f/dw_i dw_l from c = sum w x / W."""
    x, w = tokens(1, 5, 1, torch.float64), positive_weights(1, 5, torch.float64)
    labels = torch.zeros(1, 5, dtype=torch.int64)

    def f(x, w):
        return tp.pool(x, labels, 1, weights=w, backend=exact.name).square().sum()

    X, W = f64(x)[0, :, 0], f64(w)[0]
    total, c = W.sum(), (W * X).sum() / W.sum()
    u = (X - c) / total
    by_w = 2 * np.outer(u, u) - 2 * c * (u[:, None] + u[None]) / total
    for hessian in (torch.autograd.functional.hessian, lambda f, at: torch.func.hessian(f)(at)):
        np.testing.assert_allclose(f64(hessian(lambda t: f(t, w), x)).squeeze(), 2 * np.outer(W, W) / total**2)
        np.testing.assert_allclose(f64(hessian(lambda t: f(x, t), w)).squeeze(), by_w)


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_a_gradient_penalty_trains(backend, algorithm):
    """d/da |d(sum c^2)/dx|^2 with x = a y: each gradient is linear in a, so the penalty is a^2 times its value at 1."""
    y = tokens(2, 12, 3, device=backend.device)
    a = torch.tensor(1.5, device=backend.device, requires_grad=True)
    x = a * y
    loss = getattr(tp, algorithm)(x, 4, backend=backend.name).centers.square().sum()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = g.square().sum()
    penalty.backward()
    torch.testing.assert_close(a.grad, 2 * penalty.detach() / a.detach())


@pytest.mark.parametrize("op", OPS)
def test_torch_func_agrees_with_autograd(exact, op):
    function, inputs = smooth(op, exact)

    def loss(*inputs):
        return function(*inputs).square().sum()

    plain = tuple(t.detach() for t in inputs)
    every = tuple(range(len(plain)))
    want = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.func.grad(loss, every)(*plain), want)
    ones = tuple(torch.ones_like(t) for t in plain)
    _, along = torch.func.jvp(loss, plain, ones)
    torch.testing.assert_close(along, sum(g.sum() for g in want))
    hessian = torch.func.hessian(loss)(*plain)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: loss(x, *plain[1:]), plain[0]))
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(loss))(*plain), hessian)


def test_vmap_is_a_larger_batch(backend):
    x, w = tokens(6, 12, 4, device=backend.device).view(3, 2, 12, 4), positive_weights(6, 12, device=backend.device)
    w = w.view(3, 2, 12)
    labels = torch.arange(12, device=backend.device).expand(2, 12) % 4
    name = backend.name
    for function in (
        lambda x, w: tp.kmeans(x, 4, weights=w, backend=name)[:3],
        lambda x, w: tp.kmeans(x, 8, weights=w, init="bipartite", backend=name)[:3],
        lambda x, w: tuple(tp.kmedoids(x, 4, weights=w, sort=True, backend=name)),
        lambda x, w: (tp.pool(x, labels, 4, weights=w, backend=name),),
        lambda x, w: (tp.unpool(x, labels, backend=name),),
        lambda x, w: (tp.attention_received(x[:, None], x[:, None], backend=name),),
        lambda x, w: (torch.func.grad(lambda x: tp.kmeans(x, 4, weights=w, backend=name).centers.norm())(x),),
    ):
        got = torch.vmap(function)(x, w)
        want = [torch.stack(parts) for parts in zip(*(function(a, b) for a, b in zip(x, w)))]
        torch.testing.assert_close(list(got), want)
    one = torch.vmap(lambda w: tp.pool(x[0], labels, 4, weights=w, backend=name), in_dims=1)(w.transpose(0, 1))
    torch.testing.assert_close(one[2], tp.pool(x[0], labels, 4, weights=w[2], backend=name))


def test_vmap_of_one_image_and_of_layers(backend):
    x = tokens(3, 12, 4, device=backend.device)
    got = torch.vmap(lambda x: tp.kmeans(x, 4, backend=backend.name).centers)(x)
    torch.testing.assert_close(got, tp.kmeans(x, 4, backend=backend.name).centers)
    layer = tp.TokenPooling(5, backend=backend.name)
    torch.testing.assert_close(torch.vmap(layer)(x[:, None])[:, 0], layer(x))


def test_what_needs_values_is_refused_under_vmap_by_name():
    x, mask, counts = (
        tokens(6, 12, 4).view(3, 2, 12, 4),
        torch.arange(72).view(3, 2, 12) % 12 > 2,
        torch.full((3, 2), 4),
    )
    with pytest.raises(TypeError, match="kmeans: num_clusters must not be mapped over by torch.vmap"):
        torch.vmap(lambda x, k: tp.kmeans(x, k).centers)(x, counts)
    with pytest.raises(TypeError, match="kmedoids: x beside check_finite must not be mapped"):
        torch.vmap(lambda x: tp.kmedoids(x, 4, check_finite=True).centers)(x)
    for options in ({"init": "bipartite"}, {"weights": torch.where(mask[0], 1.0, -1.0)}):  # masks are mapped over
        one = lambda mask: tp.kmeans(x[0], 8, mask=mask, **options).centers  # noqa: E731
        torch.testing.assert_close(torch.vmap(one)(mask), torch.stack([one(m) for m in mask]))


def test_checks_of_values_hold_under_grad(exact):
    x = tokens(2, 12, 3, device=exact.device)
    if exact.device == "cpu":
        with pytest.raises(ValueError, match="weights must be >= 0"):
            torch.func.grad(lambda w: tp.kmeans(x, 4, weights=w, backend=exact.name).centers.sum())(-torch.ones(2, 12))


@pytest.mark.parametrize("op", ["kmeans", "kmedoids", "pool", "unpool"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian", "grad of grad"])
def test_torch_func_inside_compile(exact, op, transform):
    function, inputs = smooth(op, exact)
    x, rest = inputs[0].detach(), tuple(t.detach() for t in inputs[1:])

    def loss(x):
        return function(x, *rest).pow(3).sum()

    transformed = {
        "grad": torch.func.grad(loss),
        "jvp": lambda x: torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1],
        "vmap": lambda x: torch.func.vmap(loss)(torch.stack([x, 2 * x])),
        "hessian": torch.func.hessian(loss),
        "grad of grad": torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum()),
    }[transform]
    # Over the graphs of the reference AOT takes three times as long as Dynamo; K-Means' Hessian holds every transform.
    dynamo_alone = exact.name == "reference" and (transform, op) != ("hessian", "kmeans")
    compiler = "eager" if dynamo_alone else "aot_eager"
    torch._dynamo.reset()
    want = transformed(x)
    assert want.abs().max() > 0
    torch.testing.assert_close(torch.compile(transformed, backend=compiler)(x), want)


def test_compiled_weights_have_gradients_under_torch_func(exact):
    function, inputs = smooth("kmeans", exact)
    x, w = (t.detach() for t in inputs)

    def loss(w):
        return function(x, w).square().sum()

    torch._dynamo.reset()
    want = torch.func.grad(loss)(w)
    torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="aot_eager")(w), want)
    assert want.abs().max() > 0
