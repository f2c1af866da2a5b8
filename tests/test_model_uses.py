"""Uses of patched models: those of ``model_uses.py`` on a few families, and what running them on all has shown."""

from __future__ import annotations

import copy
import functools

import model_uses
import pytest
import torch
from model_zoo import PlainBlock, PlainModel, liven
from test_vit_any import make, plain

from tokenpool_ext import vit

pytestmark = pytest.mark.usefixtures("one_thread")


class Wrapping(PlainBlock):
    """Every class derived from it gets a forward of its own, as transformers' layers from 5.24 on."""

    def __init_subclass__(cls):
        inner = cls.forward
        cls.forward = functools.wraps(inner)(lambda self, x: inner(self, x))


class Wrapped(Wrapping):
    pass


@torch.no_grad()
@pytest.mark.parametrize("kept_before", [False, True])
def test_a_forward_kept_on_a_block_whose_class_wraps_it(kept_before):
    """accelerate's hooks and transformers 4.57 keep ``block.forward``; the class's, whichever it then is."""
    torch.manual_seed(0)
    model, x = liven(PlainModel(Wrapped)), torch.randn(2, 16, 8)
    whole, pooled = model(x), vit.patch(copy.deepcopy(model), num_tokens={1: 6, 2: 4})(x)
    if not kept_before:
        vit.patch(model, num_tokens={1: 6, 2: 4})
    for block in model.stages:
        block.forward = block.forward
    for _ in range(2):
        assert torch.equal(vit.patch(model, num_tokens={1: 6, 2: 4})(x), pooled)
        assert torch.equal(vit.unpatch(model)(x), whole)


@torch.no_grad()
def test_blocks_left_out_leave_nothing_behind():
    """LayerDrop: a forward without its last block, then one without the block that pools."""
    model, x = plain()
    whole, y = copy.deepcopy(model), x.flip(0, 1)
    vit.patch(model, num_tokens={1: 6})

    def run(m, x, left_out):
        x = torch.cat([m.cls_token.expand(2, -1, -1), m.stem(x)], 1) + m.pos
        for i, block in enumerate(m.stages):
            x = x if i in left_out else block(x)
        return x

    run(model, x, {3})
    assert torch.equal(run(model, y, {1}), run(whole, y, {1}))


FAMILIES = ("hand-written", "nn.TransformerEncoder (N, B, D)", "transformers BertPadded", "transformers Qwen2VL vision")


@pytest.mark.parametrize("name", FAMILIES)
def test_uses(name):
    """Those that take seconds; ``python -m tests.model_uses`` runs all."""
    make(name)
    uses = [use for use in model_uses.USES if use not in ("compile", "export")]
    _, found = model_uses.family(name, uses, 60)
    assert all(word in ("ok", "-") for word in found.values()), found
