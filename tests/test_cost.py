"""MACs by component, against published totals, counts by hand and PyTorch's own counter."""

from __future__ import annotations

import runpy

import pytest
import torch
from torch import nn

import tokenpool_ext as tp
from tokenpool_ext import patch
from tokenpool_ext.__main__ import main
from tokenpool_ext.cost import Cost, cost, gmacs, table
from tokenpool_ext.models import build

# name: GMACs, shares of softmax attention, projections, MLP and fully connected in % (see docs/evidence.md)
PAPER = {
    "deit-ti": (1.254, 14.3, 27.8, 55.6, 83.4),
    "deit-e252": (2.074, 11.3, 28.9, 57.9, 86.8),
    "deit-e318": (3.213, 9.2, 29.8, 59.5, 89.3),
    "deit-s": (4.599, 7.8, 30.3, 60.6, 90.9),
    "deit-b": (17.56, 4.1, 31.8, 63.5, 95.3),
    "vit-b-384": (55.48, 11.1, 29.4, 58.9, 88.3),
    "vit-l-384": (191.1, 8.6, 30.4, 60.8, 91.2),
}


class Block(nn.Module):
    """Hand-written: nothing in it is named attention."""

    def __init__(self, width: int, heads: int, pool: nn.Module | None = None):
        super().__init__()
        self.heads, self.pool = heads, pool
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.pool is not None:
            x = self.pool(x, tp.attention_received(q, k) if self.pool.needs_scores else None)
        return x + self.mlp(x)


def small(pool=None) -> nn.Module:
    """10 + 1 tokens of 12 inputs, width 8, 2 heads, 2 blocks, the first of which may pool; 3 classes."""
    return nn.Sequential(nn.Linear(12, 8), Block(8, 2, pool), Block(8, 2), nn.Linear(8, 3))


compiled = pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason="the formulas are of the compiled operators")
X = torch.randn(1, 11, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PAPER)
def test_published_totals_and_shares(name):
    pytest.importorskip("transformers")
    total, attention, projections, mlp, connected = PAPER[name]
    found = cost(build(name, "meta"))
    assert found.gmacs == pytest.approx(total, rel=5e-4)
    shares = [found.attention, found.projections, found.mlp, found.fully_connected]
    assert [100 * s / found.total for s in shares] == pytest.approx([attention, projections, mlp, connected], abs=0.06)
    assert found.scores == found.clustering == 0


def test_whole_by_hand():
    assert cost(small(), X) == Cost(
        embedding=11 * 12 * 8, projections=2 * 4 * 11 * 64, attention=2 * 2 * 121 * 8, mlp=2 * 8 * 11 * 64, head=11 * 24
    )


@compiled
@pytest.mark.parametrize(
    "options, clustering, scores",
    [
        ({"num_iters": 2, "init": "strided"}, 2 * 10 * 4 * 8, 2 * 121 * 8),  # T n K D
        ({"num_iters": 9}, 100 * 8, 2 * 121 * 8),  # n^2 D is less
        ({"algorithm": "kmedoids", "weighted": False}, 100 * 8, 0),
        ({"num_iters": 1, "init": "farthest", "weighted": False}, 2 * 10 * 4 * 8, 0),
    ],
)
def test_pooled_by_hand(options, clustering, scores):
    found = cost(small(tp.TokenPooling(4, **options)), X)
    whole = cost(small(), X)
    assert (found.clustering, found.scores) == (clustering, scores)
    assert found.projections == 4 * (11 + 5) * 64 and found.attention == 2 * (121 + 25) * 8
    assert found.mlp == 8 * (5 + 5) * 64 and found.embedding == whole.embedding and found.head == 5 * 24


def test_matching_and_grid():
    from tokenpool_ext.baselines import BipartiteMatching, GridPooling

    # two rounds: 10 -> 5 -> 4
    assert cost(small(BipartiteMatching(4)), X).clustering == (5 * 5 + 2 * 3) * 8
    assert cost(small(GridPooling(4)), X).clustering == 0


@compiled
def test_totals_are_those_of_the_counter():
    """Eager attention, so that PyTorch's own counter sees everything; whole and pooled."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn=True,
        num_labels=5,
        attn_implementation="eager",
    )
    model = transformers.Dinov2ForImageClassification(config).eval()

    def counted(side):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, side, side))
        return counter.get_total_flops() // 2

    assert cost(model).total == counted(56), "the model's own size"
    assert cost(model, torch.randn(1, 3, 84, 84)).total == counted(84)
    config._attn_implementation = "sdpa"
    assert cost(model, torch.randn(1, 3, 84, 84)) == cost(model, pixel_values=torch.randn(1, 3, 84, 84))
    patch(model, num_tokens={0: 9, 2: 4}, pooling="kmedoids")
    found = cost(model)
    assert found.clustering == (16 * 16 + 9 * 9) * 32
    assert found.scores == 2 * (17**2 * 32 + 10**2 * (32 + 4)), "sizes are one more feature in each of 4 heads"
    assert found.head == 5 * 64, "the class token beside the mean"


def test_torch_layers():
    """The fused fast path of nn.TransformerEncoderLayer is counted by its parts."""
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(1, 11, 8)
    found = cost(model, x)
    assert found == Cost(projections=2 * 4 * 11 * 64, attention=2 * 2 * 121 * 8, mlp=2 * 8 * 11 * 64)
    assert torch.backends.mha.get_fastpath_enabled()


class Product(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize(
    "model, macs",
    [
        (Product(lambda x: x @ x[0, 0]), 2 * 5 * 8),
        (Product(lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0])), 5 * 8),
        (Product(lambda x: torch.dot(x[0, 0], x[1, 0])), 8),
        (Product(lambda x: torch.addbmm(x[0, :, :5], x, x.mT)), 2 * 5 * 5 * 8),
        (Product(lambda x: nn.functional.bilinear(x, x, x.new_ones(3, 8, 8))), 2 * 5 * 3 * 8 * 8),
        (nn.LSTM(8, 6, batch_first=True), 2 * 5 * 4 * 6 * (8 + 6)),
        (nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), 2 * 5 * 2 * 4 * 6 * (8 + 6 + 12 + 6)),
        (nn.GRU(8, 6, batch_first=True), 2 * 5 * 3 * 6 * (8 + 6)),
    ],
)
def test_products_of_vectors_and_recurrent_layers(model, macs):
    assert cost(model, torch.randn(2, 5, 8)).total == macs
    assert cost(model.to("meta"), torch.randn(2, 5, 8, device="meta")).total == macs


def test_leaves_the_model_as_it_was():
    model = small().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    cost(model, X)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError):
        cost(model, X[:, :, :5])
    assert [module.training for module in model.modules()] == before
    assert not torch.nn.modules.module._global_forward_hooks and not torch.nn.modules.module._global_forward_pre_hooks


def test_errors():
    with pytest.raises(TypeError, match="nn.Module, got int"):
        cost(3)
    with pytest.raises(ValueError, match="Linear does not tell the size of its input"):
        gmacs(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="--model: expected one of deit-ti"):
        build("no-such-model")


def test_table_and_command(capsys, monkeypatch):
    text = table({"whole": Cost(mlp=3 * 10**9, projections=10**9), "pooled": Cost(mlp=10**9, clustering=10**9)})
    assert "3.000   75.0 %" in text and "clustering" in text and "head" not in text
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["tokenpool_ext", "cost", "--model", "deit-s"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("tokenpool_ext", run_name="__main__")
    assert done.value.code == 0 and "4.599" in capsys.readouterr().out
    assert main(["cost", "--model", "nothing"]) == 2
    assert "deit-e252" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, told",
    [
        (["cost", "--keep", "0.5", "--layers", "3,a"], "argument --layers: must be whole numbers"),
        (["cost", "--layers", "3"], "--layers needs --keep"),
        (["bench-model", "--batch", ""], "argument --batch: must be whole numbers"),
    ],
)
def test_options_that_cannot_be(options, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*options, "--model", "deit-ti"])
    assert told in capsys.readouterr().err
