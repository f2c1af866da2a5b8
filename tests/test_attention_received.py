"""The significance score from q and k alone (contract 9)."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from helpers import DTYPES, assert_identical, assert_same_bits, f64, tokens

import tokenpool_ext as tp
from tokenpool_ext import loader

pytestmark = pytest.mark.one_path
needs_cpu = pytest.mark.skipif(loader.extension is None, reason=str(loader.ops_reason))

# Relative error of one exp of a logit with absolute rounding error e is e.  Logits here are of order 10 and sums of
# d <= 128 products in float32: about 10 * sqrt(128) * 2^-24 = 7e-6.  Half types: the inputs are exact, so the same.
RTOL = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 3e-5, torch.bfloat16: 3e-5}

SMALL = [(2, 2, 12, 12, 4), (1, 1, 1, 1, 1), (1, 3, 5, 17, 3), (2, 1, 17, 5, 15)]
LARGE = [(2, 3, 197, 197, 64), (1, 6, 257, 257, 64), (1, 2, 33, 130, 80), (1, 1, 130, 33, 128), (1, 2, 64, 300, 48)]


def make(shape, dtype=torch.float32, device="cpu"):
    B, H, Nq, N, d = shape
    q = tokens(B * H, Nq, d, dtype, device, seed=1).reshape(B, H, Nq, d)
    k = tokens(B * H, N, d, dtype, device, seed=2).reshape(B, H, N, d)
    return q, k


def expected(q, k, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return np.stack([oracle.attention_received(f64(q[b]), f64(k[b]), scale) for b in range(len(q))])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SMALL + [pytest.param(s, marks=pytest.mark.large) for s in LARGE], ids=str)
def test_against_float64_softmax(backend, shape, dtype):
    q, k = make(shape, dtype, backend.device)
    got = tp.attention_received(q, k, backend=backend.name)
    assert got.shape == (shape[0], shape[3])
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(f64(got), expected(q, k), rtol=RTOL[dtype], atol=1e-30)
    np.testing.assert_allclose(f64(got).sum(1), 1, rtol=RTOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_log_sum_exp(backend, dtype):
    q, k = make((2, 3, 14, 18, 8), dtype, backend.device)
    logits = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) / math.sqrt(8)
    lse = logits.logsumexp(-1)
    got = tp.attention_received(q, k, lse=lse.float(), backend=backend.name)
    np.testing.assert_allclose(f64(got), expected(q, k), rtol=3e-5)
    shifted = tp.attention_received(q, k, lse=(lse + math.log(4)).float(), backend=backend.name)
    np.testing.assert_allclose(f64(shifted) * 4, expected(q, k), rtol=3e-5, err_msg="lse must be used as given")


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 3, 1e-3])
def test_scale(backend, scale):
    q, k = make((1, 2, 9, 12, 4), device=backend.device)
    got = tp.attention_received(q, k, scale=scale, backend=backend.name)
    np.testing.assert_allclose(f64(got), expected(q, k, scale), rtol=1e-4)
    if scale == 0:
        np.testing.assert_allclose(f64(got), 1 / 12, rtol=1e-6, err_msg="scale 0 is a scale, not 'unset'")


@pytest.mark.parametrize("scale", [1e38, 1e300, -1e38])
def test_a_score_is_a_share_whatever_the_scale(backend, scale):
    q = tokens(1, 5, 4, device=backend.device).view(1, 1, 5, 4) * 4
    got = tp.attention_received(q, q, scale=scale, backend=backend.name)
    logits = f64(q)[0, 0] @ f64(q)[0, 0].T
    best = logits.argmax(1) if scale > 0 else logits.argmin(1)
    np.testing.assert_allclose(f64(got), np.bincount(best, minlength=5)[None] / 5, rtol=1e-6, atol=1e-6)


def test_agrees_with_scaled_dot_product_attention(backend):
    """Attention received = the mean output of fused attention over one-hot values."""
    q, k = make((2, 2, 11, 11, 8), device=backend.device)
    one_hot = torch.eye(11, device=backend.device).expand(2, 2, 11, 11)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, one_hot).mean((1, 2))
    torch.testing.assert_close(tp.attention_received(q, k, backend=backend.name), out, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("magnitude", [30.0, 300.0])
def test_large_logits_do_not_overflow(backend, magnitude):
    q, k = make((1, 2, 9, 12, 4), device=backend.device)
    q = q * magnitude
    got = f64(tp.attention_received(q, k, backend=backend.name))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-4)
    # a logit of size L has a rounding error of L 2^-22, and so has the exponential
    np.testing.assert_allclose(got, expected(q, k), rtol=1e-5 * magnitude, atol=1e-6)


def test_fp16_values_that_overflow_as_products(backend):
    q, k = make((1, 2, 9, 12, 4), torch.float16, backend.device)
    got = f64(tp.attention_received(q * 600, k * 600, scale=1e-6, backend=backend.name))
    np.testing.assert_allclose(got, expected(q * 600, k * 600, 1e-6), rtol=1e-4)


def test_strides(backend):
    """q and k as views of one fused projection, and other layouts: no bit changes."""
    B, H, N, d = 2, 3, 13, 8
    qkv = tokens(B, N, 3 * H * d, device=backend.device).reshape(B, N, 3, H, d).permute(2, 0, 3, 1, 4)
    q, k = qkv[0], qkv[1]
    want = tp.attention_received(q.contiguous(), k.contiguous(), backend=backend.name)
    np.testing.assert_allclose(f64(want), expected(q, k), rtol=3e-5)
    for a, b in (
        (q, k),
        (q.contiguous(), k),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k),
        (q, torch.stack([k, k], -1)[..., 0]),
    ):
        assert_same_bits(backend, want, tp.attention_received(a, b, backend=backend.name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_numbers_stay_in_their_image(backend, bad):
    q, k = make((3, 2, 9, 12, 4), device=backend.device)
    clean = tp.attention_received(q, k, backend=backend.name)
    q[1, 0, 3, 1], k[1, 1, 2] = bad, bad
    got = tp.attention_received(q, k, backend=backend.name)
    assert_identical(clean[[0, 2]], got[[0, 2]])


def test_no_gradient_is_stated(backend):
    """No gradient exists: the output says so (it must not return a silent zero)."""
    q, k = make((1, 1, 5, 6, 4), device=backend.device)
    q.requires_grad_(), k.requires_grad_()
    try:
        got = tp.attention_received(q, k, backend=backend.name)
    except (RuntimeError, ValueError) as error:
        assert "requires_grad" in str(error)
    else:
        assert not got.requires_grad


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, low):
    q, k = make((1, 2, 9, 12, 4), device=backend.device)
    want = tp.attention_received(q, k, backend=backend.name)
    with torch.autocast(backend.device, dtype=low):
        assert_identical(want, tp.attention_received(q, k, backend=backend.name))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 1, 0, 4, 5), (2, 1, 3, 0, 5), (2, 1, 3, 4, 0)], ids=str
)
def test_empty(backend, shape):
    q, k = make(shape, device=backend.device)
    got = tp.attention_received(q, k, backend=backend.name)
    assert got.shape == (shape[0], shape[3]) and torch.isfinite(got).all()


@pytest.mark.kernels  # the reference keeps one head's logits and is written to be read
@pytest.mark.large
def test_no_square_matrix_in_memory(backend):
    """One pass must not keep an N x N matrix (contract 9)."""
    if backend.device == "cuda":
        q, k = make((1, 2, 4096, 4096, 16), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tp.attention_received(q, k, backend=backend.name)
        assert torch.cuda.max_memory_allocated() - before < 4096 * 4096 * 4 / 4
        return
    import resource

    q, k = make((1, 1, 8192, 8192, 4), device="cpu")
    tp.attention_received(q[:, :, :64], k[:, :, :64], backend=backend.name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tp.attention_received(q, k, backend=backend.name)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 8192 * 8192 * 4 / 1024 / 4, f"peak memory grew by {grown / 1024:.0f} MiB"


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize(
    "dtype,size,width,scale",
    [
        (torch.float32, 1e20, 8, None),
        (torch.float32, 3e38, 1, 1e-30),
        (torch.float32, 1e35, 4, 1e5),
        (torch.float32, 1e25, 4, 1e-50),
        (torch.float32, 1e-30, 4, 1e60),
        (torch.bfloat16, 3e38, 64, -1.0),
        (torch.float16, 6e4, 1024, 1e290),
        (torch.float64, 1e140, 8, None),
    ],
    ids=str,
)
def test_logits_that_overflow(name, dtype, size, width, scale):
    """Finite q and k: what float64 gives, also where a part of the sum overflows, but not the logit."""
    q, k = make((2, 2, 21, 70, width), torch.float64)
    q, k = ((x * size / x.abs().max()).to(dtype) for x in (q, k))
    k[:, :, 3:5] = 0
    k[1, 0] *= 1e-30 if size > 1e30 else 1
    got = f64(tp.attention_received(q, k, scale=scale, backend=name))
    np.testing.assert_allclose(got, expected(q, k, scale), rtol=3e-5, atol=1e-7)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_a_part_of_a_logit_that_overflows(name):
    """-3e38 - 1e38 + 4e38 is 0, and above all others."""
    k = torch.tensor([[-3e38, -1e38, 3.4e38, 0.6e38], [-1e35, 0, 0, 0]])[None, None]
    got = tp.attention_received(torch.ones(1, 1, 1, 4), k, backend=name)
    assert got.tolist() == [[1, 0]]


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("scale", [None, 1e-320, -1e300])
def test_logits_that_overflow_float64(name, scale):
    """The largest logits share all the attention (contract 9)."""
    k = torch.tensor([1e300, 3.0, 1e300, -1e300], dtype=torch.float64).view(1, 1, 4, 1)
    got = tp.attention_received(k[:, :, :1], k, scale=scale, backend=name)
    assert got.tolist() == [[0, 0, 0, 1] if scale == -1e300 else [0.5, 0, 0.5, 0]]
