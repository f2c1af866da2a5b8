"""opcheck on every op, fake kernels, torch.compile without graph breaks (contract 7)."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_identical, positive_weights, spread_indices, tokens
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tokenpool_ext as tp
from tokenpool_ext.ops import SCHEMAS as OPS

pytestmark = pytest.mark.one_path

CPU_OPS = pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no compiled ops: {tp.backends()['cpu']}")


def samples(name, dtype=torch.float32, device="cpu"):
    """Argument lists for torch.ops.tokenpool_ext.<name>."""
    B, N, D, K = 2, 10, 3, 4
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, w, init = tokens(B, N, D, dtype, device), positive_weights(B, N, acc, device), spread_indices(B, N, K, device)
    mask = torch.arange(N, device=device) < torch.tensor([[10], [6]], device=device)
    counts = torch.tensor([4, 2], device=device)
    a = torch.arange(N, device=device).expand(B, N).contiguous() % K
    if name in ("kmeans", "kmedoids"):
        yield x, None, None, None, init, K, 3, False
        yield x, w, mask, counts, init, K, 3, True
        yield x.transpose(0, 1).contiguous().transpose(0, 1), w, None, None, init, K, 1, False
        yield x[:0], None, None, None, init[:0], K, 3, False
        if name == "kmeans":
            yield x, w, None, None, x[:, :K].to(acc).contiguous(), K, 3, False
    elif name == "assign":
        yield x, x[:, 1:K].to(acc), None
        yield x, x[:, :K].to(acc).contiguous(), mask
        yield x[:0], x[:0, :K].to(acc), None
    elif name == "pool":
        yield x, a, None, K
        yield x, a, w, K
        yield x[:, :0], a[:, :0], None, K
    elif name == "pool_backward":
        for weights in (None, w):
            centers, mass = torch.ops.tokenpool_ext.pool(x, a, weights, K)
            yield centers, x, centers, a, weights, mass
    elif name == "unpool":
        yield x[:, :K], a
        yield x[:0, :K], a[:0]
    elif name == "unpool_backward":
        yield x, a, K
    else:
        q = x.reshape(B, 1, N, D).contiguous()
        yield q, q, 0.5, None
        yield q, q[:, :, :6], 0.5, torch.zeros(B, 1, N, dtype=acc, device=device)


def meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@CPU_OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype):
    """Schema (no hidden mutation or aliasing), fake kernel against the real one, dynamic shapes."""
    op = getattr(torch.ops.tokenpool_ext, name)
    for arguments in samples(name, dtype):
        tests = ["test_schema", "test_faketensor"]
        if dtype == torch.float32 and len(arguments[0]):
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op.default, arguments, test_utils=tests)


@CPU_OPS
@pytest.mark.parametrize("name", OPS)
def test_backends_agree_on_the_schemas(name):
    """What csrc/ops.cpp defines is what ops.py says, argument for argument."""
    for namespace in (torch.ops.tokenpool_ext, torch.ops.tokenpool_ext_triton):
        schema = getattr(namespace, name).default._schema
        assert str(schema).split("::")[1].replace(" -> ", "->") == (name + OPS[name]).replace(" -> ", "->")


@CPU_OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS)
def test_fake_kernels_agree_with_real_ones(name, dtype):
    """Shape, dtype and strides of every output on the meta device."""
    op = getattr(torch.ops.tokenpool_ext, name)
    for arguments in samples(name, dtype):
        real, fake = op(*arguments), op(*map(meta, arguments))
        real, fake = (
            (real,) if isinstance(real, torch.Tensor) else real,
            (fake,) if isinstance(fake, torch.Tensor) else fake,
        )
        assert len(real) == len(fake)
        for r, f in zip(real, fake):
            assert f.device.type == "meta" and (r.shape, r.dtype) == (f.shape, f.dtype)
            assert r.numel() == 0 or r.stride() == f.stride()


@CPU_OPS
def test_ops_refuse_what_would_read_out_of_bounds():
    """The ops repeat the memory-safety checks for callers who skip the functional layer."""
    x, init = tokens(2, 10, 3), spread_indices(2, 10, 4)
    op = torch.ops.tokenpool_ext
    a = torch.zeros(2, 10, dtype=torch.int64)
    bad = [
        lambda: op.assign(x, x[:, :3, :2].contiguous(), None),
        lambda: op.assign(x, x[:1, :3].contiguous(), None),
        lambda: op.assign(x, x[:, :0].contiguous(), None),
        lambda: op.assign(x, x[:, :3].double(), None),
        lambda: op.assign(x, x[:, :3], torch.ones(2, 9, dtype=torch.bool)),
        lambda: op.kmeans(x, torch.ones(2, 9), None, None, init, 4, 3, False),
        lambda: op.kmeans(x, None, torch.ones(2, 9, dtype=torch.bool), None, init, 4, 3, False),
        lambda: op.kmeans(x, None, None, torch.ones(3, dtype=torch.int64), init, 4, 3, False),
        lambda: op.kmeans(x, None, None, None, init[:, :3], 4, 3, False),
        lambda: op.kmeans(x, None, None, None, x[:, :3].contiguous(), 4, 3, False),
        lambda: op.kmedoids(x, None, None, None, init[:1], 4, 3, False),
        lambda: op.kmeans(x[0], None, None, None, init, 4, 3, False),
        lambda: op.pool(x, a[:, :9], None, 4),
        lambda: op.pool(x, a, torch.ones(2, 9), 4),
        lambda: op.unpool(x, a[:1]),
        lambda: op.unpool_backward(x, a[:, :3], 4),
        lambda: op.attention_received(x[None], x[None, :, :, :2], 1.0, None),
    ]
    for call in bad:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            call()
    # indices out of range are clamped, never followed
    got = op.kmeans(x, None, None, None, torch.full_like(init, 2**40), 4, 3, False)
    assert ((got[1] >= 0) & (got[1] < 4)).all()
    got = op.kmedoids(x, None, None, torch.tensor([7, -3]), -torch.full_like(init, 2**40), 4, 3, False)
    assert ((got[1] >= -1) & (got[1] < 4)).all()


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_clustering_compiles_without_graph_breaks(backend, algorithm, gradients):
    reference = backend.name == "reference"
    if reference and not gradients:
        pytest.skip("the reference's graphs are long, and that with gradients holds this one")

    def function(x, w):
        c = getattr(tp, algorithm)(x * 1.0, 4, weights=w, num_iters=2, backend=backend.name)
        return c.centers, c.assignment, c.mass, c.inertia, tp.unpool(c.centers, c.assignment, backend=backend.name)

    w = positive_weights(2, 12, device=backend.device)
    a, b = (tokens(2, 12, 3, device=backend.device).requires_grad_(gradients) for _ in range(2))
    dynamic = not (reference and algorithm == "kmeans")  # whose steps are K-Medoids'; symbols take three times as long
    want, got = function(a, w), compiled(function, dynamic=dynamic, backend="aot_eager")(b, w)
    assert_identical(want, got)
    if gradients:
        (want[-1] - a).square().sum().backward()
        (got[-1] - b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_pool_and_attention_compile(backend):
    def function(x, a, w):
        q = x[:, None]
        return tp.pool(x, a, 4, weights=w, backend=backend.name), tp.attention_received(q, q, backend=backend.name)

    x, w = tokens(2, 12, 3, device=backend.device), positive_weights(2, 12, device=backend.device)
    a = torch.arange(12, device=backend.device).expand(2, 12) % 4
    assert_identical(function(x, a, w), compiled(function, dynamic=True, backend="aot_eager")(x, a, w))


def test_five_resolutions_and_three_batch_sizes_need_two_compilations(backend):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    function = compiled(
        lambda x: tp.kmeans(x, x.shape[1] // 2, num_iters=2, backend=backend.name).centers,
        dynamic=True,
        backend=counter,
    )
    for n in (10, 16, 21, 28, 37):
        for b in (2, 3) if backend.interpreted else (2, 3, 5):
            assert function(tokens(b, n, 4, device=backend.device)).shape == (b, n // 2, 4)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


@pytest.mark.kernels  # the reference: a long graph of library calls, a minute of C++ compilation for nothing of ours
@pytest.mark.large
def test_inductor(backend):
    """The default compiler, once."""

    def function(x):
        return tp.kmeans(x + 1, 4, num_iters=2, backend=backend.name).centers.tanh()

    x = tokens(2, 12, 3, device=backend.device)
    torch.testing.assert_close(function(x), compiled(function, dynamic=True)(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*deprecated")
@pytest.mark.parametrize(
    "how", ["jit", "real", "fake", "symbolic", "real, before dispatch", "symbolic, before dispatch"]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["strided", "topk"])
def test_a_trace_makes_its_own_start(how, weighted):
    """What eager calls write past torch's ops must not be lost where the ops are recorded."""
    (x, other), (w, v) = tokens(4, 40, 8).split(2), positive_weights(4, 40).split(2)

    def pooled(x, w):
        found = tp.kmeans(x, 7, weights=w if weighted else None)
        return tp.unpool(tp.pool(x, found.assignment, 7, weights=w), found.assignment)

    mode, _, early = how.partition(", ")
    traced = (
        torch.jit.trace(pooled, (x, w))
        if how == "jit"
        else make_fx(pooled, tracing_mode=mode, pre_dispatch=bool(early))(x, w)
    )
    del_me = [torch.full((2, 7), 10**6) for _ in range(20)]  # what uninitialised memory would hold
    del del_me
    assert_identical(traced(other, v), pooled(other, v))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export_with_any_number_of_tokens(strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            return tp.kmeans(x, 4).centers

    sizes = {0: torch.export.Dim("B", min=1, max=50), 1: torch.export.Dim("N", min=8, max=500)}
    program = torch.export.export(Model(), (tokens(2, 16, 4),), dynamic_shapes={"x": sizes}, strict=strict)
    for b, n in ((2, 16), (1, 8), (3, 101)):
        assert_identical(program.module()(tokens(b, n, 4)), Model()(tokens(b, n, 4)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "kept", [{"keep_ratio": 0.5}, {"keep_ratio": 0.3}, {"num_tokens": -3}, {"num_tokens": 4}], ids=str
)
def test_layers_export_with_any_number_of_tokens(kept, masked):
    layers = [
        tp.TokenPooling(**kept, return_clusters=True),
        tp.TokenPooling(**kept, algorithm="kmedoids"),
        tp.ScorePruning(**kept),
    ]

    class Model(torch.nn.Module):
        def forward(self, x, w, mask):
            return [layer(x, w, sizes=w, mask=mask if masked else None) for layer in layers]

    def inputs(n):
        return tokens(2, n, 4), positive_weights(2, n), torch.arange(n).expand(2, n) < torch.tensor([[n], [n // 2]])

    sizes = {1: torch.export.Dim("N", min=8, max=500)}
    program = torch.export.export(Model(), inputs(16), dynamic_shapes=(sizes, sizes, sizes), strict=masked)
    for n in (9, 16, 50):
        for got, want in zip(tree_leaves(program.module()(*inputs(n))), tree_leaves(Model()(*inputs(n)))):
            assert torch.equal(got, want)


def test_weighted_export_with_any_batch():
    """A start made at once for small batches only must not become a bound of the batch."""

    class Model(torch.nn.Module):
        def forward(self, x, w):
            return tp.kmeans(x, 4, weights=w).centers

    sizes = {"x": {0: torch.export.Dim("B")}, "w": {0: torch.export.Dim("B")}}
    program = torch.export.export(Model(), (tokens(2, 64, 2), positive_weights(2, 64)), dynamic_shapes=sizes)
    many = tokens(700, 64, 2), positive_weights(700, 64)
    assert_identical(program.module()(*many), Model()(*many))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: tp.BipartiteMatching(7)(x),
        lambda x: tp.BipartiteMatching(7, sort=False)(x),
        lambda x: tp.GridPooling(7)(x),
        lambda x: tp.TokenPooling(7, init="bipartite")(x),
        lambda x: tp.TokenPooling(7, position_weight=0.5)(x, positions=x[..., :2]),
        lambda x: tp.kmeans(x, 7, backend="reference").centers,
        lambda x: tp.kmedoids(x, 7, sort=True, backend="reference").centers,
        lambda x: tp.pool(x, tp.assign(x, x[:, :7]), 7, backend="reference"),
    ],
)
def test_layers_and_the_reference_export_with_any_batch(call):
    """`len` of a tensor is a number, not a symbol: the batch became the example's."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return call(x)

    sizes = {"x": {0: torch.export.Dim("B", min=1, max=50)}}
    program = torch.export.export(Model(), (tokens(3, 12, 4),), dynamic_shapes=sizes, strict=False)
    for b in (1, 3, 8):
        assert torch.equal(program.module()(tokens(b, 12, 4)), call(tokens(b, 12, 4)))


def test_fake_tensors_outside_their_mode_have_no_labels_to_look_at():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    x, labels = mode.from_tensor(tokens(2, 8, 3)), mode.from_tensor(torch.zeros(2, 8, dtype=torch.int64))
    assert tp.pool(x, labels, 4).shape == (2, 4, 3) and tp.unpool(x, labels).shape == (2, 8, 3)


def test_other_dispatch_modes_keep_every_check():
    """A FLOP counter or selective checkpointing sees the ops, with their values."""
    x = tokens(2, 16, 4)
    want = tp.kmeans(x, 4, weights=torch.ones(2, 16))
    with FlopCounterMode(display=False):
        assert_identical(want, tp.kmeans(x, 4, weights=torch.ones(2, 16)))
        with pytest.raises(ValueError, match="weights must be >= 0"):
            tp.kmeans(x, 4, weights=-torch.ones(2, 16))
        with pytest.raises(ValueError, match="token indices from 0"):
            tp.kmeans(x, 2, init=torch.tensor([[1, 16], [0, 1]]))
