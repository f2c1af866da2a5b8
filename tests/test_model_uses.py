"""Uses of patched models: those of ``model_uses.py`` on a few families, and what running them on all has shown."""

from __future__ import annotations

import copy
import functools
import io

import model_uses
import pytest
import torch
from model_zoo import PlainBlock, PlainModel, liven
from test_vit_any import make, plain
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tokenpool_ext import vit
from tokenpool_ext.vit.pooled import _THREAD

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


def looped(m, x, left_out=(), between=lambda t: t):
    """A forward block by block, without some."""
    x = torch.cat([m.cls_token.expand(x.shape[0], -1, -1), m.stem(x)], 1) + m.pos
    for i, block in enumerate(m.stages):
        x = x if i in left_out else between(block(x))
    return x


class Dropping(PlainModel):
    left_out: set = set()

    def forward(self, x):
        return looped(self, x, self.left_out)


@torch.no_grad()
@pytest.mark.parametrize("called", ["model", "blocks"])
@pytest.mark.parametrize("first, then", [({3}, {1}), ({2, 3}, {1}), ({3}, {1, 2}), ({2, 3}, {0, 1})])
def test_blocks_left_out_leave_nothing_behind(first, then, called):
    """LayerDrop: a forward without its last blocks, then one without the block that pools."""
    model, x = plain()
    model.__class__ = Dropping
    whole, y = copy.deepcopy(model), x.flip(0, 1)
    vit.patch(model, num_tokens={1: 6})

    def run(m, x, left_out):
        m.left_out = left_out
        return m(x) if called == "model" else looped(m, x, left_out)

    run(model, x, first)
    assert torch.equal(run(model, y, then), run(whole, y, then))


@torch.no_grad()
def test_a_forward_that_fails_leaves_nothing_behind():
    model, x = plain()
    whole, tokens = copy.deepcopy(model), torch.randn(2, 17, 32)
    vit.patch(model, num_tokens={1: 6})
    hook = model.stages[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    hook.remove()
    assert not _THREAD.runs
    for i in (2, 3):
        assert torch.equal(model.stages[i](tokens), whole.stages[i](tokens))


@torch.no_grad()
def test_a_buffer_that_every_forward_writes_its_tokens_to():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6})
    wanted = [model(x), model(x.flip(0))]
    buffer = torch.empty(2, 17, 32)
    model.stages[1].register_forward_hook(lambda m, a, out: buffer.copy_(out))
    assert torch.equal(model(x), wanted[0]) and torch.equal(model(x.flip(0)), wanted[1])


@torch.no_grad()
def test_forwards_that_take_turns():
    """Two models in one, block by block; parts of a model on batch after batch."""
    one, x = plain()
    two, _ = plain()
    vit.patch(one, num_tokens={1: 8, 2: 6})
    vit.patch(two, num_tokens={1: 5, 2: 3})
    for between in (lambda t: t, lambda t: t.clone()):
        alone = [looped(m, x, between=between) for m in (one, two)]
        tokens = [torch.cat([m.cls_token.expand(2, -1, -1), m.stem(x)], 1) + m.pos for m in (one, two)]
        for blocks in zip(one.stages, two.stages):
            tokens = [between(block(t)) for block, t in zip(blocks, tokens)]
        assert all(torch.equal(a, b) for a, b in zip(tokens, alone))
        vit.patch(one, num_tokens={1: 6})
        wanted = [looped(one, t) for t in (x, x.flip(0))]
        halves = [between(looped(one, t, {2, 3})) for t in (x, x.flip(0))]
        for half, want in zip(halves, wanted):
            torch.testing.assert_close(one.stages[3](one.stages[2](half)), want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("segments", [((0, 4),), ((0, 2), (2, 4)), ((0, 3), (3, 4))])
def test_checkpoints_of_several_blocks_with_new_tensors_between(segments, reentrant):
    class Model(PlainModel):
        checkpoints = False

        def forward(self, x):
            x = torch.cat([self.cls_token.expand(2, -1, -1), self.stem(x)], 1) + self.pos
            for start, end in segments:

                def part(x, blocks=self.stages[start:end]):
                    for block in blocks:
                        x = block(x) * 1.0
                    return x

                x = checkpoint(part, x, use_reentrant=reentrant) if self.checkpoints else part(x)
            return self.head(x.mean(1))

    model, x = plain()
    model.__class__ = Model
    vit.patch(model, num_tokens={1: 6, 2: 4})
    found = []
    for model.checkpoints in (False, True):
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_whose_saved_tensors_are_copied_say_so(reentrant):
    model, x = plain()
    vit.patch(model, num_tokens={1: 6})
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        out = looped(model, x.requires_grad_(), {2, 3})
        for block in model.stages[2:]:
            out = checkpoint(block, out, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="block 3: run again in backward, it got a copy"):
            out.sum().backward()


def test_transforms_of_torch_func():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6, 2: 4})
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    model(x).square().sum().backward()
    torch.testing.assert_close({n: g.sum(0) for n, g in each.items()}, {n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(torch.vmap(lambda x: model(x[None])[0])(x), model(x))
    out, along = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, torch.autograd.functional.jvp(model, x, torch.ones_like(x))[1])
    torch.testing.assert_close(torch.func.jacrev(model)(x), torch.autograd.functional.jacobian(model, x))


@torch.no_grad()
def test_some_blocks_compiled():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6, 2: 4})
    wanted = model(x)
    for compiled in ({2}, {1, 3}):
        torch._dynamo.reset()
        other = copy.deepcopy(model)
        for i in compiled:
            other.stages[i].compile(backend="eager")
        torch.testing.assert_close(other(x), wanted)


@torch.no_grad()
def test_hidden_states_are_saved_without_what_they_carry():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6})
    torch._dynamo.reset()
    for run in (looped, torch.compile(looped, backend="eager")):
        out = run(model, x, {3})
        torch.save(out, file := io.BytesIO())
        file.seek(0)
        assert torch.equal(torch.load(file), out) and copy.deepcopy(out).equal(out)


class Packed(nn.Module):
    """Images of (N, 8) patches in one sequence, told apart by the mask alone, as Pixtral's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(4))
        self.stem = nn.Linear(8, 32)

    def forward(self, *images):
        which = torch.repeat_interleave(torch.arange(len(images)), torch.tensor([len(i) for i in images]))
        mask = torch.where(which[:, None] == which, 0.0, -torch.inf)[None, None]
        x = self.stem(torch.cat(images))[None]
        for block in self.blocks:
            x = block(x, mask)
        return x[0]


class Masked(PlainBlock):
    def forward(self, x, attention_mask):
        q, k, v = self.qkv(self.n1(x)).unflatten(2, (3, self.h, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.n2(x))))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["kmeans", "score"])
def test_images_told_apart_by_a_mask_alone_are_pooled_one_by_one(pooling):
    torch.manual_seed(0)
    model = liven(Packed())
    images = [torch.randn(n, 8) for n in (16, 12)]
    vit.patch(model, keep_ratio=0.5, pooling=pooling, example=tuple(images))
    torch.testing.assert_close(model(*images), torch.cat([model(i) for i in images]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", ["compile", "export", "export, not strict"])
def test_compiled_and_exported_they_are_refused(way):
    torch.manual_seed(0)
    model = liven(Packed())
    images = [torch.randn(n, 8) for n in (16, 12)]
    vit.patch(model, keep_ratio=0.5, example=tuple(images))
    torch._dynamo.reset()

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model.blocks

        def forward(self, x, mask):
            for block in self.blocks:
                x = block(x, mask)
            return x

    x, apart = torch.randn(1, 28, 32), torch.arange(28) < 16
    together = torch.zeros(1, 1, 28, 28)
    if way == "compile":
        run = torch.compile(Blocks(), fullgraph=True, backend="eager")
    else:
        run = torch.export.export(Blocks(), (x, together), strict=way == "export").module()
    torch.testing.assert_close(run(x, together), Blocks()(x, together))
    with pytest.raises(RuntimeError, match="give one image a call"):
        run(x, together.masked_fill(apart[:, None] != apart, -torch.inf))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fake", "make_fx"])
def test_a_mask_is_not_looked_at_where_there_are_no_values(mode):
    torch.manual_seed(0)
    model = liven(Packed())
    vit.patch(model, keep_ratio=0.5, example=(torch.randn(12, 8),))
    x, mask = torch.randn(1, 12, 32), torch.zeros(1, 1, 12, 12)
    if mode == "make_fx":
        run = make_fx(lambda x, mask: model.blocks[1](x, mask))(x, mask)
        torch.testing.assert_close(run(x, mask), model.blocks[1](x, mask))
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model.blocks[1](fake.from_tensor(x), fake.from_tensor(mask)).shape == x.shape


class Lengths(Masked):
    def forward(self, x, cu_seqlens):
        which = torch.bucketize(torch.arange(x.shape[1]), cu_seqlens, right=True)
        return super().forward(x, (which[:, None] == which)[None, None])


@torch.no_grad()
def test_tokens_after_the_last_length_are_a_sequence_of_their_own():
    torch.manual_seed(0)
    block, x = liven(Lengths()), torch.randn(1, 12, 32)
    vit.patch(
        block, blocks=[block], layers=[0], keep_ratio=0.5, num_prefix_tokens=0, example=(x, torch.tensor([0, 12]))
    )
    found = block(x, torch.tensor([0, 6, 10], dtype=torch.int32))
    parts = [block(x[:, a:b], torch.tensor([0, b - a])) for a, b in ((0, 6), (6, 10), (10, 12))]
    torch.testing.assert_close(found, torch.cat(parts, 1))
    with pytest.raises(ValueError, match="cu_seqlens ends at 14, after the 12 tokens"):
        block(x, torch.tensor([0, 6, 14]))


@torch.no_grad()
@pytest.mark.parametrize("seen", [False, True], ids=["probed without masks", "probed with"])
@pytest.mark.parametrize("which", ["mask", "src_key_padding_mask"])
def test_as_many_images_as_tokens(which, seen):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x, padding = torch.randn(12, 12, 16), torch.zeros(12, 12, dtype=torch.bool)
    padding[::2, 9:] = True
    causal = torch.ones(12, 12).triu(1).bool()
    example = {"src": x[:2]} | ({"mask": causal, "src_key_padding_mask": padding[:2]} if seen else {})
    vit.patch(model, keep_ratio=0.5, num_prefix_tokens=0, example=example)

    def run(at):
        return model(x[at], **{which: causal if which == "mask" else padding[at]})

    torch.testing.assert_close(run(slice(12)), torch.cat([run(slice(0, 5)), run(slice(5, 12))]))


@torch.no_grad()
def test_queries_and_keys_of_two_dtypes_under_autocast():
    class Scaled(PlainBlock):
        def attend(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, self.h, -1)).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q * torch.ones(1), k, v)
            return self.proj(out.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = liven(PlainModel(Scaled)), torch.randn(2, 16, 8)
    vit.patch(model, keep_ratio=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


class Recording(PlainModel):
    """Puts hooks on its blocks in its first forward, once, as transformers' models do for ``output_hidden_states``."""

    installed = False

    def forward(self, x):
        if not self.installed:
            self.seen, self.installed = [], True
            for block in self.stages:
                block.register_forward_hook(lambda m, args, out: self.seen.append(out.shape))
        return super().forward(x)


@torch.no_grad()
def test_hooks_that_a_model_adds_in_its_first_forward_outlive_the_probe():
    model, x = Recording(), torch.randn(2, 16, 8)
    vit.patch(model, num_tokens={1: 6}, example=x)  # the probe is the first forward
    model.seen.clear()
    model(x)
    assert model.seen == [(2, 17, 32)] * 4


@torch.no_grad()
def test_a_model_that_needs_all_hidden_states_patched_before_its_first_forward():
    model, args, kwargs = make("transformers BeitForSemanticSegmentation")
    shape = copy.deepcopy(model)(**kwargs).logits.shape
    vit.patch(model, keep_ratio=0.5)
    assert model(**kwargs).logits.shape == shape


class Causal(PlainBlock):
    """By the flag, which traced models of transformers put a mask in place of."""

    flag = True

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.h, -1)).permute(2, 0, 3, 1, 4)
        mask = None if self.flag else torch.ones(x.shape[1], x.shape[1]).tril().bool()
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.flag)
        return self.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_scores_of_causal_attention_are_those_of_its_mask():
    torch.manual_seed(0)
    model, x = liven(PlainModel(Causal)), torch.randn(2, 16, 8)
    vit.patch(model, num_tokens={1: 6})
    flag = model(x)
    model.stages[1].flag = False
    torch.testing.assert_close(flag, model(x))


class Tables(PlainBlock):
    """With a table (H, N, d) for all images, as of a mixed rotary embedding, of all tokens or of the patches alone."""

    def forward(self, x, table):
        q, k, v = self.qkv(self.n1(x)).unflatten(2, (3, self.h, -1)).permute(2, 0, 3, 1, 4)
        start = x.shape[1] - table.shape[-2]
        q, k = (torch.cat([t[:, :, :start], t[:, :, start:] * table], 2) for t in (q, k))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(1, 2).flatten(2))


class TableModel(PlainModel):
    def __init__(self, rows):
        super().__init__(Tables)
        self.table = nn.Parameter(torch.randn(4, rows, 8))

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.stem(x)], 1) + self.pos
        for block in self.stages:
            x = block(x, self.table)
        return self.head(x.mean(1))


@torch.no_grad()
@pytest.mark.parametrize("rows", [17, 16])
def test_as_many_images_as_heads(rows):
    torch.manual_seed(0)
    model, x = liven(TableModel(rows)), torch.randn(4, 16, 8)
    vit.patch(model, num_tokens={1: 6}, example=x[:2])
    torch.testing.assert_close(model(x), torch.cat([model(x[:2]), model(x[2:])]), rtol=1e-4, atol=1e-4)
    batch = torch.export.Dim("batch", min=2, max=64)
    run = torch.export.export(model, (x[:3],), dynamic_shapes=({0: batch},), strict=False).module()
    torch.testing.assert_close(run(x), model(x))


class Placed(PlainBlock):
    """Positions (B, N, D) come beside the tokens; causal where there is more than one token."""

    def forward(self, x, positions):
        return super().forward(x + positions)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.h, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return self.proj(out.transpose(1, 2).flatten(2))


class PlacedModel(PlainModel):
    def __init__(self):
        super().__init__(Placed)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.stem(x)], 1)
        for block in self.stages:
            x = block(x, self.pos.expand_as(x))
        return self.head(x.mean(1))


@torch.no_grad()
def test_any_batch_size_and_symbolic_lengths():
    torch.manual_seed(0)
    model, x = liven(PlacedModel()), torch.randn(17, 16, 8)
    vit.patch(model, num_tokens={1: 6}, example=x[:2])
    batch = torch.export.Dim("batch", min=2, max=64)
    run = torch.export.export(model, (x[:3],), dynamic_shapes=({0: batch},), strict=False).module()
    torch.testing.assert_close(run(x), model(x))
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(run(x[:3]), model(x[:3]))


FAMILIES = ("hand-written", "nn.TransformerEncoder (N, B, D)", "transformers BertPadded", "transformers Qwen2VL vision")


@pytest.mark.parametrize("name", FAMILIES)
def test_uses(name):
    """Those that take seconds; ``python -m tests.model_uses`` runs all."""
    make(name)
    uses = [use for use in model_uses.USES if use not in ("compile", "export")]
    _, found = model_uses.family(name, uses, 60)
    assert all(word in ("ok", "-") for word in found.values()), found
