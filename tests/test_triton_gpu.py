"""What only a GPU can show of the Triton backend: the same bits ten thousand times, CUDA graphs, no synchronisation.

Collected everywhere, skipped without a CUDA device.  None of it has run yet: no GPU was at hand.
"""

from __future__ import annotations

import os

import pytest
import torch

import tokenpool_ext as tp
from bench.gpu_checks import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU"),
]
algorithms = pytest.mark.parametrize("algorithm", ("kmeans", "kmedoids"))
inits = pytest.mark.parametrize("init", ("topk", "farthest"))
# (B, N, D, K): the first takes the gram path, the second the direct one.
shapes = pytest.mark.parametrize("shape", ((4, 196, 384, 98), (2, 2000, 64, 16)), ids=("gram", "direct"))


def problem(shape, dtype=torch.bfloat16, seed=0):
    B, N, D, K = shape
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, D, generator=g).to("cuda", dtype), torch.rand(B, N, generator=g).cuda(), K


def bits(result):
    """The tensors of a result as integers, so that NaN equals NaN and 0 differs from -0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.contiguous().view(kinds[t.element_size()]) for t in result if t is not None]


@algorithms
@inits
@shapes
def test_ten_thousand_repeats_give_the_same_bits(algorithm, init, shape):
    x, w, K = problem(shape)

    def run():
        return bits(getattr(tp, algorithm)(x, K, weights=w, init=init, backend="triton"))

    first = run()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for now, then in zip(run(), first):
            differing += (now != then).sum()
    assert differing.item() == 0


@algorithms
@inits
@shapes
def test_a_captured_graph_replays_a_hundred_times(algorithm, init, shape):
    """The graph's result for new tokens in its buffers is that of an ordinary call, bit for bit."""
    x, w, K = problem(shape)

    def run():
        return getattr(tp, algorithm)(x, K, weights=w, init=init, backend="triton")

    graph, outputs = captured(run)
    for seed in range(100):
        tokens, weights, _ = problem(shape, seed=seed)
        x.copy_(tokens)
        w.copy_(weights)
        graph.replay()
        replayed = [t.clone() for t in bits(outputs)]
        for got, want in zip(replayed, bits(run())):
            assert torch.equal(got, want), f"replay {seed}"


@pytest.fixture
def no_synchronisation():
    """Call it to make every synchronisation with the host an error until the test ends."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@algorithms
@inits
@shapes
def test_clustering_never_synchronises(algorithm, init, shape, no_synchronisation):
    x, w, K = problem(shape)
    mask = torch.arange(x.shape[1], device="cuda") < torch.tensor([[x.shape[1] - 3]], device="cuda").expand(
        x.shape[0], 1
    )
    x.requires_grad_()
    function = getattr(tp, algorithm)
    upstream = torch.randn(x.shape[0], K, x.shape[2], device="cuda", dtype=x.dtype)

    def run():
        return function(x, K, weights=w, mask=mask, init=init, sort=True, backend="triton").centers.backward(upstream)

    run()  # compiles
    torch.cuda.synchronize()
    no_synchronisation()
    run()


def test_the_other_operators_never_synchronise(no_synchronisation):
    x, w, K = problem((4, 196, 384, 98))
    labels = torch.arange(196, device="cuda").remainder(K).expand(4, 196).contiguous()
    q = x.view(4, 196, 6, 64).transpose(1, 2)
    x = x.clone().requires_grad_()
    upstream = torch.randn_like(x)

    def run():
        pooled = tp.pool(x, labels, K, weights=w, backend="triton")
        tp.unpool(pooled, labels, backend="triton").backward(upstream)
        tp.attention_received(q, q, backend="triton")

    run()
    torch.cuda.synchronize()
    no_synchronisation()
    run()
