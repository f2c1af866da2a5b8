"""explain: which code would run, and why (contract 4, 11)."""

from __future__ import annotations

import pytest
import torch

import tokenpool_ext as tp

VIT = dict(B=64, N=256, K=128, D=384)
SMALL = dict(B=64, N=64, K=32, D=192)
LONG = dict(B=1, N=20000, K=100, D=64)


def test_one_readable_paragraph():
    plan = tp.explain(**VIT, dtype=torch.float32, device="cpu")
    text = str(plan)
    assert isinstance(plan, tp.Plan) and "\n" not in text and len(text) > 80
    for part in (plan.backend, plan.path, plan.reason, "256", "384", "128"):
        assert str(part) in text
    assert plan.flops > 0 and plan.bytes > 0


@pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
def test_the_planner_knows_when_gram_pays():
    """gram for few tokens, and for a ViT's where nothing is rounded; direct for long sequences and few clusters."""
    assert tp.explain(**VIT, dtype=torch.float64, device="cpu").path == "gram"
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert tp.explain(**SMALL, dtype=dtype, device="cpu").path == "gram"
        assert tp.explain(**LONG, dtype=dtype, device="cpu").path == "direct"


@pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
def test_the_path_does_not_depend_on_the_batch():
    """Or an image's bits would depend on its batch mates."""
    for shape in [(196, 98, 192), (577, 50, 64), (1030, 343, 128), (64, 3, 700), (300, 2, 16)]:
        N, K, D = shape
        paths = {tp.explain(B, N, K, D, dtype=torch.float32, device="cpu").path for B in (1, 2, 7, 64, 1000)}
        assert len(paths) == 1, f"{shape}: {paths}"


@pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
@pytest.mark.parametrize("init", [None, "strided", "farthest", "bipartite", "centers"])
def test_the_path_told_is_the_path_taken(init, monkeypatch):
    """The start decides, too: what `explain` names gives the bits of the path it names, forced."""
    for N, K, D in [(196, 49, 768), (196, 98, 384), (256, 64, 128), (196, 98, 192)]:
        if init == "bipartite" and 2 * K < N:
            continue
        x = torch.randn(2, N, D, generator=torch.Generator().manual_seed(N))
        given = x[:, :K].clone() if init == "centers" else init
        monkeypatch.delenv("TOKENPOOL_EXT_CPU_PATH", raising=False)
        path = tp.explain(2, N, K, D, init=init).path
        free = tp.kmeans(x, K, init=given)
        inertia = {}
        for forced in ("gram", "direct"):
            monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", forced)
            inertia[forced] = tp.kmeans(x, K, init=given).inertia
        assert torch.equal(free.inertia, inertia[path]), (N, K, D, path)


@pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
def test_kmedoids_has_a_plan_of_its_own(monkeypatch):
    """Medoids move farther than means, so a Gram matrix pays sooner; what is told is what is taken."""
    monkeypatch.delenv("TOKENPOOL_EXT_CPU_PATH", raising=False)
    assert "K-Medoids" in str(tp.explain(**VIT, algorithm="kmedoids"))
    told = {
        a: [tp.explain(2, N, N // 2, D, algorithm=a, init="topk").path for N, D in ((196, 192), (196, 384), (256, 384))]
        for a in ("kmeans", "kmedoids")
    }
    assert told["kmedoids"].count("gram") > told["kmeans"].count("gram")
    for bad in (dict(algorithm="kmedian"), dict(algorithm="kmedoids", init="centers")):
        with pytest.raises(ValueError, match="explain"):
            tp.explain(**VIT, **bad)


@pytest.mark.skipif(tp.loader.extension is None, reason="plans for CUDA need the compiled extension")
def test_a_forced_cuda_path_is_told(monkeypatch):
    problem = dict(VIT, dtype=torch.bfloat16, compute_capability=(9, 0))
    free = tp.explain(**problem)
    monkeypatch.setenv("TOKENPOOL_EXT_CUDA_PATH", "gram")
    forced = tp.explain(**problem)
    assert free.path != "gram" and forced.path == "gram" and "TOKENPOOL_EXT_CUDA_PATH" in forced.reason
    monkeypatch.setenv("TOKENPOOL_EXT_CUDA_PATH", "fast")
    with pytest.raises(ValueError, match="resident"):
        tp.explain(**problem)
    monkeypatch.delenv("TOKENPOOL_EXT_CUDA_PATH")
    assert tp.explain(**problem, init="farthest").flops >= free.flops


@pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
def test_a_cpu_path_that_there_is_not(monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", "fast")
    with pytest.raises(ValueError, match="grouped"):
        tp.explain(**VIT)


@pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
def test_a_forced_cpu_path_is_told(monkeypatch):
    """With its own flops and memory, not those of the path that would be chosen."""
    monkeypatch.delenv("TOKENPOOL_EXT_CPU_PATH", raising=False)
    gram = tp.explain(4, 196, 98, 192, init="topk")
    direct = tp.explain(4, 196, 10, 192, init="topk")
    assert (gram.path, direct.path) == ("gram", "direct")
    for path, clusters, free in (("gram", 98, gram), ("direct", 10, direct)):
        monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
        told = tp.explain(4, 196, clusters, 192, init="topk")
        assert (told.path, told.flops, told.workspace_bytes) == (path, free.flops, free.workspace_bytes)
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", "direct")
    forced = tp.explain(4, 196, 98, 192, init="topk")
    assert forced.path == "direct" and "TOKENPOOL_EXT_CPU_PATH forces it" in forced.reason
    assert forced.flops != gram.flops and forced.workspace_bytes < gram.workspace_bytes
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", "grouped")
    assert tp.explain(4, 196, 98, 192, init="topk").path == "grouped"


def test_the_override_is_followed(monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_BACKEND", "reference")
    assert tp.explain(**VIT, dtype=torch.float32, device="cpu").backend == "reference"


@pytest.mark.parametrize(
    "changes,name",
    [
        (dict(B=0), "B"),
        (dict(N=-1), "N"),
        (dict(K=0), "K"),
        (dict(K=257), "K"),
        (dict(D=1.5), "D"),
        (dict(num_iters=0), "num_iters"),
        (dict(dtype=torch.int64), "dtype"),
        (dict(init="nearest"), "init"),
        (dict(device="gpu"), "device"),
        (dict(device=None), "device"),
        (dict(compute_capability=90), "compute_capability"),
        (dict(compute_capability="9.0"), "compute_capability"),
        (dict(compute_capability=(9, 0.5)), "compute_capability"),
    ],
)
def test_wrong_arguments_are_named(changes, name):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        tp.explain(**{**VIT, "dtype": torch.float32, "device": "cpu", **changes})
