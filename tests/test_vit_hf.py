"""patch/unpatch on Hugging Face models with random weights: counts, bit-equality, scores, threads, copies, compile."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers import tiny_vit as build
from torch import nn
from torch.nn.utils import prune

from tokenpool_ext import vit
from tokenpool_ext.modules import TokenPooling
from tokenpool_ext.vit import finding, patched_blocks, patching, schedule, tokens_per_layer, unpatch
from tokenpool_ext.vit.pooled import PLACE, PooledBlock
from tokenpool_ext.vit.tap import significance

transformers = pytest.importorskip("transformers")

PATCHES = 16


def patch(model, **options):
    """The pooled tokens themselves, fewer; tests/test_vit_any.py looks at the default, as many as before."""
    return vit.patch(model, **{"outside": "short", **options})


pytestmark = pytest.mark.usefixtures("one_thread")


PREFIX = {"dinov2": 1, "dinov2-registers": 5, "vit": 1, "deit": 2}


@pytest.fixture(params=PREFIX)
def family(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def widths(model, x, **kw):
    """Tokens after the embedding and after each block."""
    return [h.shape[1] for h in model(x, output_hidden_states=True, **kw).hidden_states]


@torch.no_grad()
def test_counts_and_unpatch(family, images):
    model, p = build(family), PREFIX[family]
    plain = model(images).logits
    keys = set(model.state_dict())
    assert patch(model, num_tokens={1: 10, 2: 5}) is model
    assert widths(model, images) == [p + n for n in (16, 16, 10, 5, 5)]
    assert tokens_per_layer(model) == [p + n for n in (16, 10, 5, 5)]
    pooled = model(images).logits
    assert not torch.equal(pooled, plain) and torch.isfinite(pooled).all()
    assert set(model.state_dict()) == keys
    assert list(patched_blocks(model)) == [1, 2] and "TokenPooling(num_tokens=10" in repr(model)
    assert torch.equal(patch(model, num_tokens={1: 10, 2: 5})(images).logits, pooled), "patching twice is patching once"
    assert widths(patch(model, keep_ratio=0.5), images) == [p + n for n in (16, 16, 8, 4, 2)]
    assert unpatch(model) is model and not patched_blocks(model)
    assert torch.equal(model(images).logits, plain) and widths(model, images) == [p + 16] * 5
    assert not any(isinstance(m, PooledBlock) or PLACE in m.__dict__ for m in model.modules())
    assert unpatch(model) is model, "a second time: nothing to do"


@torch.no_grad()
@pytest.mark.parametrize("pooling", list(patching.POOLINGS))
@pytest.mark.parametrize("track_size", [False, True])
def test_every_pooling(pooling, track_size, images):
    model = build("dinov2")
    plain = model(images).logits
    for position in ("attention", "block"):
        patch(model, num_tokens={0: 9, 2: 3}, pooling=pooling, position=position, track_size=track_size)
        assert widths(model, images) == [17, 10, 10, 4, 4]
        assert torch.isfinite(model(images).logits).all()
    patch(model, num_tokens={0: 100, 2: 16}, pooling=pooling, track_size=track_size)
    assert torch.equal(model(images).logits, plain), "nothing to reduce: bit-equal"
    assert torch.equal(patch(model, keep_ratio=1.0, pooling=pooling, track_size=track_size)(images).logits, plain)


@torch.no_grad()
def test_keep_all_is_bit_equal_in_every_family(family, images):
    model = build(family)
    plain = model(images).logits
    assert torch.equal(patch(model, keep_ratio=1.0)(images).logits, plain)
    assert torch.equal(patch(model, num_tokens=[16] * 4, position="block", cluster_on="keys")(images).logits, plain)


class Spy(nn.Module):
    """Keeps what it was given and changes nothing."""

    def __init__(self, num_tokens=None, keep_ratio=None, num_prefix_tokens=1, kept=None):
        super().__init__()
        self.kept = kept

    def forward(self, x, scores=None, *, features=None, mask=None, sizes=None):
        self.kept.append((x, scores, features))
        return x


@torch.no_grad()
def test_scores_and_keys_are_the_attention_s_own(family, images):
    model = build(family, attn_implementation="eager")
    seen = []
    patch(model, num_tokens={1: 8}, pooling=Spy, kept=seen, cluster_on="keys")
    out = model(images, output_attentions=True, output_hidden_states=True)
    ((tokens, scores, features),) = seen
    attention = out.attentions[1]
    torch.testing.assert_close(scores, attention.mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    assert scores.std() > 1e-3, "the test would prove nothing on uniform attention"
    block = patching.patches(model)[0][0]
    project = next(m for n, m in block.named_modules() if n.split(".")[-1] in ("k_proj", "key"))
    norm = block.norm1 if hasattr(block, "norm1") else block.layernorm_before
    keys = project(norm(out.hidden_states[1]))
    torch.testing.assert_close(features, keys.unflatten(-1, (4, 8)).mean(2))
    fused = build(family)
    seen_fused = []
    patch(fused, num_tokens={1: 8}, pooling=Spy, kept=seen_fused)
    fused(images)
    torch.testing.assert_close(seen_fused[0][1], scores, rtol=1e-4, atol=1e-6)
    assert seen_fused[0][2] is None and tokens.shape == seen_fused[0][0].shape


@torch.no_grad()
def test_prefix_tokens_pass_unchanged(images):
    model, plain = build("dinov2-registers"), build("dinov2-registers")
    patch(model, num_tokens={1: 4}, position="block")
    ours = model(images, output_hidden_states=True).hidden_states
    theirs = plain(images, output_hidden_states=True).hidden_states
    assert torch.equal(ours[2][:, :5], theirs[2][:, :5]) and ours[2].shape[1] == 9


@torch.no_grad()
def test_projections_run_once_and_attention_stays_fused(family, images):
    model = build(family)
    calls = {"linear": 0}

    def count(module, args, output):
        calls["linear"] += 1

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(images)
    before = calls["linear"]
    patch(model, num_tokens={1: 10, 2: 5}, cluster_on="keys", backend="reference")
    calls["linear"] = 0
    model(images)
    assert calls["linear"] == before, "queries and keys are not projected twice"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(images)
    ops = {event.name for event in profile.events()}
    assert "aten::scaled_dot_product_attention" in ops and not any("softmax" in op for op in ops), ops


@torch.no_grad()
def test_proportional_attention_counts_duplicates():
    """With sizes, a merged token must act like its copies: pool exact duplicates and compare with the full model."""
    model = build("dinov2")
    layers = model.dinov2.encoder.layer
    patches = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4])
    x = torch.cat([torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(4)), patches[:, owner]], 1)
    full = x
    for layer in layers:
        full = layer(full)
    for kind in ("kmeans", "kmedoids"):
        options = dict(weighted=False, init="farthest") if kind == "kmeans" else dict(init="farthest")
        patch(model, num_tokens={0: 5}, pooling=kind, track_size=True, **options)
        pooled = x
        for layer in layers:
            pooled = layer(pooled)
        torch.testing.assert_close(pooled[:, 0], full[:, 0], rtol=1e-4, atol=1e-4)
        unsized = x
        for layer in patch(model, num_tokens={0: 5}, pooling=kind, track_size=False, **options).dinov2.encoder.layer:
            unsized = layer(unsized)
        assert (unsized[:, 0] - full[:, 0]).abs().max() > 1e-2


@torch.no_grad()
def test_size_bias_fused_equals_eager(family, images):
    logits = []
    for implementation in ("sdpa", "eager"):
        model = build(family, attn_implementation=implementation)
        patch(model, num_tokens={1: 10, 2: 5}, track_size=True, weighted=False, init="strided")
        logits.append(model(images).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_scores_with_sizes_are_those_of_the_copies():
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 3, 4, 8, generator=generator) for _ in range(2))
    owner = torch.tensor([0, 0, 0, 1, 2, 3, 3])
    sizes = torch.tensor([[3.0, 1, 1, 2]]).expand(2, 4)
    attention = ((q @ k[:, :, owner].transpose(2, 3)) * 0.3).softmax(-1).mean((1, 2))
    expected = torch.zeros(2, 4).index_add(1, owner, attention)
    torch.testing.assert_close(significance(q, k, 0.3, sizes.log()[:, None, None]), expected)


def test_gradients_reach_every_weight(family, images):
    model = patch(build(family).train(), num_tokens={1: 6, 2: 3})
    model(images).logits.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert all("mask_token" in n or "pooler" in n for n in silent), silent


def test_gradient_checkpointing_gives_the_same_gradients(images):
    grads = []
    for checkpointing in (False, True):
        model = patch(build("dinov2").train(), num_tokens={1: 6})
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(images).logits.square().sum().backward()
        grads.append(model.dinov2.encoder.layer[1].attention.v_proj.weight.grad)
    assert torch.equal(*grads)


@torch.no_grad()
def test_deepcopy_and_pickle(images):
    model = patch(build("vit"), num_tokens={1: 6}, track_size=True)
    expected = model(images).logits
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, loaded):
        assert torch.equal(other(images).logits, expected)
        blocks = set(other.modules())
        assert all(block in blocks for block, _ in patching.patches(other)), "a copy must not run the original's blocks"
    unpatch(model)
    assert widths(twin, images) == [17, 17, 7, 7, 7] and widths(model, images) == [17] * 5


@torch.no_grad()
def test_two_threads_one_model(images):
    model = patch(build("dinov2"), num_tokens={1: 6, 2: 4}, cluster_on="keys", track_size=True)
    inputs = [images, torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(9))]
    expected = [model(x).logits for x in inputs]
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    wrong = []

    def work(which):
        with torch.no_grad():
            for _ in range(8):
                if not torch.equal(model(inputs[which]).logits, expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    assert before == {n: set(m.__dict__) for n, m in model.named_modules()}, "nothing is left on the model"


@torch.no_grad()
@pytest.mark.parametrize("track_size", [False, True])
def test_compile_fullgraph(track_size, images):
    model = patch(build("dinov2"), num_tokens={1: 10, 2: 5}, track_size=track_size)
    expected = model(images).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager" if track_size else "aot_eager")
    torch.testing.assert_close(compiled(images).logits, expected)


@torch.no_grad()
def test_compile_dynamic_batch(images):
    model = patch(build("vit"), num_tokens={1: 10, 2: 5})
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 56, 56)
        torch.testing.assert_close(compiled(x).logits, model(x).logits)
    assert counter.frame_count == 1


@torch.no_grad()
def test_autocast_and_half(images):
    model = patch(build("dinov2"), num_tokens={1: 6}, track_size=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert widths(model, images) == [17, 17, 7, 7, 7]
    model = model.bfloat16()
    assert model(images.bfloat16()).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_parts_replaced_after_patching_are_used(images):
    model = patch(build("vit"), num_tokens={1: 6})
    other = build("vit")
    for module in (model, other):
        block = (module.vit.layers if hasattr(module.vit, "layers") else module.vit.encoder.layer)[1]
        torch.manual_seed(7)
        block.layernorm_before = nn.LayerNorm(32).requires_grad_(False)
        block.layernorm_before.weight.uniform_(0.5, 2)
        block.attention.q_proj = nn.Linear(32, 32)
    patch(other, num_tokens={1: 6})
    assert torch.equal(model(images).logits, other(images).logits)


def test_wrong_arguments():
    model = build("dinov2")
    cases = [
        (dict(keep_ratio=0.5, r=2), ValueError, "exactly one of num_tokens, keep_ratio, r and budget"),
        (dict(r=0), ValueError, "r must be from 1"),
        (dict(r=0.5), TypeError, "r must be an int"),
        (dict(num_tokens={-5: 4}), ValueError, "from 0 to 3"),
        (dict(num_tokens={-1: 4, 3: 4}), ValueError, "twice"),
        (dict(keep_ratio=0.5, outside="none"), ValueError, "outside"),
        (dict(keep_ratio=0.5, protect=0.5), TypeError, "protect"),
        (dict(keep_ratio=0.5, blocks="encoder"), ValueError, "blocks"),
        (dict(num_tokens={1: 4}, keep_ratio=0.5), ValueError, "exactly one"),
        (dict(num_tokens={4: 4}), ValueError, "from 0 to 3"),
        (dict(num_tokens={}), ValueError, "at least one block"),
        (dict(num_tokens={1: 4, 2: 8}), ValueError, "not rise"),
        (dict(num_tokens={1: 0}), ValueError, "at least 1 token"),
        (dict(num_tokens={1: 1.5}), ValueError, "ratio"),
        (dict(num_tokens={"1": 4}), TypeError, "block indices"),
        (dict(num_tokens=12), TypeError, "block: count"),
        (dict(num_tokens=[16, 8]), ValueError, "one count per block"),
        (dict(keep_ratio=1.5), ValueError, "keep_ratio"),
        (dict(keep_ratio=0.5, layers=[9]), ValueError, "9"),
        (dict(keep_ratio=0.5, layers=[]), ValueError, "layers"),
        (dict(keep_ratio=0.5, layers=2), TypeError, "layers must be block indices like [3, 6, 9], got 2"),
        (dict(keep_ratio=0.5, layers=[True]), TypeError, "got True among them"),
        (dict(keep_ratio=0.5, layers=[0.5]), TypeError, "got 0.5 among them"),
        (dict(keep_ratio=True), ValueError, "keep_ratio"),
        (dict(num_tokens={1: True}), TypeError, "block 1 needs an int"),
        (dict(num_tokens={True: 4}), TypeError, "block indices"),
        (dict(num_tokens=np.array(4)), TypeError, "block: count"),
        (dict(num_tokens=np.ones((4, 1), int)), TypeError, "block 0 needs an int"),
        (dict(num_tokens="8888"), TypeError, "block: count"),
        (dict(num_tokens={1: 4}, layers=[1]), ValueError, "layers goes with keep_ratio"),
        (dict(keep_ratio=0.5, pooling="mean"), ValueError, "'bipartite'"),
        (dict(keep_ratio=0.5, pooling=3), TypeError, "pooling"),
        (dict(keep_ratio=0.5, pooling=lambda **kw: 3), TypeError, "nn.Module"),
        (dict(keep_ratio=0.5, position="mlp"), ValueError, "position"),
        (dict(keep_ratio=0.5, cluster_on="values"), ValueError, "cluster_on"),
        (dict(keep_ratio=0.5, track_size=1), TypeError, "track_size"),
        (dict(keep_ratio=0.5, iterations=3), TypeError, "'iterations'"),
        (dict(keep_ratio=0.5, pooling="grid", num_iters=3), TypeError, "takes backend, grid_size"),
        (dict(keep_ratio=0.5, return_clusters=True), TypeError, "'return_clusters'"),
        (dict(keep_ratio=0.5, num_iters=0), ValueError, "num_iters"),
        (dict(keep_ratio=0.5, num_prefix_tokens=-1), ValueError, "num_prefix_tokens"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error) as caught:
            patch(model, **arguments)
        assert words in str(caught.value), (arguments, str(caught.value))
        assert not patching.patches(model), "a refused patch changes nothing"


def test_numbers_of_numpy_and_any_iterable():
    model = build("dinov2")

    def counts(**schedule):
        return tokens_per_layer(patch(model, **schedule))

    assert counts(num_tokens={np.int64(1): np.int32(10), 2: np.float32(0.5)}) == [17, 11, 6, 6]
    assert counts(num_tokens=np.array([16, 9, 9, 4])) == counts(num_tokens=(16, 9, 9, 4)) == [17, 10, 10, 5]
    assert patched_blocks(model)[1].num_tokens == 9 and type(patched_blocks(model)[1].num_tokens) is int
    assert counts(num_tokens=range(16, 8, -2)) == [17, 15, 13, 11]
    assert counts(keep_ratio=np.float32(0.7), layers=(i for i in (0, 2))) == counts(keep_ratio=0.7, layers=[0, 2])
    assert counts(keep_ratio=1, layers=np.arange(2)) == [17] * 4
    assert schedule.tokens_after(2, 16, {0: np.int64(8), 1: np.float64(0.5)}) == [8, 4]
    assert schedule.geometric(np.int64(2), np.int64(16), np.int64(4), layers=np.arange(2)) == {0: 8, 1: 4}


def test_failed_repatch_keeps_the_old_patch(images):
    model = patch(build("vit"), num_tokens={1: 6})
    with pytest.raises(ValueError):
        patch(model, num_tokens={9: 6})
    assert list(patched_blocks(model)) == [1]


def test_unknown_models_are_named():
    with pytest.raises(TypeError, match="Sequential"):
        patch(nn.Sequential(nn.Linear(2, 2)), keep_ratio=0.5)
    with pytest.raises(TypeError, match="must be an nn.Module, got str"):
        patch("vit", keep_ratio=0.5)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        unpatch(3)
    two = nn.ModuleList([build("vit"), build("dinov2")])
    with pytest.raises(ValueError, match=r"2 \('0.vit.layers', '1.dinov2.encoder.layer'\); name one with blocks="):
        patch(two, keep_ratio=0.5)
    assert list(patched_blocks(patch(two, num_tokens={1: 4}, blocks=two[1].dinov2.encoder.layer)[1])) == [1]


def test_blocks_that_compute_something_else_are_refused():
    model = build("vit")
    block = finding.find_blocks(model).blocks[1]

    class Odd(type(block)):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * torch.arange(hidden_states.shape[1])[:, None]

    block.__class__ = Odd
    for other in finding.find_blocks(model, "vit.layers").blocks:
        other.__class__ = Odd
    with pytest.raises(TypeError, match="Odd is not supported: its output does not follow its tokens"):
        patch(model, num_tokens={1: 6})

    class Twice(Odd):
        def forward(self, hidden_states, *args, **kwargs):
            return 2 * super(Odd, self).forward(hidden_states, *args, **kwargs)

    for other in finding.find_blocks(model, "vit.layers").blocks:
        other.__class__ = Twice
    with pytest.raises(ValueError, match="Twice cannot pool between attention and MLP: its forward computes something"):
        patch(model, num_tokens={1: 6}, position="attention")
    assert patching.patches(patch(model, num_tokens={1: 6}))[0][1].setup.position == "block"
    other = build("vit")
    finding.find_blocks(other).blocks[0].forward = lambda x: x
    with pytest.raises(ValueError, match="something else"):
        patch(other, num_tokens={0: 6})


def test_mask_and_probe_leave_things_alone(images):
    model = build("vit").train()
    state = torch.get_rng_state()
    patch(model, num_tokens={1: 6})
    assert torch.equal(state, torch.get_rng_state()), "patching draws no random numbers"
    assert all(m.training for m in model.modules())


@torch.no_grad()
def test_export_without_the_user_s_mask(family, images):
    model = build(family)
    plain = model(images).logits
    patch(model, num_tokens={1: 10, 2: 5}, track_size=family == "dinov2")
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images).logits, model(images).logits)
    unpatch(model)
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_a_base_model_alone_exports(images, strict):
    base = patch(build("vit").base_model, keep_ratio=0.5, num_prefix_tokens=np.int64(1))
    exported = torch.export.export(base, (images,), strict=strict).module()
    torch.testing.assert_close(exported(images).last_hidden_state, base(images).last_hidden_state)


@torch.no_grad()
def test_weights_that_torch_s_own_hooks_make(images):
    model = build("vit")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            prune.l1_unstructured(module, "weight", 0.3)
    model.bfloat16()  # `weight` is stale until its hook runs
    assert patch(model, keep_ratio=0.5)(images.bfloat16()).logits.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["kmeans", "score", "grid"])
def test_prefix_as_long_as_the_tokens(pooling, images):
    model = patch(build("vit"), keep_ratio=0.5, num_prefix_tokens=1000, pooling=pooling)
    with pytest.raises(ValueError, match="num_prefix_tokens = 1000 .* only 17 tokens"):
        model(images)
    patch(model, keep_ratio=0.5, num_prefix_tokens=17, pooling=pooling, track_size=True)
    with pytest.raises(ValueError, match="num_prefix_tokens = 17"):
        model(images)
    assert widths(patch(model, num_tokens={1: 0.5}, num_prefix_tokens=16, pooling=pooling), images) == [17] * 5


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
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in ("q_proj", "k_proj", "query", "key"):
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, Wrapped(module))
    patch(model, num_tokens={1: 6}, cluster_on="keys")
    assert torch.equal(model(images).logits, patch(plain, num_tokens={1: 6}, cluster_on="keys")(images).logits)


@torch.no_grad()
def test_compiled_models_can_be_patched(images):
    model = build("vit")
    expected = patch(build("vit"), num_tokens={1: 6})(images).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(images).logits
    assert patch(compiled, num_tokens={1: 6}) is compiled
    assert list(patched_blocks(model)) == [1] and tokens_per_layer(compiled) == [17, 7, 7, 7]
    torch.testing.assert_close(compiled(images).logits, expected)
    unpatch(compiled)
    torch.testing.assert_close(compiled(images).logits, plain)
    assert not patching.patches(model)


@torch.no_grad()
def test_hooks_do_not_see_the_probe(images):
    model, seen = build("vit"), []
    block = finding.find_blocks(model).blocks[1]
    for module in (block, block.attention, block.layernorm_before):
        module.register_forward_hook(lambda m, args, out: seen.append("after"))
        module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    patch(model, num_tokens={1: 6})
    patch(model, num_tokens={1: 7})
    assert not seen
    model(images)
    assert sorted(seen) == ["after"] * 3 + ["before"] * 3
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in block.modules()]
    block.layernorm_before = nn.LayerNorm(16)
    with pytest.raises(TypeError, match="ViTLayer"):
        patch(model, num_tokens={1: 8})
    assert (
        sum(len(a) + len(b) for a, b in hooks)
        == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in block.modules()) + 2
    ), "they are back after a failure, too"


@torch.no_grad()
def test_tracing_is_refused_by_name(images):
    model = patch(build("vit"), num_tokens={1: 6})
    with pytest.raises(RuntimeError, match="torch.jit.trace.*torch.export.export"):
        torch.jit.trace(model, images, strict=False)


def test_own_module_as_pooling(images):
    made = []

    def factory(**arguments):
        made.append(arguments)
        return TokenPooling(**arguments, algorithm="kmedoids", weighted=False)

    model = patch(build("deit"), num_tokens={1: 0.5, 2: 3}, pooling=factory)
    assert made == [dict(keep_ratio=0.5, num_prefix_tokens=2), dict(num_tokens=3, num_prefix_tokens=2)]
    with torch.no_grad():
        assert widths(model, images) == [18, 18, 10, 5, 5]
