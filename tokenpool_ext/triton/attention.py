"""Attention that each token receives (contract 9), from q, k and the log-sum-exp: no N x N memory.

The largest logit is taken off before the scale is applied, which may be so large that a logit overflows.
"""

import triton
import triton.language as tl

from .device import kernel, product


@triton.jit
def _tile(base, rows, n_rows, d0, d, stride_n, stride_d, BD: tl.constexpr):
    offs = d0 + tl.arange(0, BD)
    return tl.load(
        base + rows.to(tl.int64)[:, None] * stride_n + offs.to(tl.int64)[None, :] * stride_d,
        mask=(rows < n_rows)[:, None] & (offs < d)[None, :],
        other=0.0,
    )


@kernel
def lse_kernel(
    q,
    k,
    top,
    lse,
    factor,
    H,
    Nq,
    N,
    d,
    tiles,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """float32 (B, H, Nq): top = the q . k whose logit is the largest, lse = natural log-sum-exp over keys of
    scale * (q . k - top); one program per (image, head, query tile), keys in ascending tiles with a running maximum."""
    pid = tl.program_id(0).to(tl.int64)
    head = (pid // tiles) % H
    b = pid // (tiles * H)
    rows = ((pid % tiles) * BQ).to(tl.int32) + tl.arange(0, BQ)
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    sign = tl.where(factor < 0, -1.0, 1.0)
    peak = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    for n0 in range(0, N, BK):
        cols = n0 + tl.arange(0, BK)
        acc = tl.zeros([BQ, BK], tl.float32)
        for d0 in range(0, d, BD):
            acc = product(
                _tile(q, rows, Nq, d0, d, q_n, q_d, BD),
                tl.trans(_tile(k, cols, N, d0, d, k_n, k_d, BD)),
                acc,
                PRECISION,
            )
        logit = tl.where((cols < N)[None, :], acc * sign, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, axis=1))
        p = tl.where((cols < N)[None, :], tl.exp(factor * sign * (logit - higher[:, None])), 0.0)
        before = tl.where(total == 0.0, 0.0, total * tl.exp(factor * sign * (peak - higher)))
        total = before + tl.sum(p, axis=1)
        peak = higher
    out = (b * H + head) * Nq + rows
    tl.store(top + out, peak * sign, mask=rows < Nq)
    tl.store(lse + out, tl.log(total), mask=rows < Nq)


@kernel
def received_kernel(
    q,
    k,
    top,
    lse,
    part,
    factor,
    H,
    Nq,
    N,
    d,
    tiles,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    l_b,
    l_h,
    l_n,
    HAS_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """part float32 (B, H, N) = sum over queries of exp(scale (q . k - top) - lse), top being 0 unless HAS_TOP; one
    program per (image, head, key tile), queries in ascending tiles.  Reads H (Nq d + N d)
    elements an image and key tile (queries from L2)."""
    pid = tl.program_id(0).to(tl.int64)
    head = (pid // tiles) % H
    b = pid // (tiles * H)
    cols = ((pid % tiles) * BK).to(tl.int32) + tl.arange(0, BK)
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    lse += b * l_b + head * l_h
    top += b * l_b + head * l_h
    total = tl.zeros([BK], tl.float32)
    for n0 in range(0, Nq, BQ):
        rows = n0 + tl.arange(0, BQ)
        acc = tl.zeros([BQ, BK], tl.float32)
        for d0 in range(0, d, BD):
            acc = product(
                _tile(q, rows, Nq, d0, d, q_n, q_d, BD),
                tl.trans(_tile(k, cols, N, d0, d, k_n, k_d, BD)),
                acc,
                PRECISION,
            )
        norm = tl.load(lse + rows.to(tl.int64) * l_n, mask=rows < Nq, other=0.0)
        if HAS_TOP:
            acc -= tl.load(top + rows.to(tl.int64) * l_n, mask=rows < Nq, other=0.0)[:, None]
        p = tl.where((rows < Nq)[:, None], tl.exp(acc * factor - norm[:, None]), 0.0)
        total += tl.sum(p, axis=0)
    tl.store(part + (b * H + head) * N + cols, total, mask=cols < N)


@kernel
def heads_kernel(part, out, H, N, inverse, tiles, BLOCK: tl.constexpr):
    """out float32 (B, N) = inverse * sum over heads, ascending, of part (B, H, N)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    cols = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for h in range(0, H):
        total += tl.load(part + (b * H + h) * N + cols, mask=cols < N, other=0.0)
    tl.store(out + b * N + cols, total * inverse, mask=cols < N)
