"""record: the assignments of a patched model's forward, composed over its blocks."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import tokenpool_ext as tp
from tokenpool_ext import vit
from tokenpool_ext.modules import TokenReduction
from tokenpool_ext.vit import patching, record, unpatch
from tokenpool_ext.viz import compose

transformers = pytest.importorskip("transformers")

COMMON = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14, num_labels=5)


def build(kind="Dinov2WithRegisters"):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**COMMON)).eval()
    with torch.no_grad():  # the initial weights are so small that attention is uniform
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def patch(model, **options):
    return vit.patch(model, **{"outside": "short", **options})


def photos(batch, seed=1):
    return torch.randn(batch, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("track_size", [False, True])
@pytest.mark.parametrize("pooling", list(patching.POOLINGS))
def test_every_pooling(pooling, track_size):
    options = dict(seed=3) if pooling in ("random", "importance") else {}
    model = patch(build(), num_tokens={0: 9, 2: 4}, pooling=pooling, track_size=track_size, position="block", **options)
    x = photos(2)
    state = {name: set(module.__dict__) for name, module in model.named_modules()}
    expected = model(x).last_hidden_state
    with record(model) as r:
        tokens = model(x).last_hidden_state
    assert torch.equal(tokens, expected), "recording changes nothing"
    assert state == {name: set(module.__dict__) for name, module in model.named_modules()}
    assert r.num_prefix_tokens == 5 and tokens.shape == (2, 9, 32)
    (first, a), (second, b) = r.layers
    assert (first, second) == (0, 2) and a.assignment.shape == (2, 16) and b.assignment.shape == (2, 9)
    assert r.assignment.dtype == torch.int64 and torch.equal(r.assignment, compose(a.assignment, b.assignment))
    assert torch.equal(r.assignment_after(0), a.assignment) and torch.equal(r.assignment_after(1), a.assignment)
    for labels in r.assignment:
        kept = labels[labels >= 0]
        assert set(kept.tolist()) == set(range(4))
        assert (kept.numel() == 16) == (pooling in ("kmeans", "kmedoids", "grid", "bipartite"))
    dense = tp.unpool(tokens[:, 5:], r.assignment)
    for image in range(2):
        for i, label in enumerate(r.assignment[image].tolist()):
            assert torch.equal(dense[image, i], tokens[image, 5 + label] if label >= 0 else torch.zeros(32))


@torch.no_grad()
def test_labels_name_the_tokens_that_come_out():
    """Pooling after the block: the pooled tokens are the means of the tokens that the clusters name."""
    model, inputs = build("ViT"), []
    patch(model, num_tokens={1: 6}, position="block", weighted=False)
    block = patching.patches(model)[0][0]
    handle = block.tokenpool.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    outputs = []
    other = block.tokenpool.register_forward_hook(lambda m, args, out: outputs.append(out[0]))
    with record(model) as r:
        model(photos(3))
    handle.remove(), other.remove()
    means = tp.pool(inputs[0][:, 1:], r.assignment, 6)
    torch.testing.assert_close(outputs[0][:, 1:], means)
    torch.testing.assert_close(r.layers[0][1].centers, means)


@torch.no_grad()
def test_each_forward_replaces_the_one_before():
    model = patch(build(), num_tokens={1: 6, 3: 6})
    with record(model) as r:
        with pytest.raises(RuntimeError, match="no forward of the patched model was seen"):
            _ = r.assignment
        model(photos(2))
        first = r.assignment
        model(photos(3, seed=2))
        assert r.assignment.shape == (3, 16) and len(r.layers) == 1, "block 3 has nothing to pool"
        model(photos(2))
        assert torch.equal(r.assignment, first)
    model(photos(3))
    assert torch.equal(r.assignment, first), "outside nothing is recorded"
    with pytest.raises(ValueError, match="at least 0, got -1"):
        r.assignment_after(-1)
    with record(patch(model, keep_ratio=1.0)) as r:
        model(photos(2))
    assert r.layers == [] and torch.equal(r.assignment, torch.arange(16).expand(2, 16))


@torch.no_grad()
def test_contexts_do_not_mix():
    model, other = patch(build(), num_tokens={1: 6, 2: 4}), patch(build("ViT"), keep_ratio=0.5)
    expected = []
    for seed in (1, 2):
        with record(model) as r:
            model(photos(2, seed))
        expected.append(r.assignment)
    assert not torch.equal(*expected)
    barrier, wrong = threading.Barrier(2), []

    def work(which):
        with torch.no_grad(), record(model) as r:
            for _ in range(10):
                barrier.wait()
                model(photos(2, which + 1))
                if not torch.equal(r.assignment, expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    with record(model) as outer, record(other) as inner:
        with record(model) as again:
            model(photos(2))
        other(photos(3))
        copy.deepcopy(model)(photos(4))
    assert torch.equal(outer.assignment, expected[0]) and torch.equal(again.assignment, expected[0])
    assert inner.assignment.shape == (3, 16)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_and_checkpointing(reentrant):
    model = patch(build().train(), num_tokens={1: 6, 2: 4})
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with record(model) as r:
        tokens = model(photos(2).requires_grad_()).last_hidden_state
        before = r.assignment
        tokens.sum().backward()
    assert torch.equal(r.assignment, before) and [index for index, _ in r.layers] == [1, 2]
    assert all(not c.centers.requires_grad for _, c in r.layers)


@torch.no_grad()
def test_what_cannot_be_recorded_is_named():
    model = build("ViT")
    for wrong, error, words in ((3, TypeError, "got int"), (model, ValueError, "ViTModel is not patched")):
        with pytest.raises(error, match=words), record(wrong):
            pass

    class Own(nn.Module):
        def forward(self, x, scores=None, *, features=None, mask=None, sizes=None):
            return x[:, :5]

    with record(patch(model, num_tokens={1: 5}, pooling=lambda **_: Own())) as r:  # the nearest of its tokens
        model(photos(2))
    assert r.assignment.shape == (2, 16) and set(r.assignment.flatten().tolist()) == set(range(4))
    patch(model, num_tokens={1: 4})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="compiled by torch.compile"), record(compiled):
        pass
    with record(model) as r:
        compiled(photos(2))
    with pytest.raises(RuntimeError, match="not through torch.compile"):
        _ = r.layers
    with record(model) as r:
        model(photos(2))
    assert r.assignment.shape == (2, 16)
    with pytest.raises(ValueError, match="not patched"), record(unpatch(model)):
        pass


@torch.no_grad()
def test_own_reduction():
    class FirstTokens(TokenReduction):
        def reduce(self, x, k, scores, features, mask, sizes, want_clusters):
            labels = torch.arange(x.shape[1]).clamp(max=k - 1).expand(x.shape[:2])
            return x[:, :k], tp.Clusters(x[:, :k], labels, None, None, None) if want_clusters else None

    model = patch(build("DeiT"), num_tokens={0: 3}, pooling=FirstTokens)
    with record(model) as r:
        model(photos(1))
    assert r.assignment.tolist() == [[0, 1] + [2] * 14] and r.num_prefix_tokens == 2
