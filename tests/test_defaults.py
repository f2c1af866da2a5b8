"""torch.set_default_device and set_default_dtype change nothing: the arguments' device and dtype rule."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers import assert_identical, positive_weights, tokens
from model_zoo import PlainModel, liven

import tokenpool_ext as tp
from tokenpool_ext import baselines, doctor, vit, viz
from tokenpool_ext.cost import cost
from tokenpool_ext.retrieval import TokenPooler

pytestmark = pytest.mark.one_path

INITS = ["topk", "strided", "random", "kmeans++", "farthest", "bipartite", None]


def calls(backend):
    """Name -> call of every public function and layer, its tensors made outside."""
    name, device = backend.name, backend.device
    x, w = tokens(3, 16, 4, device=device), positive_weights(3, 16, device=device)
    mask = torch.arange(16, device=device) < torch.tensor([[16], [12], [10]], device=device)
    counts, labels = torch.tensor([4, 8, 5], device=device), torch.arange(16, device=device).expand(3, 16) % 8
    index = labels[:, :8].clone()
    seeded = lambda: torch.Generator(device).manual_seed(0)  # noqa: E731
    found = {}
    for algorithm in ("kmeans", "kmedoids"):
        function = getattr(tp, algorithm)
        for init in ("random", None) if backend.interpreted else INITS:
            options = dict(init=init, generator=seeded() if init in ("random", "kmeans++") else None, backend=name)
            found[f"{algorithm} {init}"] = lambda f=function, o=options: f(
                x, 8, weights=w, **{**o, "generator": o["generator"] and seeded()}
            )
            found[f"{algorithm} {init} masked"] = lambda f=function, o=options: f(
                x, 8, mask=mask, sort=True, **{**o, "generator": o["generator"] and seeded()}
            )
        found[f"{algorithm} counts"] = lambda f=function: f(x, counts, weights=w, check_finite=True, backend=name)
        found[f"{algorithm} index"] = lambda f=function: f(x, counts, init=index, mask=mask, backend=name)

    def gradients():
        at = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = tp.kmeans(at[0], 8, weights=at[1], backend=name).centers.square().sum()
        return torch.autograd.grad(loss + tp.pool(at[0], labels, 8, weights=at[1], backend=name).sum(), at)

    found["gradients"] = gradients
    found["pool"] = lambda: (tp.pool(x, labels, 8, weights=w, backend=name), tp.pool(x, labels, 8, backend=name))
    found["unpool"] = lambda: (tp.unpool(x, labels, backend=name),)
    found["attention_received"] = lambda: (tp.attention_received(x[:, None], x[:, None], backend=name),)
    layers = {
        "TokenPooling": lambda **o: tp.TokenPooling(keep_ratio=0.5, **o),
        "TokenPooling medoids": lambda **o: tp.TokenPooling(8, algorithm="kmedoids", emit="mean", **o),
        "ScorePruning": lambda **o: baselines.ScorePruning(8, **o),
        "ImportanceSampling": lambda **o: baselines.ImportanceSampling(8, seed=1, **o),
        "RandomSelection": lambda **o: baselines.RandomSelection(8, seed=1, **o),
        "GridPooling": lambda **o: baselines.GridPooling(8, **o),
        "BipartiteMatching": lambda **o: baselines.BipartiteMatching(6, **o),
    }
    for layer, make in layers.items():
        found[layer] = lambda make=make: make(num_prefix_tokens=0, return_clusters=True, backend=name)(x, w, sizes=w)
    return found


@contextlib.contextmanager
def under(default):
    """A default device (a name) or a default dtype."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_device(default) if isinstance(default, str) else torch.set_default_dtype(default)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def flat(result):
    return [t for part in result for t in (part if isinstance(part, tuple) else (part,))]


def test_defaults_change_nothing(backend):
    made = calls(backend)
    want = {name: flat(call()) for name, call in made.items()}
    for default in ("meta", torch.bfloat16, torch.float64):
        with under(default):
            got = {name: flat(call()) for name, call in made.items()}
        for name in made:
            assert_identical(want[name], got[name], what=f"{name} under {default}")


@pytest.mark.parametrize("default", ["meta", torch.bfloat16], ids=str)
def test_pictures_and_plans_under_defaults(default):
    image = pytest.importorskip("PIL.Image").new("RGB", (32, 32), (10, 200, 30))
    labels = torch.arange(16).view(4, 4) % 3

    def drawn():
        return [viz.draw_clusters(image, labels).tobytes(), viz.draw_grid(image, 4, 4).tobytes()] + [
            str(tp.explain(2, 196, 98, 64))
        ]

    want = drawn()
    with under(default):
        assert drawn() == want


@pytest.mark.parametrize("default", ["meta", torch.bfloat16], ids=str)
def test_models_and_images_under_defaults(default):
    torch.manual_seed(0)
    model, x = liven(PlainModel()), torch.randn(2, 16, 8)
    pages, document = tokens(2, 16, 4), [tokens(1, n, 4)[0] for n in (9, 5)]

    def patched(**options):
        with torch.no_grad():
            return vit.patch(copy.deepcopy(model), **options)(x)

    def results():
        torch.manual_seed(0)
        return [
            *(patched(keep_ratio=0.5, pooling=p) for p in vit.patching.POOLINGS),
            patched(keep_ratio=0.5, protect=[3]),
            patched(budget=0.8, example=x, position_weight=1.0),
            cost(vit.patch(copy.deepcopy(model), keep_ratio=0.5), x).total,
            tp.search_schedule(model, [x], budget=0.9, layers=[1, 2], counts=[8, 4]),
            tp.learn_schedule(
                copy.deepcopy(model), [x], penalty=1e-3, steps=2, loss=lambda out, _: out.square().mean()
            ),
            *tp.compress(pages, 4, grid=(4, 4), position_weight=1.0),
            *tp.compress(pages, 4, grid=(2, 2, 4), temporal_window=1),
            *tp.select(pages, 4, grid=(4, 4)),
            *TokenPooler(pool_factor=2)(document),
            *TokenPooler(max_error=0.5)(document),
            tp.assign(pages, pages[:, :3]),
            doctor.self_test("cpu", "cpu")[:2],
        ]

    want = results()
    with under(default):
        got = results()
    for a, b in zip(want, got, strict=True):
        if isinstance(a, torch.Tensor):
            assert_identical([a], [b])
        else:
            assert a == b
