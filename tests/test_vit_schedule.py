"""Schedules, and what they leave of a model's tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenpool_ext.vit import patch, tokens_per_layer
from tokenpool_ext.vit.schedule import constant, default_layers, explicit, geometric, normalise, tokens_after


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


def test_one_cost():
    """The function under its name in the package, whichever way it is asked for."""
    import tokenpool_ext as tp
    from tokenpool_ext.cost import cost

    assert tp.cost is cost
    assert tp.cost(nn.Linear(2, 3), torch.zeros(1, 2)) == tp.Cost(embedding=6)


class Third(nn.Module):
    """Keeps every third token; knows nothing of this package."""

    def __init__(self, num_tokens=None, keep_ratio=None, num_prefix_tokens=1):
        super().__init__()
        self.p = num_prefix_tokens

    def forward(self, x, scores=None, features=None, mask=None, sizes=None):
        return torch.cat([x[:, : self.p], x[:, self.p :: 3]], dim=1)


def test_tokens_per_layer():
    """Protected tokens, those for detection behind the patches, other poolings, other inputs, lists given by name."""
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, patch_size=14)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=56, **size))
    assert tokens_per_layer(patch(model, num_tokens={1: 6}, protect=[1, 2])) == [17, 1 + 2 + 6, 9]
    assert tokens_per_layer(patch(model, keep_ratio=0.5, layers=[0], num_prefix_tokens=5)) == [5 + 6, 11, 11]
    assert tokens_per_layer(patch(model, num_tokens={0: 99})) == [17, 17, 17] and model.training
    if transformers.__version__ >= "5":
        patch(model, num_tokens={0: 0.5, 2: 4})
        assert tokens_per_layer(model, torch.zeros(2, 3, 84, 84), interpolate_pos_encoding=True) == [19, 19, 5]
    patch(model, num_tokens={0: 9, 1: 2}, pooling=Third)
    assert tokens_per_layer(model) == [1 + 6, 1 + 2, 3]
    cat = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
    patch(cat, num_tokens={1: 4}, num_prefix_tokens=0)
    assert tokens_per_layer(cat, torch.randn(10, 3, 8)) == [10, 4], "tokens first"
    model = transformers.YolosModel(transformers.YolosConfig(image_size=[56, 56], num_detection_tokens=3, **size))
    assert tokens_per_layer(patch(model, num_tokens={1: 6})) == [20, 10, 10]


def test_tokens_per_layer_of_what_has_none():
    with pytest.raises(TypeError, match="tokens_per_layer: model must be an nn.Module, got int"):
        tokens_per_layer(3)
    with pytest.raises(ValueError, match="tokens_per_layer: Linear is not patched"):
        tokens_per_layer(nn.Linear(2, 2))
