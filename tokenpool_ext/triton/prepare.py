"""Per-image statistics, before the first iteration: scale, centering vector, normalised weights, effective K.

Two launches: `x_stats_kernel` reads the tokens once (B * N * D elements) and leaves (B, chunks, D) partial sums and
extremes; `prepare_kernel` reduces them in a fixed order, normalises the weights and writes the initial state.
Tokens of weight zero have no say in scale and centering vector while others have one.
"""

import triton
import triton.language as tl

from .device import eights, exponent_scales, image_of, kernel, load_rows

CHUNK = tl.constexpr(1024)  # tokens whose statistics one program gathers; part of the rounding, hence fixed


@triton.jit
def _real(mask, i, N, mask_n, HAS_MASK: tl.constexpr):
    """Which of the tokens i are no padding; `mask` is the image's."""
    live = i < N
    if HAS_MASK:
        live = live & (tl.load(mask + i.to(tl.int64) * mask_n, mask=live, other=0) != 0)
    return live


@kernel
def x_stats_kernel(
    x,
    mask,
    weights,
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
    w_b,
    w_n,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    CONTIG: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One program per (image, chunk of tokens, feature tile).

    x (B, N, D); mask bool (B, N), unused without HAS_MASK; weights float32 (B, N), likewise; part_* float32
    (B, chunks, D); `pre` is a power of two at most 1/N, so that the sum of finite tokens cannot overflow.
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
    mask += b * mask_b
    weights += b * w_b
    bar = -1.0  # a token counts whose weight is above
    if HAS_WEIGHTS:
        n0 = 0
        while (n0 < N) & (bar < 0):
            i = n0 + tl.arange(0, CHUNK)
            live = _real(mask, i, N, mask_n, HAS_MASK)
            w = tl.load(weights + i.to(tl.int64) * w_n, mask=live, other=0.0)
            bar = tl.where(tl.max((w > 0).to(tl.int32), axis=0) > 0, 0.0, -1.0)
            n0 += CHUNK
    total = tl.zeros([BD], tl.float32)
    low = tl.full([BD], float("inf"), tl.float32)
    high = tl.full([BD], float("-inf"), tl.float32)
    for n0 in range(0, tl.minimum(N - chunk * CHUNK, CHUNK).to(tl.int32), BN):
        i = chunk * CHUNK + n0 + tl.arange(0, BN)
        live = _real(mask, i, N, mask_n, HAS_MASK)
        if HAS_WEIGHTS:
            live = live & (tl.load(weights + i * w_n, mask=live, other=0.0) > bar)
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


@triton.jit
def _mean(part_sum, part_min, part_max, b, chunks, D, share, down, offs_d, BD: tl.constexpr):
    """The mean token (BD,), scaled; 0 where it is not finite.  Equal tokens give themselves."""
    low, high = _extremes(part_min, part_max, b, chunks, D, offs_d, BD)
    total = tl.zeros([BD], tl.float32)
    for c in range(0, chunks):
        total += tl.load(part_sum + (b * chunks + c) * D + offs_d, mask=offs_d < D, other=0.0)
    mean = tl.minimum(tl.maximum(total * share, low), high) * down
    return tl.where((mean == mean) & (tl.abs(mean) < float("inf")), mean, 0.0)


@triton.jit
def _median(values, place, COUNT: tl.constexpr):
    """In each row of (COUNT, COUNT) the value that comes at `place` (from 0) in ascending order."""
    other = tl.arange(0, COUNT)
    less = values[:, None, :] < values[:, :, None]
    tie = (values[:, None, :] == values[:, :, None]) & (other[None, None, :] < other[None, :, None])
    rank = tl.sum((less | tie).to(tl.int32), axis=2)
    return tl.sum(tl.where(rank == place, values, 0.0), axis=1)


@triton.jit
def _shift(
    x,
    picked,
    part_sum,
    part_min,
    part_max,
    center,
    b,
    chunks,
    share,
    down,
    D,
    x_n,
    x_d,
    CONTIG: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """center (D,) = what is taken off all tokens, scaled.  Distances do not depend on it; their rounding does.

    The mean token, rounded to an eighth or sixteenth of the power of two below the largest deviation in a sample (the
    tokens `picked`): small integers stay integers of few bits, and ties between them ties.  Where a few far tokens
    pull the mean away from most, a token of the sample.
    """
    BD: tl.constexpr = 32
    from_mean = tl.zeros([SAMPLE], tl.float32)
    apart = tl.zeros([SAMPLE, SAMPLE], tl.float32)
    for d0 in range(0, D, BD):
        offs_d = d0 + tl.arange(0, BD)
        rows = load_rows(x, center, down, picked, picked >= 0, offs_d, D, x_n, x_d, False, True, CONTIG)
        mean = _mean(part_sum, part_min, part_max, b, chunks, D, share, down, offs_d, BD)
        mean = tl.where(offs_d < D, mean, 0.0)
        from_mean = tl.maximum(from_mean, tl.max(tl.abs(rows - mean[None, :]), axis=1))
        apart = tl.maximum(apart, tl.max(tl.abs(rows[:, None, :] - rows[None, :, :]), axis=2))
    largest = tl.max(from_mean, axis=0)
    ways = from_mean[None, :] + tl.zeros([SAMPLE, SAMPLE], tl.float32)
    typical = tl.max(_median(ways, SAMPLE // 2 - 1, SAMPLE), axis=0)
    way = _median(apart, SAMPLE // 2, SAMPLE)  # a token is nearest to itself
    least, best = tl.min(way, axis=0, return_indices=True)
    pulled = least * 64 < typical
    token = tl.sum(tl.where(tl.arange(0, SAMPLE) == best, picked, 0), axis=0)
    finer, grain = exponent_scales(largest, 33, 227)
    grain = grain * 0.125
    finer = finer * 8.0
    limit = tl.where(largest > 0, grain * 4194304.0, 0.0)  # beyond, it is rounded enough
    for d0 in range(0, D, BLOCK):
        offs_d = d0 + tl.arange(0, BLOCK)
        mean = _mean(part_sum, part_min, part_max, b, chunks, D, share, down, offs_d, BLOCK)
        rounded = tl.floor(mean * finer + 0.5) * grain
        mean = tl.where(tl.abs(mean) < limit, rounded, mean)
        if pulled:
            one = tl.full([1], True, tl.int1)
            row = load_rows(
                x, center, down, token + tl.zeros([1], tl.int32), one, offs_d, D, x_n, x_d, False, True, CONTIG
            )
            mean = tl.sum(row, axis=0)
        tl.store(center + offs_d, mean, mask=offs_d < D)


@kernel
def prepare_kernel(
    x,
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
    exact,
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
    x_b,
    x_n,
    x_d,
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
    CONTIG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per image.  Writes
    scale, unscale (B,) powers of two; center (B, D) float32, in scaled units; wn (B, N) float32 weights times a power
    of two (largest in [1, 2)), -1 for padding; w_unscale (B,); keff (B,) int32; done, exact (B,) = 0; prev (B, N) = -2;
    label_out (B, N) int64 = -1; and with HAS_INDEX the initial member lists: cluster j holds the one token init[b, j].
    """
    SAMPLE: tl.constexpr = 8
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask += b * mask_b
    weights += b * w_b
    # Weights, padding, the number of real tokens and that of those which count in statistics.
    valid = 0
    heavy = 0
    peak = 0.0
    for n0 in range(0, N, BLOCK):
        i = n0 + offs
        live = _real(mask, i, N, mask_n, HAS_MASK)
        valid += tl.sum(live.to(tl.int32), axis=0)
        if HAS_WEIGHTS:
            w = tl.load(weights + i.to(tl.int64) * w_n, mask=live, other=0.0)
            peak = tl.maximum(peak, tl.max(w, axis=0))
            heavy += tl.sum((w > 0).to(tl.int32), axis=0)
    count = valid
    if HAS_WEIGHTS:
        bar = tl.where(heavy > 0, 0.0, -1.0)
        count = tl.where(heavy > 0, heavy, valid)
        w_scale, w_up = exponent_scales(peak, 2, 252)
    else:
        w_scale, w_up = exponent_scales(peak + 1.0, 2, 252)
    wanted = (tl.arange(0, SAMPLE).to(tl.int64) * (count - 1) // (SAMPLE - 1)).to(tl.int32)
    picked = tl.zeros([SAMPLE], tl.int32)
    seen = 0
    for n0 in range(0, N, BLOCK):
        i = n0 + offs
        live = _real(mask, i, N, mask_n, HAS_MASK)
        counts = live
        if HAS_WEIGHTS:
            w = tl.load(weights + i.to(tl.int64) * w_n, mask=live, other=0.0)
            counts = live & (w > bar)
            w = w * w_scale
        else:
            w = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_X and CENTER:
            rank = seen + tl.cumsum(counts.to(tl.int32), axis=0) - 1
            hit = counts[None, :] & (rank[None, :] == wanted[:, None])
            picked += tl.sum(tl.where(hit, i[None, :], 0), axis=1)
            seen += tl.sum(counts.to(tl.int32), axis=0)
        tl.store(wn + b * N + i, tl.where(live, w, -1.0), mask=i < N)
        tl.store(prev + b * N + i, tl.full([BLOCK], -2, tl.int32), mask=i < N)
        tl.store(label_out + b * N + i, tl.full([BLOCK], -1, tl.int64), mask=i < N)
    clusters = tl.minimum(valid, K)
    if HAS_COUNTS:
        asked = tl.load(k_per_image + b * counts_b)
        clusters = tl.maximum(tl.minimum(clusters.to(tl.int64), asked), 0).to(tl.int32)
    tl.store(w_unscale + b, w_up)
    tl.store(keff + b, clusters)
    tl.store(done + b, 0)
    tl.store(exact + b, 0)
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
            share = 1.0 / (pre * tl.maximum(count, 1).to(tl.float32))
            _shift(
                image_of(x, b, x_b, CONTIG),
                picked,
                part_sum,
                part_min,
                part_max,
                center + b * D,
                b,
                chunks,
                share,
                down,
                D,
                x_n,
                x_d,
                CONTIG,
                BLOCK,
                SAMPLE,
            )
    else:
        tl.store(scale + b, 1.0)
        tl.store(unscale + b, 1.0)
