"""Per-image statistics, before the first iteration: scale, centering vector, normalised weights, effective K.

Two launches: `x_stats_kernel` reads the tokens once (B * N * D elements) and leaves (B, chunks, D) partial sums and
extremes; `prepare_kernel` reduces them in a fixed order, normalises the weights and writes the initial state.
"""

import triton
import triton.language as tl

from .device import eights, exponent_scales, image_of, kernel

CHUNK = tl.constexpr(1024)  # tokens whose statistics one program gathers; part of the rounding, hence fixed


@kernel
def x_stats_kernel(
    x,
    mask,
    part_sum,
    part_min,
    part_max,
    N,
    D,
    chunks,
    d_tiles,
    pre,
    x_b,
    x_n,
    x_d,
    mask_b,
    mask_n,
    HAS_MASK: tl.constexpr,
    CONTIG: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One program per (image, chunk of tokens, feature tile).

    x (B, N, D); mask bool (B, N), unused without HAS_MASK; part_* float32 (B, chunks, D); `pre` is a power of two
    at most 1/N, so that the sum of finite tokens cannot overflow.
    """
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % d_tiles
    chunk = (pid // d_tiles) % chunks
    b = pid // (d_tiles * chunks)
    offs_d = tile * BD + tl.arange(0, BD)
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        x_n = eights(x_n)
        D = eights(D)
        cols = offs_d
    else:
        cols = offs_d * x_d
    total = tl.zeros([BD], tl.float32)
    low = tl.full([BD], float("inf"), tl.float32)
    high = tl.full([BD], float("-inf"), tl.float32)
    for n0 in range(0, tl.minimum(N - chunk * CHUNK, CHUNK).to(tl.int32), BN):
        i = chunk * CHUNK + n0 + tl.arange(0, BN)
        live = i < N
        if HAS_MASK:
            live = live & (tl.load(mask + b * mask_b + i * mask_n, mask=live, other=0) != 0)
        inside = live[:, None] & (offs_d < D)[None, :]
        v = tl.load(x + i[:, None] * x_n + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(v * pre, axis=0)
        low = tl.minimum(low, tl.min(tl.where(inside, v, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, v, float("-inf")), axis=0))
    out = (b * chunks + chunk) * D + offs_d
    tl.store(part_sum + out, total, mask=offs_d < D)
    tl.store(part_min + out, low, mask=offs_d < D)
    tl.store(part_max + out, high, mask=offs_d < D)


@triton.jit
def _extremes(part_min, part_max, b, chunks, D, offs_d, BD: tl.constexpr):
    low = tl.full([BD], float("inf"), tl.float32)
    high = tl.full([BD], float("-inf"), tl.float32)
    for c in range(0, chunks):
        at = (b * chunks + c) * D + offs_d
        low = tl.minimum(low, tl.load(part_min + at, mask=offs_d < D, other=0.0))
        high = tl.maximum(high, tl.load(part_max + at, mask=offs_d < D, other=0.0))
    return low, high


@kernel
def prepare_kernel(
    part_sum,
    part_min,
    part_max,
    mask,
    weights,
    k_per_image,
    init,
    scale,
    unscale,
    center,
    wn,
    w_unscale,
    keff,
    done,
    prev,
    label_out,
    lst,
    coef,
    start,
    cnt,
    N,
    D,
    K,
    chunks,
    pre,
    mask_b,
    mask_n,
    w_b,
    w_n,
    counts_b,
    init_b,
    init_k,
    HAS_X: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per image.  Writes
    scale, unscale (B,) powers of two; center (B, D) float32, in scaled units; wn (B, N) float32 weights times a power
    of two (largest in [1, 2)), -1 for padding; w_unscale (B,); keff (B,) int32; done (B,) = 0; prev (B, N) = -2;
    label_out (B, N) int64 = -1; and with HAS_INDEX the initial member lists: cluster j holds the one token init[b, j].
    """
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    # Weights, padding and the number of real tokens.
    valid = 0
    peak = 0.0
    for n0 in range(0, N, BLOCK):
        i = n0 + offs
        live = i < N
        if HAS_MASK:
            live = live & (tl.load(mask + b * mask_b + i.to(tl.int64) * mask_n, mask=live, other=0) != 0)
        valid += tl.sum(live.to(tl.int32), axis=0)
        if HAS_WEIGHTS:
            w = tl.load(weights + b * w_b + i.to(tl.int64) * w_n, mask=live, other=0.0)
            peak = tl.maximum(peak, tl.max(w, axis=0))
    if HAS_WEIGHTS:
        w_scale, w_up = exponent_scales(peak, 2, 252)
    else:
        w_scale, w_up = exponent_scales(peak + 1.0, 2, 252)
    for n0 in range(0, N, BLOCK):
        i = n0 + offs
        live = i < N
        if HAS_MASK:
            live = live & (tl.load(mask + b * mask_b + i.to(tl.int64) * mask_n, mask=live, other=0) != 0)
        if HAS_WEIGHTS:
            w = tl.load(weights + b * w_b + i.to(tl.int64) * w_n, mask=live, other=0.0) * w_scale
        else:
            w = tl.full([BLOCK], 1.0, tl.float32)
        tl.store(wn + b * N + i, tl.where(live, w, -1.0), mask=i < N)
        tl.store(prev + b * N + i, tl.full([BLOCK], -2, tl.int32), mask=i < N)
        tl.store(label_out + b * N + i, tl.full([BLOCK], -1, tl.int64), mask=i < N)
    clusters = tl.minimum(valid, K)
    if HAS_COUNTS:
        wanted = tl.load(k_per_image + b * counts_b)
        clusters = tl.maximum(tl.minimum(clusters.to(tl.int64), wanted), 0).to(tl.int32)
    tl.store(w_unscale + b, w_up)
    tl.store(keff + b, clusters)
    tl.store(done + b, 0)
    # Initial member lists: one token a cluster (clusters <= valid <= N, so they fit).
    for k0 in range(0, K, BLOCK):
        j = k0 + offs
        tl.store(cnt + b * K + j, (j < clusters).to(tl.int32), mask=j < K)
        tl.store(start + b * K + j, j, mask=j < K)
        if HAS_INDEX:
            token = tl.load(init + b * init_b + j.to(tl.int64) * init_k, mask=j < clusters, other=0)
            token = tl.minimum(tl.maximum(token, 0), N - 1).to(tl.int32)
            tl.store(lst + b * N + j, token, mask=j < clusters)
            tl.store(coef + b * N + j, tl.full([BLOCK], 1.0, tl.float32), mask=j < clusters)
    # Scale and centering vector.
    if HAS_X:
        x_peak = 0.0
        for d0 in range(0, D, BLOCK):
            low, high = _extremes(part_min, part_max, b, chunks, D, d0 + offs, BLOCK)
            span = tl.maximum(tl.abs(low), tl.abs(high))
            if CENTER:  # a feature of large offset must not overflow where it is read before the offset is taken off
                span = tl.maximum(high * 0.5 - low * 0.5, span * 7.8886e-31)  # 2^-100
            x_peak = tl.maximum(x_peak, tl.max(tl.where(d0 + offs < D, span, 0.0), axis=0))
        down, up = exponent_scales(x_peak, 27, 227)
        tl.store(scale + b, down)
        tl.store(unscale + b, up)
        if CENTER:
            share = 1.0 / (pre * tl.maximum(valid, 1).to(tl.float32))
            for d0 in range(0, D, BLOCK):
                offs_d = d0 + offs
                low, high = _extremes(part_min, part_max, b, chunks, D, offs_d, BLOCK)
                total = tl.zeros([BLOCK], tl.float32)
                for c in range(0, chunks):
                    total += tl.load(part_sum + (b * chunks + c) * D + offs_d, mask=offs_d < D, other=0.0)
                # The mean, rounded to 1/64 of the feature's range: removes any offset, and leaves small integers
                # small and exact, so that equal distances stay equal.
                grain_down, grain_up = exponent_scales(high * 0.5 - low * 0.5, 33, 227)
                mean = tl.floor(total * share * (grain_down * 32.0) + 0.5) * (grain_up * 0.03125)
                mean = tl.minimum(tl.maximum(mean, low), high)
                finite = (mean == mean) & (tl.abs(mean) < float("inf"))
                tl.store(center + b * D + offs_d, tl.where(finite, mean * down, 0.0), mask=offs_d < D)
    else:
        tl.store(scale + b, 1.0)
        tl.store(unscale + b, 1.0)
