"""patch/unpatch on timm's VisionTransformer with random weights (only where timm is installed)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tokenpool_ext import unpool, vit
from tokenpool_ext.vit import patching, record, tokens_per_layer, unpatch

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

# name: (prefix tokens, builder)
SMALL = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=4, num_classes=5)


def distilled(**extra):
    deit = pytest.importorskip("timm.models.deit")
    return deit.VisionTransformerDistilled(**{**SMALL, **extra})


MODELS = {
    "vit": (1, lambda **kw: VisionTransformer(**{**SMALL, **kw})),
    "distilled": (2, distilled),
    "dinov2-registers": (
        5,
        lambda **kw: VisionTransformer(**{**SMALL, "init_values": 0.5, "reg_tokens": 4, "no_embed_class": True, **kw}),
    ),
    "gap-qknorm-pre": (
        0,
        lambda **kw: VisionTransformer(
            **{**SMALL, "class_token": False, "global_pool": "avg", "qk_norm": True, "pre_norm": True, **kw}
        ),
    ),
}


def patch(model, **options):
    """The pooled tokens themselves, fewer; tests/test_vit_any.py looks at the default, as many as before."""
    return vit.patch(model, **{"outside": "short", **options})


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(family, **extra):
    torch.manual_seed(0)
    model = MODELS[family][1](**extra).eval()
    with torch.no_grad():  # the initial weights are so small that attention is uniform
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def widths(model, x):
    """Tokens after each block."""
    seen = []
    hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out.shape[1])) for block in model.blocks]
    model(x)
    [hook.remove() for hook in hooks]
    return seen


@torch.no_grad()
def test_counts_and_unpatch(family, images):
    model, p = build(family), MODELS[family][0]
    plain, keys = model(images), set(model.state_dict())
    assert patch(model, num_tokens={1: 10, 2: 5}) is model
    assert widths(model, images) == [p + n for n in (16, 10, 5, 5)] == tokens_per_layer(model)
    pooled = model(images)
    assert torch.isfinite(pooled).all() and not torch.equal(pooled, plain) and set(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model)(images), pooled)
    patch(model, keep_ratio=0.5, pooling="bipartite", position="block")
    assert widths(model, images) == [p + n for n in (16, 8, 4, 2)]
    unpatch(model)
    assert torch.equal(model(images), plain) and widths(model, images) == [p + 16] * 4


@torch.no_grad()
@pytest.mark.parametrize("pooling", list(patching.POOLINGS))
def test_keep_all_is_bit_equal(family, pooling, images):
    model = build(family)
    plain = model(images)
    for options in (dict(keep_ratio=1.0), dict(num_tokens={0: 20, 3: 16}, position="block", track_size=True)):
        assert torch.equal(patch(model, pooling=pooling, **options)(images), plain)
    patch(model, keep_ratio=0.5, pooling=pooling, track_size=True)
    assert torch.isfinite(model(images)).all()


class Spy(nn.Module):
    def __init__(self, kept, **_):
        super().__init__()
        self.kept = kept

    def forward(self, x, scores=None, *, features=None, mask=None, sizes=None):
        self.kept.append((x, scores, features))
        return x


@torch.no_grad()
def test_scores_are_the_attention_s_own(family, images):
    model = build(family)
    seen, inputs = [], []
    patch(model, num_tokens={1: 8}, pooling=Spy, kept=seen, cluster_on="keys")
    block = model.blocks[1]
    handle = block.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(images)
    handle.remove()
    attention = block.attn
    qkv = attention.qkv(block.norm1(inputs[0])).reshape(2, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    expected = ((q * attention.scale) @ k.transpose(2, 3)).softmax(-1).mean((1, 2))
    ((_, scores, features),) = seen
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(features, k.mean(1))


@torch.no_grad()
def test_prefix_tokens_pass_unchanged(images):
    model, plain = build("dinov2-registers"), build("dinov2-registers")
    patch(model, num_tokens={3: 4}, position="block")
    model.norm = plain.norm = nn.Identity()
    ours, theirs = model.forward_features(images), plain.forward_features(images)
    assert ours.shape[1] == 9 and torch.equal(ours[:, :5], theirs[:, :5])


@torch.no_grad()
def test_attention_stays_fused(family, images):
    model = build(family)
    assert model.blocks[0].attn.fused_attn
    patch(model, num_tokens={1: 10, 2: 5}, track_size=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(images)
    ops = {event.name for event in profile.events()}
    assert "aten::scaled_dot_product_attention" in ops and not any("softmax" in op for op in ops), ops


@torch.no_grad()
def test_size_bias_fused_equals_unfused(images):
    model = patch(build("vit"), num_tokens={1: 10, 2: 5}, track_size=True, weighted=False)
    fused = model(images)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images), fused, rtol=1e-3, atol=1e-3)


def test_training_with_drop_path_and_checkpointing(images):
    model = patch(build("dinov2-registers", drop_path_rate=0.2).train(), num_tokens={1: 10, 2: 5})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = torch.tensor([1, 3])
    losses = []
    for step in range(15):
        model.set_grad_checkpointing(step % 2 == 1)
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(losses[-3:]) < sum(losses[:3])


@torch.no_grad()
def test_compile_fullgraph(images):
    model = patch(build("dinov2-registers"), num_tokens={1: 10, 2: 5}, track_size=True)
    expected = model(images)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)


@torch.no_grad()
def test_masks_follow_the_tokens(images):
    """Keys that nobody sees: whatever they hold, the other tokens do not change."""
    model = build("vit")
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[:, :, :, 13:] = False
    try:
        model.forward_features(images, attn_mask=mask)
    except TypeError:
        pytest.skip("this timm has no attention masks")
    patch(model, num_tokens={1: 8, 2: 5}, outside="full")
    other = images.clone()
    other[:, :, 48:, :] = 7.0  # the patches 12 to 15, tokens 13 to 16
    ours, theirs = (model.forward_features(x, attn_mask=mask)[:, :13] for x in (images, other))
    torch.testing.assert_close(ours, theirs)


def test_unknown_models_are_named():
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    with pytest.raises(TypeError, match="SwinTransformer"):
        patch(swin, keep_ratio=0.5)


MAPS = dict(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_feature_maps_stay_whole(registers, images):
    plain = timm.create_model("vit_base_patch16_224", reg_tokens=registers, **MAPS).eval()
    model = vit.patch(copy.deepcopy(plain), keep_ratio=0.5, layers=[1, 2, 3], position="block")
    maps, wanted = model.forward_intermediates(images)[1], plain.forward_intermediates(images)[1]
    assert [m.shape for m in maps] == [m.shape for m in wanted] and torch.equal(maps[0], wanted[0])
    for i, count in ((1, 32), (2, 16), (3, 8)):
        assert all(len(image.flatten(1).T.unique(dim=0)) == count for image in maps[i]), "one token for each cluster"
    for call in (
        lambda m: m.forward_intermediates(images, [-3], output_fmt="NLC", intermediates_only=True),
        lambda m: m.forward_intermediates(images, indices=2, stop_early=True)[1],
        lambda m: m.get_intermediate_layers(images, n=2, reshape=True),
        lambda m: [m(images)],
    ):
        assert [m.shape for m in call(model)] == [m.shape for m in call(plain)]
        assert all(torch.equal(a, b) for a, b in zip(call(model), call(copy.deepcopy(model))))
    for kept in (dict(keep_ratio=1.0), dict(num_tokens={1: 64})):
        ours = vit.patch(model, **kept).forward_intermediates(images)[1]
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted))
    extractor = timm.create_model("vit_base_patch16_224", features_only=True, **MAPS).eval()
    shapes = [m.shape for m in extractor(images)]
    assert [m.shape for m in vit.patch(extractor, keep_ratio=0.5)(images)] == shapes


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["kmeans", "score", "bipartite"])
def test_record(family, pooling, images):
    model, prefix = patch(build(family), num_tokens={1: 10, 2: 5}, pooling=pooling, track_size=True), MODELS[family][0]
    expected = model.forward_features(images)
    with record(model) as r:
        tokens = model.forward_features(images)
    assert torch.equal(tokens, expected) and r.num_prefix_tokens == prefix and r.assignment.shape == (2, 16)
    assert all(set(labels.tolist()) - {-1} == set(range(5)) for labels in r.assignment)
    dense = unpool(tokens[:, prefix:], r.assignment)
    dropped = r.assignment < 0
    assert bool(dropped.any()) == (pooling == "score") and not dense[dropped].any()


class Wrapped(nn.Module):
    """A projection inside something that does not tell its width, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@torch.no_grad()
def test_wrapped_projections(family, images):
    model, plain = build(family), build(family)
    for block in model.blocks:
        block.attn.qkv = Wrapped(block.attn.qkv)
    assert torch.equal(patch(model, num_tokens={1: 6})(images), patch(plain, num_tokens={1: 6})(images))


@torch.no_grad()
def test_compiled_models_can_be_patched(images):
    model = build("vit")
    expected = patch(build("vit"), num_tokens={1: 6})(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(images)
    assert patch(compiled, num_tokens={1: 6}) is compiled and tokens_per_layer(compiled) == [17, 7, 7, 7]
    torch.testing.assert_close(compiled(images), expected)
    unpatch(compiled)
    torch.testing.assert_close(compiled(images), plain)
    assert not patching.patches(model)


@torch.no_grad()
def test_hooks_do_not_see_the_probe(images):
    model, seen = build("vit"), []
    model.blocks[1].attn.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    model.blocks[1].attn.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    patch(model, num_tokens={1: 6})
    assert not seen
    model(images)
    assert seen == [17, 17]


@torch.no_grad()
def test_tracing_is_refused_and_export_works(images):
    model = patch(build("dinov2-registers"), num_tokens={1: 6})
    with pytest.raises(RuntimeError, match="torch.jit.trace.*torch.export.export"):
        torch.jit.trace(model, images)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))


@torch.no_grad()
def test_prefix_as_long_as_the_tokens(images):
    model = patch(build("vit"), keep_ratio=0.5, num_prefix_tokens=1000)
    with pytest.raises(ValueError, match="num_prefix_tokens = 1000 .* only 17 tokens"):
        model(images)
