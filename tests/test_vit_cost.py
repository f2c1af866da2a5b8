"""Schedules and the cost model, against published totals and counts made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenpool_ext.cost import cost as counted
from tokenpool_ext.vit import ViTSpec, cost, gmacs, patch, tokens_per_layer
from tokenpool_ext.vit.schedule import constant, default_layers, explicit, geometric, normalise, tokens_after

DEIT_S = ViTSpec(depth=12, width=384, num_patches=196, num_heads=6)


@pytest.mark.parametrize(
    "width, patches, depth, expected",
    [
        (192, 196, 12, 1.254),
        (252, 196, 12, 2.074),
        (318, 196, 12, 3.213),
        (384, 196, 12, 4.599),
        (768, 196, 12, 17.56),
        (768, 576, 12, 55.48),
        (1024, 576, 24, 191.1),
    ],
)
def test_published_totals(width, patches, depth, expected):
    """The x positions of the paper's DeiT points (Fig. 3), and standard ViT sizes."""
    assert gmacs(ViTSpec(depth=depth, width=width, num_patches=patches)) == pytest.approx(expected, rel=5e-4)


def test_shares():
    parts = cost(DEIT_S)
    assert parts.attention / parts.total == pytest.approx(0.078, abs=1e-3)
    assert parts.mlp / parts.total == pytest.approx(0.606, abs=1e-3)
    assert parts.scores == parts.clustering == 0


def test_pooled_by_hand():
    spec = ViTSpec(depth=2, width=8, num_patches=10, num_heads=2, patch_inputs=12, num_classes=3)
    parts = cost(spec, {0: 4}, num_iters=2)
    assert parts.projections == 4 * 64 * (11 + 5)
    assert parts.attention == 2 * 8 * (121 + 25)
    assert parts.mlp == 8 * 64 * (5 + 5)
    assert parts.scores == 2 * 121 * 8
    assert parts.clustering == 2 * 10 * 4 * 8
    assert parts.embedding == 10 * 12 * 8 and parts.head == 24
    after = cost(spec, {0: 4}, position="block", pooling="kmedoids", cluster_on="keys", scores=False)
    assert after.mlp == 8 * 64 * (11 + 5) and after.clustering == 100 * 4 and after.scores == 0
    assert cost(spec, {0: 10}) == cost(spec), "nothing pooled, nothing charged"
    assert cost(spec, {0: 4}, pooling="grid", scores=False).clustering == 0
    # two rounds of matching: 10 -> 5 -> 4
    assert cost(spec, {0: 4}, pooling="bipartite", scores=False).clustering == (5 * 5 + 2 * 3) * 8


def test_clustering_share_of_the_paper():
    """WK-Medoids in every layer of DeiT-S costs about 3.5% more than PoWER-BERT at the same K (Fig. 3a)."""
    schedule = geometric(12, 196, 40)
    medoids = cost(DEIT_S, schedule, pooling="kmedoids", scores=False, position="block")
    pruned = cost(DEIT_S, schedule, pooling="score", scores=False, position="block")
    assert 1.02 < medoids.total / pruned.total < 1.05


def test_schedules():
    assert default_layers(12) == (3, 6, 9) and default_layers(24) == (6, 12, 18) and default_layers(1) == (0,)
    assert tokens_after(12, 196, constant(12, 0.7)) == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    assert constant(12, 0.5, [2]) == {2: 0.5}
    counts = tokens_after(12, 196, geometric(12, 196, 20))
    assert counts[-1] == 20 and counts == sorted(counts, reverse=True) and len(set(counts)) == 12
    assert geometric(12, 196, 49, [5, 2]) == {2: 98, 5: 49}
    assert explicit([9, 9, 4, 4]) == {0: 9, 2: 4}
    assert normalise(4, {2: 3, 0: 8}) == {0: 8, 2: 3}
    assert tokens_after(3, 5, {0: 0.01}) == [1, 1, 1]
    assert normalise(4, {-1: 3, -4: 8}) == {0: 8, 3: 3}
    assert tokens_after(4, 20, dict.fromkeys(range(4), -8)) == [12, 6, 3, 2], "at most half of them go"
    for call in (
        lambda: constant(12, 0),
        lambda: constant(0, 0.5),
        lambda: geometric(12, 10, 11),
        lambda: normalise(4, {0: 3, 1: 4}),
        lambda: normalise(4, {}),
        lambda: normalise(4, {-5: 4}),
        lambda: normalise(4, {-1: 4, 3: 4}),
        lambda: normalise(4, {0: 2.0}),
    ):
        with pytest.raises(ValueError, match="schedule"):
            call()
    for call in (lambda: normalise(4, {0.5: 4}), lambda: normalise(4, {0: True}), lambda: geometric(12, 10.0, 4)):
        with pytest.raises(TypeError, match="schedule"):
            call()


@torch.no_grad()
def test_model_against_counted_products():
    """The cost read off a model equals the multiply-accumulates its matrix products really do."""
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
        attn_implementation="eager",  # the counter does not know the CPU's fused attention
    )
    model = transformers.Dinov2ForImageClassification(config).eval()
    spec = ViTSpec.from_model(model)
    assert (spec.depth, spec.width, spec.num_patches, spec.num_prefix_tokens) == (3, 32, 16, 1)
    for image_size in (None, 84):
        side = image_size or 56
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, side, side))
        assert cost(model, image_size=image_size).total == counter.get_total_flops() // 2
    patch(model, num_tokens={0: 9, 2: 4}, pooling="grid")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 56, 56))
    assert cost(model).total == counter.get_total_flops() // 2
    assert tokens_per_layer(model) == [10, 10, 5]
    assert cost(model, {0: 9, 2: 4}, pooling="grid", scores=False, position="block") == cost(model), "what if = what is"
    config._attn_implementation = "sdpa"  # eager attention shows its probabilities, so scores would cost nothing
    patch(model, num_tokens={0: 9, 2: 4}, pooling="kmedoids", track_size=False)
    assert cost(model).clustering == (16 * 16 + 9 * 9) * 32 and cost(model).scores == 2 * (17**2 + 10**2) * 32
    assert cost(model) == counted(model), "one counter"


def test_protected_tokens_are_counted():
    """Those named to ``patch``, and those for detection behind the patches."""
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, patch_size=14)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=56, **size)).eval()
    assert tokens_per_layer(patch(model, num_tokens={1: 6}, protect=[1, 2])) == [17, 1 + 2 + 6, 9]
    assert tokens_per_layer(patch(model, keep_ratio=0.5, layers=[0], num_prefix_tokens=5)) == [5 + 6, 11, 11]
    model = transformers.YolosModel(transformers.YolosConfig(image_size=[56, 56], num_detection_tokens=3, **size))
    spec = ViTSpec.from_model(model)
    assert (spec.num_patches, spec.num_prefix_tokens, spec.patch_inputs) == (16, 1 + 3, 14 * 14 * 3)
    assert tokens_per_layer(model, {1: 6}) == tokens_per_layer(patch(model, num_tokens={1: 6})) == [20, 10, 10]


def test_unknown_models():
    with pytest.raises(TypeError, match="Linear"):
        gmacs(nn.Linear(2, 2))
