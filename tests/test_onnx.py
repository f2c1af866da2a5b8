"""The decomposition for ONNX: the reference's results, and what ONNX Runtime makes of exported models."""

from __future__ import annotations

import pytest
import torch
from helpers import positive_weights, spread_indices, tokens
from torch import nn

import tokenpool_ext as tp
from tokenpool_ext import onnx, reference

NONE = torch.empty(3, 0, dtype=torch.int64)
MASK = torch.arange(30) < torch.tensor([[30], [20], [5]])
WHITE_PAGE = torch.cat([tokens(3, 1, 8).expand(3, 20, 8), tokens(3, 10, 8, seed=1)], 1)


@pytest.mark.parametrize("x", [tokens(3, 30, 8), WHITE_PAGE], ids=["distinct", "repeated"])
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("case", ["plain", "weights", "everything", "indices", "centers"])
def test_decomposition_is_the_reference(case, algorithm, x):
    w, counts = positive_weights(3, 30), torch.tensor([10, 6, 9])
    w[0, :4] = 0
    arguments = {
        "plain": (x, None, None, None, NONE, 10, 5, True),
        "weights": (x, w, None, None, NONE, 10, 5, False),
        "everything": (x, w, MASK, counts, NONE, 10, 5, True),
        "indices": (x, w, MASK, None, spread_indices(3, 5, 5).repeat(1, 2), 10, 5, False),
        "centers": (x, None, None, None, x[:, :10].contiguous(), 10, 3, False),
    }[case]
    if algorithm == "kmedoids" and case == "centers":
        pytest.skip("medoids start from tokens")
    want, got = getattr(reference, algorithm)(*arguments), getattr(onnx, algorithm)(*arguments)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(onnx.pool(x, want[1], w, 10), reference.pool(x, want[1], w, 10), rtol=1e-5, atol=1e-5)
    assert torch.equal(onnx.unpool(want[0], want[1]), reference.unpool(want[0], want[1]))


class Block(nn.Module):
    def __init__(self, width: int, pooling: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.pooling = pooling

    def forward(self, x):
        q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        return x if self.pooling is None else self.pooling(x, tp.attention_received(q, k))


def pooled_vit():
    torch.manual_seed(0)
    layers = [None, tp.TokenPooling(keep_ratio=0.5), tp.TokenPooling(9, algorithm="kmedoids"), None]
    return nn.Sequential(*(Block(32, layer) for layer in layers), nn.LayerNorm(32))


class Functions(nn.Module):
    def forward(self, x):
        c = tp.kmeans(x, 6, weights=x[..., 0].exp(), sort=True)
        pooled = tp.pool(x, c.assignment, 6)
        return c.centers, c.assignment, tp.unpool(c.centers, c.assignment), pooled


MODELS = {
    "pooled ViT": pooled_vit,
    "functions": Functions,
    "strided": lambda: tp.TokenPooling(8, init="strided", weighted=False),
    "topk": lambda: tp.TokenPooling(8, init="topk"),
    "matching": lambda: tp.BipartiteMatching(18),
    "grid": lambda: tp.GridPooling(8),
}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_agrees_at_any_batch_size(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = MODELS[name]().eval(), tokens(2, 33, 32)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    graph = program.model_proto.graph
    assert {node.domain for node in graph.node} == {""} and not program.model_proto.functions
    for node in graph.node:
        assert not node.op_type.startswith("Scatter") or not any(
            a.name == "reduction" and a.s != b"none" for a in node.attribute
        )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for b in (1, 3):
        x = tokens(b, 33, 32, seed=b)
        with torch.no_grad():
            want = model(x)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for w, g in zip(want if isinstance(want, tuple) else (want,), got):
            torch.testing.assert_close(torch.from_numpy(g), w, rtol=0, atol=1e-3)


def test_a_start_without_a_form_in_onnx_says_so(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for init in ("random", "kmeans++", "bipartite"):
        with pytest.raises(ValueError, match="no form in ONNX"):
            tp.TokenPooling(20, init=init)(tokens(2, 33, 8))


@pytest.mark.parametrize("family", ["ViT", "Dinov2", "CLIPVision", "SiglipVision"])
def test_a_patched_model_agrees_at_any_batch_size(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    config = getattr(transformers, f"{family}Config")(**size, image_size=32, patch_size=8)
    inner = getattr(transformers, f"{family}Model")(config).eval()
    tp.patch(inner, keep_ratio=0.5)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, pixels):
            return self.inner(pixel_values=pixels).last_hidden_state

    model, file = Model().eval(), tmp_path / "model.onnx"
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        pixels = torch.randn(2, 3, 32, 32)
        program = torch.onnx.export(model, (pixels,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        program.save(file)
        assert {node.domain for node in program.model_proto.graph.node} == {""}, "standard operators only"
        session = onnxruntime.InferenceSession(file)
        for count in (1, 3):
            pixels = torch.randn(count, 3, 32, 32)
            (got,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
            assert (torch.from_numpy(got) - model(pixels)).abs().max() < 1e-3
