"""Any transformer: the tokens outside stay whole, side inputs follow, what does not commute is refused, uses are right.

Tiny models with random weights; what is compared is stated by reasoning (duplicates, permutations, the unpooled model).
"""

from __future__ import annotations

import collections
import copy
import importlib.util
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from model_zoo import PlainBlock, PlainModel, liven, zoo
from torch import nn

import tokenpool_ext as tp
from tokenpool_ext import vit
from tokenpool_ext.vit import finding, inputs, patched_blocks, patching, probing, record
from tokenpool_ext.vit.pooled import _THREAD
from tokenpool_ext.vit.tap import Tap

NEEDS = {"timm": "timm", "transformers": "transformers", "torchvision": "torchvision", "open_clip": "open_clip"}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str):
    """(model, args, kwargs) of the zoo, or skip where its library is not installed."""
    library = next((m for key, m in NEEDS.items() if name.startswith(key)), None)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    model, args, kwargs = zoo(True)[name]()
    return liven(model), args, kwargs


def plain(n=16, depth=4):
    torch.manual_seed(0)
    return liven(PlainModel(depth=depth, n=n)), torch.randn(2, n, 8, generator=torch.Generator().manual_seed(1))


def repeated(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    return x.repeat_interleave(times, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_duplicates_pool_to_the_same_numbers(batch_first):
    """Exact duplicates and as many clusters as distinct tokens: with sizes, the pooled model computes the whole one."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=True)
    model = liven(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
    x = torch.randn(2, 8, 32).repeat_interleave(torch.tensor([1, 3, 2, 5, 1, 2, 1, 1]), dim=1)
    x = x if batch_first else x.transpose(0, 1)
    wanted = model(x)
    vit.patch(model, num_tokens={1: 8})
    got = model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    vit.patch(model, num_tokens={1: 8}, track_size=False)
    assert not torch.allclose(model(x), wanted, rtol=1e-2, atol=1e-2), "without sizes it does not"
    vit.patch(model, num_tokens={1: 8}, outside="short")
    assert model(x).shape == ((2, 8, 32) if batch_first else (8, 2, 32))


@torch.no_grad()
def test_mean_heads_see_what_they_always_saw():
    """A head that averages weighs every cluster by its size: on duplicates it gives the unpooled answer."""
    model, _ = plain()
    x = repeated(torch.randn(2, 8, 8))
    with torch.no_grad():
        model.pos.copy_(torch.cat([model.pos[:, :1], repeated(model.pos[:, 1:9])], 1))
    wanted = model(x)
    vit.patch(model, num_tokens={1: 8})
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


FAMILIES = [
    "timm vit_small_patch14_reg4_dinov2",
    "timm eva02_tiny_patch14_224",
    "timm vit_small_patch16_dinov3",
    "timm beit_base_patch16_224",
    "timm cait_xxs24_224",
    "transformers DINOv3ViT",
    "transformers CLIP",
    "transformers SiglipVision",
    "transformers Beit",
    "transformers ViTMAEForPreTraining",
    "transformers YolosForObjectDetection",
    "transformers DPTForDepthEstimation",
    "transformers Dinov2ForImageClassification",
    "transformers Dinov2Backbone",
    "transformers BertPadded",
    "transformers T5Encoder",
    "transformers WavLM",
    "transformers CLIPText",
    "transformers PixtralVision",
    "torchvision vit",
    "open_clip text",
    "nn.TransformerEncoder (N, B, D)",
    "hand-written",
]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    from model_zoo import attempt

    make(name)
    verdict, reason = attempt(zoo()[name])
    assert verdict == "works", reason


REFUSED = {
    "transformers Timesformer": "TimesformerLayer is not supported",
    "transformers VJEPA2": "VJEPA2Layer is not supported",
    "transformers Swin": "SwinModel is hierarchical",
    "transformers Longformer": "LongformerLayer is not supported",
    "transformers Llama": "LlamaDecoderLayer is not supported: it keeps keys and values",
    "transformers XCLIPVision": "mixes the images",
    "transformers Vilt": "words and patches in one sequence",
    "transformers SamVision": "SamVisionLayer takes its tokens as a feature map",
    "transformers UMT5Encoder": "UMT5Block is not supported",
    "timm xcit_nano_12_p16_224": "XCABlock is not supported",
    "timm coat_tiny": "CoaT is hierarchical",
    "timm sam2_hiera_tiny": "MultiScaleBlock",
    "timm tnt_s_patch16_224": "two sequences",
    "timm resnet18": "no list of transformer blocks in ResNet",
    "torchvision swin_t": "SwinTransformer is hierarchical",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_commute_is_refused_by_name(name):
    model, args, kwargs = make(name)
    before = {id(m): type(m) for m in model.modules()}
    with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
        vit.patch(model, keep_ratio=0.5)
    assert before == {id(m): type(m) for m in model.modules()}, "a refused patch changes nothing"


class Ordered(PlainBlock):
    """Looks at its tokens' places."""

    def forward(self, x):
        return super().forward(x + torch.arange(x.shape[1])[:, None] / x.shape[1])


class Mixing(PlainBlock):
    """Looks at the other images of the batch."""

    def forward(self, x):
        return super().forward(x) + x.mean((0, 1))


class Counting(PlainBlock):
    """Makes a bias for as many tokens as come, which says nothing of the places that are left."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 40, 40))

    def forward(self, x):
        n, d = x.shape[1:]
        q, k, v = self.qkv(self.n1(x)).view(len(x), n, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.table[:, :n, :n])
        return x + self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "block, words",
    [(Ordered, "Ordered is not supported"), (Counting, "Counting is not supported"), (Mixing, "mixes the images")],
)
def test_hand_written_blocks_that_lie(block, words):
    with pytest.raises(TypeError, match=words):
        vit.patch(PlainModel(block), keep_ratio=0.5)


class Laid(PlainBlock):
    """Its attention product has its images and heads in another layout, and in training some images of a batch only."""

    layout, fused, images = "b h", False, slice(None)

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        first, folded = "h b" in self.layout, "(" in self.layout
        q, k, v = (
            t.transpose(0, 1) if first else t.unflatten(1, (2, -1)) if "g" in self.layout else t for t in (q, k, v)
        )
        q, k, v = (t.flatten(0, 1) if folded else t for t in (q, k, v))
        if self.fused and "/" in self.layout:
            out = nn.functional.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)
        elif self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        shape = n, d // self.h
        out = out.reshape(self.h, b, *shape).transpose(0, 1) if first else out.reshape(b, self.h, *shape)
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x):
        i = torch.arange(len(x))[self.images]
        x = x.index_add(0, i, self.attend(self.n1(x[i])))
        return x + self.down(torch.relu(self.up(self.n2(x))))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cluster_on": "keys", "weighted": False}, {"pooling": "score"}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["b h", "(b h)", "h b", "(h b)", "b g h", "b h/2"])
def test_the_layout_of_the_product_changes_nothing(layout, fused, options):
    """Heads in front of the images, or folded into them: scores, keys and sizes are of each image's own tokens."""
    model, x = plain()
    for block in model.stages:  # two heads share their keys and values
        for t in (block.qkv.weight.data, block.qkv.bias.data):
            heads = t[32:].view(2, 2, 2, 8, -1)
            heads[:, :, 1] = heads[:, :, 0]
    other = PlainModel(Laid)
    other.load_state_dict(model.state_dict())
    for block in other.stages:
        block.layout, block.fused = layout, fused
    x = torch.cat([x, 2 * x.flip(1)])  # as many images as heads
    counts = {1: 7, 2: 4}  # 8 tokens come into block 2, as many as a head has features
    wanted = vit.patch(model, num_tokens=counts, **options)(x)
    torch.testing.assert_close(vit.patch(other, num_tokens=counts, **options)(x), wanted)
    for images in (slice(1, 2), slice(3), slice(0)):
        if images == slice(0) and fused and layout == "h b":
            continue  # torch 2.11's own product dies of no heads
        torch.testing.assert_close(other(x[images]), wanted[images])


class MultiHead(Laid):
    def __init__(self, d=32, h=4):
        super().__init__(d, h)
        self.attention = nn.MultiheadAttention(d, h, batch_first=True)

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("part", [slice(1), slice(0, 2)])
@pytest.mark.parametrize("kind", ["product", "softmax", "nn.MultiheadAttention"])
def test_attention_to_some_images_is_refused(kind, part):
    """Stochastic depth that leaves out images, as DINOv2's own."""
    model, x = PlainModel(MultiHead if "nn." in kind else Laid), torch.randn(4, 16, 8)
    for block in model.stages:
        block.fused = kind == "product"
    vit.patch(model, keep_ratio=0.5)
    for block in model.stages:
        block.images = part
    with pytest.raises(RuntimeError, match=rf"attention ran on {part.stop} of 4 images"):
        model(x)


@torch.no_grad()
def test_padding_moves_nothing():
    model, _, kwargs = make("transformers BertPadded")
    vit.patch(model, num_tokens={1: 6, 2: 3})
    a = model(**kwargs).last_hidden_state
    kwargs["input_ids"][1, 9:] = 77  # what is padded
    b = model(**kwargs).last_hidden_state
    torch.testing.assert_close(a[1, :9], b[1, :9])
    assert torch.equal(a[0], b[0])


@torch.no_grad()
@pytest.mark.parametrize("options", [{"keep_ratio": 0.5}, {"keep_ratio": 0.6, "outside": "short"}], ids=str)
@pytest.mark.parametrize("pooling", ["kmeans", "kmedoids", "score"])
@pytest.mark.parametrize("name", ["BertPadded", "ModernBert", "T5Encoder"])
def test_a_padded_text_is_as_alone(name, pooling, options):
    model, _, kwargs = make(f"transformers {name}")
    whole = model(**kwargs).last_hidden_state[1]
    vit.patch(model, pooling=pooling, **options)
    beside = model(**kwargs).last_hidden_state[1]
    alone = model(**{key: value[1:, :9] for key, value in kwargs.items()}).last_hidden_state[0]
    rows = slice(1 if "outside" in options else 9)  # outside="short": the token in front
    torch.testing.assert_close(beside[rows], alone[rows])
    assert (whole[rows] - alone[rows]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"pooling": "score"}, {"protect": [2], "cluster_on": "keys"}], ids=str)
@pytest.mark.parametrize("name", ["transformers Qwen2VL vision", "transformers Qwen2.5VL vision"])
def test_packed_images_are_pooled_one_by_one(name, options):
    model, (patches, grid), _ = make(name)
    vit.patch(model, keep_ratio=0.5, **options)
    out = model(patches, grid)
    together = out if isinstance(out, torch.Tensor) else out[0]
    start = 0
    for row in grid:
        n = int(row.prod())
        vit.patch(model, keep_ratio=0.5, **{**options, "protect": None if start else options.get("protect")})
        out = model(patches[start : start + n], row[None])
        alone = out if isinstance(out, torch.Tensor) else out[0]
        rows = slice(start * len(together) // len(patches), (start + n) * len(together) // len(patches))
        torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-4)
        start += n


@torch.no_grad()
def test_images_packed_by_a_mask_are_pooled_one_by_one():
    model, _, kwargs = make("transformers PixtralVision")
    x = kwargs["pixel_values"]
    together = vit.patch(model, keep_ratio=0.5, protect=[2])(x).last_hidden_state
    first = model(x[:1]).last_hidden_state
    second = vit.patch(model, keep_ratio=0.5)(x[1:]).last_hidden_state
    torch.testing.assert_close(together, torch.cat([first, second], dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_causal_text_sees_nothing_of_what_comes_after():
    model, args, _ = make("open_clip text")
    vit.patch(model, num_tokens={1: 6}, blocks="transformer.resblocks", weighted=False, num_prefix_tokens=0)
    layers, x = model.transformer.resblocks, torch.randn(1, 12, 32)
    x[:, 6:] += 4 * torch.randn(32)  # clusters of the first half and of the second
    mask = torch.full((12, 12), -torch.inf).triu(1)

    def run(tokens):
        for layer in layers:
            tokens = layer(tokens, attn_mask=mask)
        return tokens

    with record(model) as r:
        before = run(x)
    labels = r.assignment[0]
    assert not set(labels[:6].tolist()) & set(labels[6:].tolist())
    x[:, -1] += 1e-3 * torch.randn(32)
    after = run(x)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 11], after[:, 11], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_detection_tokens_and_protected_tokens_are_not_pooled():
    model, args, kwargs = make("transformers YolosForObjectDetection")
    vit.patch(model, keep_ratio=0.5)
    setup = patching.patches(model)[0][1].setup
    assert (setup.prefix, setup.suffix) == (1, 100)
    with record(model) as r:
        model(**kwargs)
    assert r.assignment.shape == (2, 16)
    model, x = plain()
    seen = []
    vit.patch(model, num_tokens={1: 4}, protect=[5, -1], position="block")
    model.stages[1].register_forward_hook(lambda m, a, out: seen.append(out))
    model(x)
    for token in (0, 5, 16):  # alone in their clusters: no other place has the same row
        same = (seen[0] == seen[0][:, token : token + 1]).all(-1)
        assert same.sum(1).tolist() == [1, 1]
    with record(model) as r:
        model(x)
    assert r.num_prefix_tokens == 3 and r.assignment.shape == (2, 14) and set(r.assignment[0].tolist()) == set(range(4))


@torch.no_grad()
def test_maps_keep_their_size_and_short_does_not():
    model, args, kwargs = make("transformers Dinov2Backbone")
    shape = model(**kwargs).feature_maps[0].shape
    vit.patch(model, keep_ratio=0.5)
    assert model(**kwargs).feature_maps[0].shape == shape
    model, args, kwargs = make("transformers CLIPVision")
    vit.patch(model, num_tokens={1: 5}, outside="short")
    assert model(**kwargs).last_hidden_state.shape[1] == 6


@torch.no_grad()
@pytest.mark.parametrize("position", ["block", "attention"])
def test_a_new_tensor_between_blocks_is_pooled_by_the_same_assignment(position):
    """Hooks that add, scale or clone between the blocks: what FSDP2, YOLOS and users do."""
    model, args, kwargs = make("transformers ViT")
    vit.patch(model, num_tokens={1: 6, 2: 4}, position=position)
    wanted = model(**kwargs).last_hidden_state
    handles = [layer.register_forward_hook(lambda m, a, out: out.clone()) for layer in model.layers]
    torch.testing.assert_close(model(**kwargs).last_hidden_state, wanted)
    assert not _THREAD.runs, "nothing is kept when the forward is over"
    [h.remove() for h in handles]
    [layer.register_forward_hook(lambda m, a, out: out * 1.0) for layer in model.layers]
    torch.testing.assert_close(model(**kwargs).last_hidden_state, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["transformers ViT", "transformers Dinov2WithRegisters", "transformers Wav2Vec2"])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    grads = []
    for checkpointing in (False, True):
        model, args, kwargs = make(name)
        vit.patch(model.eval(), num_tokens={1: 6, 2: 4})
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for m in model.modules():
            m.training = type(m).__name__.endswith("Layer")  # checkpoints only while training; no dropout, no masking
        if "pixel_values" in kwargs:
            kwargs["pixel_values"].requires_grad_()
        out = model(**kwargs).last_hidden_state
        out.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    both = grads[0].keys() & grads[1].keys()  # reentrant checkpoints stop at inputs that need no gradient
    assert len(both) > 40 and (reentrant or grads[0].keys() == grads[1].keys())
    for key in both:
        grad = grads[0][key]
        torch.testing.assert_close(grad, grads[1][key], rtol=1e-4, atol=1e-6, msg=key)


def test_backward_hooks_between_blocks_keep_sizes():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6, 2: 4}, track_size=True)
    wanted = model(x)
    for block in model.stages:
        block.register_full_backward_hook(lambda m, gi, go: None)
    got = model(x)
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_data_parallel_replicas_run_their_own_weights():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6})
    wanted = model(x)
    block = model.stages[2]
    replica = block._replicate_for_data_parallel()  # what nn.parallel.replicate makes
    replica._modules = {n: copy.deepcopy(m) for n, m in block._modules.items()}
    for p in replica.qkv.parameters():
        p.mul_(2)
    tokens = torch.randn(2, 17, 32)
    assert not torch.equal(replica(tokens), block(tokens))
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_adapters_after_patch_are_seen_by_scores_and_keys():
    """A projection replaced after ``patch`` changes what is pooled just as one replaced before."""
    results = []
    for before in (True, False):
        model, x = plain()
        if not before:
            vit.patch(model, num_tokens={1: 5}, cluster_on="keys")
        torch.manual_seed(3)
        model.stages[1].qkv = nn.Sequential(model.stages[1].qkv, nn.Linear(96, 96))
        if before:
            vit.patch(model, num_tokens={1: 5}, cluster_on="keys")
        results.append(model(x))
    assert torch.equal(*results)


@torch.no_grad()
def test_copies_threads_and_pickles():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6, 2: 4})
    wanted = [model(x), model(x.flip(0))]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted[0]) and list(patched_blocks(other)) == [1, 2]
        vit.unpatch(other)
        assert type(other.stages[1]) is PlainBlock
    wrong = []

    def work(i):
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not torch.equal(model([x, x.flip(0)][i]), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@torch.no_grad()
def test_a_pooled_block_costs_few_calls():
    """Functions of the package that one pooling block calls, what its tap sees of the block's own calls left out."""
    model, x = plain()
    vit.patch(model, num_tokens={1: 6, 2: 4})
    model(x[:1])
    calls: list[str] = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and "/tokenpool_ext/" in code.co_filename and code.co_name != "__torch_function__":
            calls.append(code.co_name)

    handle = model.stages[2].register_forward_pre_hook(lambda *_: calls.clear())
    done = model.stages[2].register_forward_hook(lambda *_: sys.setprofile(None))
    sys.setprofile(note)
    try:
        model(x[:1])
    finally:
        sys.setprofile(None)
        handle.remove(), done.remove()
    assert {"run", "cluster_from"} <= set(calls) and len(calls) < 70, calls


@torch.no_grad()
def test_schedules():
    model, x = plain()
    assert patched_blocks(vit.patch(model))[1].keep_ratio == vit.schedule.DEFAULT_RATIO, (
        "patch(model) alone does something"
    )
    assert not torch.equal(model(x), vit.unpatch(model)(x))
    vit.patch(model, r=3)
    with record(model) as r:
        model(x)
    assert [c.mass.shape[1] for _, c in r.layers] == [13, 10, 7, 4]
    vit.patch(model, num_tokens={-3: 9, -1: 0.5})
    assert list(patched_blocks(model)) == [1, 3]
    patched_blocks(model)[1].num_tokens = 5
    with record(model) as r:
        model(x)
    assert [c.mass.shape[1] for _, c in r.layers] == [5, 2]
    expected = model(x)
    for name, value in (("num_prefix_tokens", 3), ("return_clusters", False)):
        before = getattr(patched_blocks(model)[3], name)
        setattr(patched_blocks(model)[3], name, value)
        with pytest.raises(ValueError, match=rf"block 3 \(PlainBlock\): .*num_prefix_tokens=1 .*got .*{name}={value}"):
            model(x)
        setattr(patched_blocks(model)[3], name, before)
    model.stages[3].tokenpool = tp.TokenPooling(2)
    with pytest.raises(ValueError, match="block 3 .*got num_prefix_tokens=1 and return_clusters=False"):
        model(x)
    model.stages[3].tokenpool = tp.TokenPooling(keep_ratio=0.5, return_clusters=True)
    assert torch.equal(model(x), expected)


def test_supported_tells_before_anything_is_changed():
    model, _ = plain()
    told = tp.supported(model, keep_ratio=0.5)
    assert told and told.num_prefix_tokens == 1 and "stages (4 x PlainBlock)" in told.reason
    assert not any(patching.patches(model)) and type(model.stages[0]) is PlainBlock
    told = tp.supported(PlainModel(Ordered))
    assert not told and "Ordered" in told.reason
    assert not tp.supported(model, keep_ratio=2.0) and not tp.supported(model, budget=2.0)
    assert tp.supported(model, budget=0.9) and not tp.supported(model, budget=0.9, r=2)
    assert "timm vit_small_patch16_224" in tp.supported() and len(tp.supported()) > 60


@torch.no_grad()
def test_one_block_that_is_several():
    model, x = plain()
    model.stages = nn.ModuleList([model.stages[0]] * 4)
    whole = model(x)
    with pytest.raises(ValueError, match="blocks 1 and 2 of stages are one module"):
        vit.patch(model, num_tokens={1: 6})
    assert torch.equal(model(x), whole)
    vit.patch(model, blocks=[model.stages[0]], num_tokens={0: 6})
    assert not torch.equal(model(x), whole)
    vit.patch(model, blocks=[model.stages[0]], num_tokens={0: 16})
    assert torch.equal(model(x), whole)


@torch.no_grad()
def test_what_a_processor_gives_is_an_example():
    model, _, kwargs = make("transformers ViT")
    batch = collections.UserDict(kwargs)  # a BatchFeature is one
    vit.patch(model, keep_ratio=0.5, example=batch)
    vit.unpatch(model)
    found = [tp.search_schedule(model, [b], budget=0.95, counts=[12], layers=[1]) for b in (batch, kwargs)]
    assert found[0] == found[1]
    assert tp.learn_schedule(model, [batch], penalty=1e-3, steps=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers ViT", "transformers BertPadded"])
def test_flex_attention_is_refused(name):
    from torch.nn.attention.flex_attention import create_block_mask

    model, *_ = make(name)
    model.set_attn_implementation("flex_attention")
    assert not tp.supported(model) and "flex attention" in tp.supported(model).reason
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 16, 16, device="cpu")  # chosen after patching
    with pytest.raises(TypeError, match="set_attn_implementation"):
        inputs.follow(mask, "attention_mask", None, 16, torch.zeros(2, 4, dtype=torch.int64), [])


@torch.no_grad()
def test_a_kernel_that_shows_nothing():
    """transformers' registry: a foreign kernel with the mask of flash attention; padding still moves nothing."""
    transformers = pytest.importorskip("transformers")
    from transformers.masking_utils import flash_attention_mask

    def kernel(module, q, k, v, attention_mask, scaling=None, **rest):
        logits = q.numpy() @ k.numpy().swapaxes(-1, -2) * scaling
        if attention_mask is not None:
            logits = np.where(attention_mask.numpy()[:, None, None, :] != 0, logits, -1e9)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v.numpy()
        return torch.from_numpy(out).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("numpy_kernel", kernel)
    transformers.AttentionMaskInterface.register("numpy_kernel", flash_attention_mask)
    model, _, kwargs = make("transformers BertPadded")
    whole = model(**kwargs).last_hidden_state
    model.set_attn_implementation("numpy_kernel")
    torch.testing.assert_close(model(**kwargs).last_hidden_state[1, :9], whole[1, :9], atol=1e-4, rtol=1e-4)
    assert "no scores" in tp.supported(model).reason
    vit.patch(model, num_tokens={1: 6, 2: 3})
    a = model(**kwargs).last_hidden_state
    kwargs["input_ids"][1, 9:] = 77
    b = model(**kwargs).last_hidden_state
    torch.testing.assert_close(a[1, :9], b[1, :9])
    with pytest.raises(ValueError, match="track_size"):
        vit.patch(model, keep_ratio=0.5, track_size=True)


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.9, 0.75])
def test_a_budget_is_kept(budget):
    costs = pytest.importorskip("tokenpool_ext.cost")
    model, args, kwargs = make("transformers ViT")
    whole = costs.cost(model, *args, **kwargs).total
    vit.patch(model, budget=budget)
    share = costs.cost(model, *args, **kwargs).total / whole
    assert budget - 0.1 < share <= budget + 0.01
    with pytest.raises(ValueError, match="exactly one"):
        vit.patch(model, budget=0.5, r=2)
    before, again = vit.patched_blocks(model), model(*args, **kwargs).last_hidden_state
    with pytest.raises(ValueError, match="budget must be at least"):
        vit.patch(model, budget=0.1)
    assert vit.patched_blocks(model) == before, "what is refused leaves the earlier patch"
    assert torch.equal(model(*args, **kwargs).last_hidden_state, again)
    model(*args, **kwargs)
    assert not _THREAD.runs


@torch.no_grad()
def test_blocks_are_proven_once_for_a_budget(monkeypatch):
    model, *_ = make("transformers ViT")
    calls = []
    prove = probing.prove
    monkeypatch.setattr(probing, "prove", lambda *args: calls.append(1) or prove(*args))
    vit.patch(model, budget=0.9)
    assert len(calls) == 1


def test_bench_model_compares_at_equal_cost():
    from tokenpool_ext.bench_model import bench_model

    model, *_ = make("transformers ViT")
    (row,) = bench_model(model, batches=[2], budget=0.8, rounds=2)
    assert row["batch"] == 2 and not patched_blocks(model)
    for name in ("pooled", "tome"):
        assert 0.7 < row[f"{name}_share"] <= 0.8 and 0 < row[f"{name}_own"] < 1
        assert row[f"{name}_ms"] > 0 and row[f"{name}_speedup"] > 0
    with pytest.raises(ValueError, match="budget"):
        bench_model(model, budget=0.01)
    vit.patch(model.train(), keep_ratio=0.5)
    (again,) = bench_model(model, batches=[1], budget=0.8, rounds=1)
    assert again["pooled_share"] == row["pooled_share"] and model.training and patched_blocks(model)
    for wrong in ({"rounds": 0}, {"batches": [0]}, {"batches": []}):
        with pytest.raises(ValueError, match=f"bench-model: {next(iter(wrong))} must"):
            bench_model(model, **wrong)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hand-written", "transformers CLIPVision", "timm eva02_tiny_patch14_224"])
def test_compile_and_export(name):
    model, args, kwargs = make(name)
    vit.patch(model, num_tokens={1: 6, 2: 4})
    wanted = model(*args, **kwargs)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")(*args, **kwargs)
    torch.testing.assert_close(got if isinstance(got, torch.Tensor) else got[0], wanted)
    got = torch.export.export(model, args, kwargs).module()(*args, **kwargs)
    torch.testing.assert_close(got if isinstance(got, torch.Tensor) else got[0], wanted)


def test_old_tracers_are_refused_by_name():
    model, x = plain()
    vit.patch(model, num_tokens={1: 6})
    with pytest.raises(RuntimeError, match="cannot be traced by torch.fx.*torch.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(RuntimeError, match="cannot be scripted by torch.jit.script.*torch.export"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(model, x)
    with pytest.raises(TypeError, match="ScriptModule"):
        vit.patch(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), keep_ratio=0.5)


@torch.no_grad()
def test_meta_models_are_patched_before_they_have_weights():
    with torch.device("meta"):
        model = PlainModel()
    vit.patch(model, num_tokens={1: 6})
    assert model(torch.randn(2, 16, 8, device="meta")).shape == (2, 5)


@torch.no_grad()
def test_several_lists_are_named():
    model = nn.ModuleDict({"left": PlainModel(), "right": PlainModel()})
    with pytest.raises(ValueError, match="'left.stages', 'right.stages'"):
        vit.patch(model, keep_ratio=0.5)
    vit.patch(model, keep_ratio=0.5, blocks="right.stages")
    assert not patched_blocks(model["left"]) and patched_blocks(model["right"])
    vit.patch(model["left"], keep_ratio=0.5, blocks=model["left"].stages)
    assert finding.find_blocks(model["left"]).path == "stages"
    assert tp.unpatch(model) is model and not patched_blocks(model)


@torch.no_grad()
@pytest.mark.parametrize("order", ["patch first", "hooks first"])
def test_accelerate_hooks(order):
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model, x = plain()
    whole, pooled = model(x), vit.patch(copy.deepcopy(model), num_tokens={1: 6, 2: 4})(x)
    if order == "patch first":
        vit.patch(model, num_tokens={1: 6, 2: 4})
    for block in model.stages:
        hooks.add_hook_to_module(block, Hook())
    if order == "hooks first":
        vit.patch(model, num_tokens={1: 6, 2: 4})
    calls.clear()
    assert torch.equal(model(x), pooled) and calls == list(model.stages)
    assert torch.equal(copy.deepcopy(model)(x), pooled)
    assert torch.equal(vit.unpatch(model)(x), whole)
    for block in model.stages:
        hooks.remove_hook_from_module(block)
    assert torch.equal(model(x), whole)


@torch.no_grad()
def test_forwards_kept_on_a_block():
    """transformers 4.57 leaves ``block.forward = block.forward`` behind when it records hidden states."""
    model, x = plain()
    whole, pooled = model(x), vit.patch(copy.deepcopy(model), num_tokens={1: 6, 2: 4})(x)
    for _ in range(2):
        for block in model.stages:
            block.forward = block.forward
        assert torch.equal(vit.patch(model, num_tokens={1: 6, 2: 4})(x), pooled)
        for block in model.stages:
            block.forward = block.forward
        assert torch.equal(vit.unpatch(model)(x), whole)
    kept = model.stages[1].forward
    model.stages[1].forward = lambda *args: kept(*args)
    with pytest.raises(ValueError, match="block 1 .* already has a forward put there by something else"):
        vit.patch(model, num_tokens={1: 6, 2: 4})
    assert torch.equal(model(x), whole)


@torch.no_grad()
def test_lora_after_patch():
    peft = pytest.importorskip("peft")
    model, _, kwargs = make("transformers ViT")
    vit.patch(model, num_tokens={1: 6, 2: 4})
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    got = model(**kwargs).last_hidden_state
    vit.patch(vit.unpatch(model), num_tokens={1: 6, 2: 4})
    assert torch.equal(model(**kwargs).last_hidden_state, got)


@pytest.mark.parametrize("order", ["patch first", "shards first"])
def test_fully_shard(order, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, x = plain()
    whole, pooled = model(x), vit.patch(copy.deepcopy(model), num_tokens={1: 6, 2: 4})(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        if order == "patch first":
            vit.patch(model, num_tokens={1: 6, 2: 4})
        for block in model.stages:
            fsdp.fully_shard(block, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        if order == "shards first":
            vit.patch(model, num_tokens={1: 6, 2: 4})
        out = model(x)
        torch.testing.assert_close(out, pooled)
        out.sum().backward()
        torch.testing.assert_close(vit.unpatch(model)(x), whole)
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["none", "hides", "adds", "adds by head"])
def test_scores_of_multihead_attention_are_its_weights_under_its_masks(kind, padded):
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 7, 16)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[1, 5:] = True
    mask = {
        "none": None,
        "hides": torch.ones(7, 7).triu(1).bool(),
        "adds": torch.randn(7, 7),
        "adds by head": torch.randn(8, 7, 7),
    }[kind]
    given = {"attn_mask": mask, "key_padding_mask": hidden if padded else None}
    if padded and kind.startswith("adds"):
        given["key_padding_mask"] = torch.zeros(2, 7).masked_fill(hidden, -torch.inf)
    weights = layer(x, x, x, **given)[1]
    tap = Tap(2, 7, None, None, 7, True)
    with tap:
        layer(x, x, x, need_weights=False, **given)
    torch.testing.assert_close(tap.scores(), weights.mean(1))
