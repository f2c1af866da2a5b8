"""Blocks of one's own: what they get, return and start with. On duplicates pooling gives the unpooled answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from model_zoo import PlainBlock, PlainModel
from torch import Tensor, nn

import tokenpool_ext as tp
from tokenpool_ext import vit

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(PlainModel):
    """As many tokens as come, each patch twice; what its blocks get beside them is ``sides``."""

    def __init__(self, block, sides=lambda x: {}):
        torch.manual_seed(0)
        super().__init__(block)
        self.sides = sides

    def tokens(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.stem(x)], 1)

    def forward(self, x):
        x = self.tokens(x)
        sides = self.sides(x)
        for block in self.stages:
            x = block(x, **sides)
            x = x if isinstance(x, Tensor) else x[0]
        return self.head(x.mean(1))


def images(b=2, n=16):
    """Every token twice."""
    x = torch.randn(b, (n + 1) // 2, 8, generator=torch.Generator().manual_seed(1))
    return x.repeat_interleave(2, 1)[:, :n]


@torch.no_grad()
def assert_exact(model: nn.Module, x: Tensor, **options) -> None:
    """Half the tokens, which are the distinct ones, give what all give; and all give it to the bit."""
    model.eval()
    whole, n = model(x), x.shape[1]
    vit.patch(model, num_tokens={1: n}, **options)
    assert torch.equal(model(x), whole)
    vit.patch(model, num_tokens={1: (n + 1) // 2}, **options)
    torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)
    other = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(model(other), vit.unpatch(model)(other))


class InPlace(PlainBlock):
    def forward(self, x):
        x += self.attend(self.n1(x))
        x += self.down(torch.relu(self.up(self.n2(x))))
        return x


class Result(NamedTuple):
    x: Tensor
    more: Tensor


class Named(PlainBlock):
    def forward(self, x):
        return Result(super().forward(x), x.mean())


@pytest.mark.parametrize("block", [InPlace, Named])
def test_what_a_block_does_with_its_tokens(block):
    assert_exact(Model(block), images())


class Scaled(PlainBlock):
    """Before any training it hardly changes its tokens."""

    scale = 1e-6

    def forward(self, x):
        x = x + self.scale * self.attend(self.n1(x))
        return x + self.scale * self.down(torch.relu(self.up(self.n2(x))))


class Zero(PlainBlock):
    """Before any training it does nothing."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.proj.weight), nn.init.zeros_(self.proj.bias)
        nn.init.zeros_(self.down.weight), nn.init.zeros_(self.down.bias)


def by_place(block):
    class Placed(block):
        def attend(self, x):
            return super().attend(x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None])

    return Placed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [PlainBlock, Scaled, Zero])
def test_what_is_not_trained_or_not_precise_is_told_all_the_same(block, dtype):
    model = Model(block).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert tp.supported(model), tp.supported(model).reason
    assert all(torch.equal(p, before[name]) and p.dtype == dtype for name, p in model.named_parameters())
    assert "Placed is not supported" in tp.supported(Model(by_place(block)).to(dtype)).reason


def test_what_hardly_depends_on_places_yet_is_refused():
    class Convolving(PlainBlock):
        def __init__(self):
            super().__init__()
            self.near = nn.Conv1d(32, 32, 3, padding=1, groups=32)

        def forward(self, x):
            return super().forward(x) + 1e-3 * self.near(x.transpose(1, 2)).transpose(1, 2)

    assert "Convolving is not supported: its output does not follow" in tp.supported(Model(Convolving)).reason


def test_a_norm_that_tells_its_width_as_a_number():
    class Own(nn.Module):
        normalized_shape = 32

    class Normed(PlainBlock):
        def __init__(self):
            super().__init__()
            self.n0 = Own()
            self._modules = {"n0": self._modules.pop("n0"), **self._modules}

    assert tp.supported(Model(Normed))


def test_a_table_for_the_whole_batch_is_refused_by_name():
    class Whole(Rotary):
        def attend(self, x, rope):  # (N, 1, d), beside (N, B, d)
            b, n, d = x.shape
            q, k, v = (t.transpose(0, 1) for t in self.qkv(x).chunk(3, -1))
            q, k = q * rope, k * rope
            heads = (t.reshape(n, b * self.h, d // self.h).transpose(0, 1) for t in (q, k, v))
            return self.proj(F.scaled_dot_product_attention(*heads).transpose(0, 1).reshape(n, b, d).transpose(0, 1))

    model = Model(Whole, lambda x: {"rope": torch.arange(x.shape[1]).cos()[:, None, None].expand(-1, 1, 32)})
    reason = tp.supported(model, example=images(2, 12)).reason
    assert "Whole is not supported: it takes one table of places (a rotary one, say) for all images" in reason


def test_a_cache_is_refused_by_name():
    class Cached(PlainBlock):
        def forward(self, x, past_key_values):
            past_key_values.append(x)
            return super().forward(torch.cat(past_key_values, 1))[:, -x.shape[1] :]

    reason = tp.supported(Model(Cached, lambda x: {"past_key_values": []}), example=images()).reason
    assert "Cached is not supported: it keeps keys and values of every token for those to come (a cache)" in reason


class Branch(PlainBlock):
    def forward(self, x):
        return super().forward(self.n1(x)) - self.n1(x)


class Listed(Branch):
    def forward(self, x):
        return [super().forward(x), x.mean()]


@pytest.mark.parametrize("block", [Branch, Listed])
@pytest.mark.parametrize("weight", [1.0, 1e-4])
def test_a_residual_sum_outside_the_block_is_refused_by_name(block, weight):
    """Pooling what a branch gives would pool no token: the sum holds them all."""

    class Summing(Model):
        def forward(self, x):
            x = self.tokens(x)
            for module in self.stages:
                y = module(x)
                x = x + weight * (y if isinstance(y, Tensor) else y[0])
            return self.head(x.mean(1))

    model = Summing(block)
    for options in ({}, {"blocks": "stages"}, {"blocks": list(model.stages)[1:]}):
        reason = tp.supported(model, example=images(), **options).reason
        assert f"{block.__name__} is not supported: its residual sum is outside of it" in reason


def test_the_layout_is_told_of_a_block_that_hardly_changes_its_tokens():
    class Second(Scaled):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    vit.patch(model := Model(Second), num_tokens={1: 8})
    assert vit.patching.patches(model)[0][1].setup.form.layout == "tokens first"


class Rotary(PlainBlock):
    def attend(self, x, rope):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        cos, sin = rope.values() if isinstance(rope, dict) else rope
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, rope):
        x = x + self.attend(self.n1(x), rope)
        return x + self.down(torch.relu(self.up(self.n2(x))))


def tables(x):
    place = torch.cat([torch.zeros(1), 1 + torch.arange(x.shape[1] - 1) // 2])
    angle = torch.outer(place, 0.3 ** torch.arange(4)).repeat(1, 2)
    return angle.cos(), angle.sin()


class Conditioned(PlainBlock):
    def forward(self, x, c):
        return super().forward(x * (1 + c[:, None]))


class Crossed(PlainBlock):
    def forward(self, x, context):
        x = super().forward(x)
        q, k, v = (t.unflatten(-1, (self.h, -1)).transpose(1, 2) for t in (x, context, context))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


SIDES = {
    "rope": (Rotary, lambda x: {"rope": tables(x)}),
    "rope, named": (Rotary, lambda x: {"rope": Result(*tables(x))}),
    "rope, dict": (Rotary, lambda x: {"rope": dict(zip(("cos", "sin"), tables(x)))}),
    "one vector an image": (Conditioned, lambda x: {"c": x[:, 1:].mean(1)}),
    "another sequence": (Crossed, lambda x: {"context": torch.ones(len(x), 7, 32).cumsum(1).cumsum(2).sin()}),
    "another, as long": (Crossed, lambda x: {"context": torch.ones(len(x), x.shape[1], 32).cumsum(1).cumsum(2).sin()}),
}


@pytest.mark.parametrize("b, n", [(2, 16), (17, 16), (3, 31), (8, 7), (4, 3), (2, 6), (2, 12), (1, 11)])
@pytest.mark.parametrize("name", SIDES)
def test_side_inputs_follow_the_tokens_whatever_else_is_as_long(name, b, n):
    """As many tokens as images, heads, features or tokens of another sequence: the trial has told what is whose."""
    assert_exact(Model(*SIDES[name]), images(b, n), example=images(2, 13))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cluster_on": "keys"}, {"pooling": "score"}, {"weighted": False}], ids=str)
@pytest.mark.parametrize("block", [PlainBlock, Crossed])
def test_a_batch_without_images(block, options):
    model = Model(block, *([SIDES["another sequence"][1]] if block is Crossed else []))
    vit.patch(model, num_tokens={1: 8}, example=images(), **options)
    assert model(images()[:0]).shape == (0, 5)


def test_no_tokens_among_the_arguments():
    class Wrapped(PlainBlock):
        def forward(self, d):
            return {"x": super().forward(d["x"])}

    class Passing(Model):
        def forward(self, x):
            d = {"x": self.tokens(x)}
            for block in self.stages:
                d = block(d)
            return d["x"]

    reason = tp.supported(Passing(Wrapped), example=images()).reason
    assert "Wrapped is not supported: none of its arguments is a tensor of tokens" in reason


@torch.no_grad()
def test_as_many_tokens_dropped_between_blocks_as_were_pooled_are_not_the_pooled_ones():
    class Dropping(Model):
        def forward(self, x):
            x = self.tokens(x)
            for i, block in enumerate(self.stages):
                x = block(x if i != 2 else x[:, ::2].clone())
            return x

    vit.patch(model := Dropping(PlainBlock), num_tokens={1: 8}, example=images())
    with pytest.raises(RuntimeError, match=r"block 2: \(2, 9, 32\) tokens came, but .* handed out 17"):
        model(images())


class TokensAnywhere(nn.Module):
    """Tokens of its own, under a name that says nothing, in front, amid and behind the 4 x 4 patches."""

    image_size = 32

    def __init__(self, front: int, amid: int, behind: int, name: str = "summary"):
        super().__init__()
        self.counts, self.name = (front, amid, behind), name
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.register_parameter(name, nn.Parameter(torch.randn(1, sum(self.counts), 32)))
        self.layers = nn.ModuleList(PlainBlock() for _ in range(4))

    def forward(self, image):
        x = self.stem(image).flatten(2).transpose(1, 2)
        front, amid, behind = getattr(self, self.name).expand(len(x), -1, -1).split(self.counts, 1)
        half = x.shape[1] // 2
        x = torch.cat([front, x[:, :half], amid, x[:, half:], behind], 1)
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize(
    "counts, name, prefix, suffix, others",
    [
        ((0, 0, 1), "summary", 0, 1, ()),
        ((0, 0, 1), "cls_token", 0, 1, ()),
        ((1, 0, 4), "register_tokens", 1, 4, ()),
        ((2, 0, 0), "queries", 2, 0, ()),
        ((1, 3, 0), "summary", 1, 0, (9, 10, 11)),
        ((0, 0, 0), "summary", 0, 0, ()),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_tokens_that_stand_for_no_part_of_the_input_are_not_pooled(counts, name, prefix, suffix, others, given):
    model, image = TokensAnywhere(*counts, name).eval(), torch.randn(2, 3, 32, 32)
    own = sum(counts)
    vit.patch(model, num_tokens={1: 2}, example=image if given else None)
    setup = vit.patching.patches(model)[0][1].setup
    assert (setup.prefix, setup.suffix, setup.protect) == (prefix, suffix, others)
    with vit.record(model) as r:
        out = model(image)
    assert r.assignment.shape == (2, 16) and len(torch.unique(out[0], dim=0)) == own + 2  # each its own, and 2 clusters
    if others:
        with pytest.raises(ValueError, match=r"tokens \[9, 10, 11\] .* 13 tokens came.*protect="):
            model(image[..., :24, :24])
        vit.patch(model, num_tokens={1: 2}, protect=range(5, 8))
    assert model(image[..., :24, :24]).shape == (2, 9 + own, 32)


def test_a_user_s_number_of_prefix_tokens_holds():
    model = TokensAnywhere(2, 0, 1).eval()
    vit.patch(model, num_prefix_tokens=0)
    setup = vit.patching.patches(model)[0][1].setup
    assert (setup.prefix, setup.suffix) == (0, 1)


class InGroups(nn.Module):
    def __init__(self, widths=(32, 32, 32)):
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(PlainBlock(d) for _ in range(2)) for d in widths)
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, (*widths[1:], 32)))

    def forward(self, x):
        for group, between in zip(self.groups, self.between):
            for block in group:
                x = block(x)
            x = between(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("blocks", [None, "groups"])
def test_groups_of_blocks_of_one_width_are_one_list(blocks):
    model, x = InGroups().eval(), images()[..., :1].repeat(1, 1, 32) * torch.randn(32)
    whole = model(x)
    vit.patch(model, num_tokens={1: 16, 4: 8}, num_prefix_tokens=0, blocks=blocks)
    assert set(vit.patched_blocks(model)) == {1, 4}
    torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="hierarchical"):
        vit.patch(InGroups((32, 64, 32)))


@torch.no_grad()
def test_lists_of_blocks_for_two_inputs_are_not_one_list():
    class TwoTowers(InGroups):
        def forward(self, x, y):
            for one, other in zip(*self.groups[:2]):
                x, y = one(x), other(y)
            return x, y

    pair = torch.randn(2, 2, 10, 32).unbind()
    for blocks in (None, "groups"):
        with pytest.raises(TypeError, match=r"groups were not seen to run one after another.*blocks='groups.0'"):
            vit.patch(TwoTowers((32, 32)), num_tokens={1: 5}, blocks=blocks, example=pair)
    vit.patch(model := TwoTowers((32, 32)), num_tokens={1: 5}, blocks="groups.0", num_prefix_tokens=0, example=pair)
    assert [len(torch.unique(out[0], dim=0)) for out in model(*pair)] == [5, 10]


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_what_a_mask_hides_in_the_example_is_pooled_elsewhere(whole, lengths):
    """A mask's token and padding are the same for two inputs, but stand for a part of the next."""

    class Masked(Model):
        def forward(self, x, mask):
            if lengths:  # as in wav2vec 2
                mask = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
            x = torch.where(mask[:, :, None] != 0, self.stem(x), 0)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            for block in self.stages:
                x = block(x)
            return x

    mask = torch.ones(2, 16, dtype=torch.long if whole else torch.bool)
    mask[:, [3, 4, 14, 15]] = 0
    vit.patch(model := Masked(PlainBlock).eval(), num_tokens={1: 8}, example=(images(), mask))
    setup = vit.patching.patches(model)[0][1].setup
    assert (setup.prefix, setup.suffix, setup.protect) == (1, 0, ())


@torch.no_grad()
@pytest.mark.parametrize("counts, protect", [((0, 0, 1), [-1]), ((2, 0, 0), [0, 1]), ((1, 0, 2), [0, -2, -1, 5])])
def test_protected_tokens_that_are_seen_count_once(counts, protect):
    model, image = TokensAnywhere(*counts).eval(), torch.randn(1, 3, 32, 32)
    vit.patch(model, num_tokens={1: 8}, protect=protect, outside="short")
    seen = []
    model.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model(image)
    assert seen == [sum(counts) + 8 + (5 in protect)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["object", "array", "nothing"])
def test_an_example_that_holds_no_tensor(kind):
    x = images()

    class Boxed(Model):
        def forward(self, box=None):
            return super().forward(x if box is None else torch.as_tensor(getattr(box, "tensor", box)))

    example = {"object": SimpleNamespace(tensor=x), "array": x.numpy(), "nothing": ()}[kind]
    model = Boxed(PlainBlock).eval()
    vit.patch(model, num_tokens={1: 8}, example=example)
    model(*example) if kind == "nothing" else model(example)
    assert vit.patching.patches(model)[0][1].setup.prefix == 1


@torch.no_grad()
def test_a_table_of_words_of_one_s_own_class():
    class Table(nn.Embedding):
        pass

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = Table(50, 32)
            self.layers = nn.ModuleList(PlainBlock() for _ in range(3))

        def forward(self, words):
            x = self.words(words)
            for layer in self.layers:
                x = layer(x)
            return x

    vit.patch(model := Text().eval(), num_tokens={1: 4}, example=torch.arange(8)[None])
    assert vit.patching.patches(model)[0][1].setup.prefix == 1


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("example", [None, images()], ids=["made up", "given"])
def test_what_was_compiled_in_place_is_not_compiled_to_be_tried(each, example):
    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiled: list = []
    torch.compiler.reset()
    model = Model(PlainBlock).eval()
    for module in model.stages if each else [model]:
        module.compile(backend=backend, fullgraph=True)
    vit.patch(model, num_tokens={1: 8}, example=example)
    assert not compiled
    with torch.no_grad():
        model(images())
    assert compiled


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(32), inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@torch.no_grad()
def test_a_sequential_that_is_named_is_a_block():
    model = nn.Sequential(*(nn.Sequential(Residual(Attention()), Residual(nn.Linear(32, 32))) for _ in range(4))).eval()
    x = torch.randn(2, 8, 32).repeat_interleave(2, 1)
    whole = model(x)
    vit.patch(model, num_tokens={1: 8}, blocks=list(model), num_prefix_tokens=0)
    torch.testing.assert_close(model(x), whole)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), whole)
    assert list(vit.patched_blocks(model)) == [1] and vit.patching.patches(model)[0][1].setup.depth == 4
    groups = nn.Sequential(*(nn.Sequential(PlainBlock(), PlainBlock()) for _ in range(2)))
    assert "(4 x PlainBlock)" in tp.supported(groups).reason
