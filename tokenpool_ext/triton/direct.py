"""The direct path (contract 4): three launches an iteration, whatever K is; nothing of size N x K in memory.

assign_kernel (GEMM with a running argmin) -> settle_kernel (repair, early stop) -> update_kernel (member lists by
counting sort, then means or medoids).  All return at once for an image that is done.
"""

import triton
import triton.language as tl

from .device import (
    better,
    coefficient,
    eights,
    image_of,
    kernel,
    load_rows,
    narrow,
    no_nan,
    product,
    repair_image,
    settle_image,
)


@triton.jit
def _store_center(high, low, at, value, live, SPLIT: tl.constexpr):
    """Store a float32 center row as `high` (+ `low`, its rounding error, for half types); returns what was kept."""
    top = narrow(value, high.dtype.element_ty)
    tl.store(high + at, top, mask=live)
    kept = top.to(tl.float32)
    if SPLIT:
        rest = narrow(value - kept, low.dtype.element_ty)
        tl.store(low + at, rest, mask=live)
        kept += rest.to(tl.float32)
    return tl.where(live, kept, 0.0)


@kernel
def init_kernel(
    x,
    init,
    scale,
    center,
    keff,
    lst,
    high,
    low,
    norms,
    medoids,
    D,
    K,
    N,
    x_b,
    x_n,
    x_d,
    init_b,
    init_k,
    init_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    FROM_TOKENS: tl.constexpr,
    MEDOIDS: tl.constexpr,
    BD: tl.constexpr,
):
    """One program per (image, cluster): the initial center, from a token (lst, prepare.py) or from init (B, K, D)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    j = pid % K
    if j >= tl.load(keff + b):
        return
    s = tl.load(scale + b)
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    one = tl.full([1], True, tl.int1)
    token = 0
    if FROM_TOKENS:
        token = tl.load(lst + b * N + j)
    total = 0.0
    for d0 in range(0, D, BD):
        offs_d = d0 + tl.arange(0, BD)
        if FROM_TOKENS:
            tile = load_rows(
                x, center + b * D, s, token + tl.zeros([1], tl.int32), one, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG
            )
            y = tl.sum(tile, axis=0)
        else:
            y = tl.load(init + b * init_b + j * init_k + offs_d.to(tl.int64) * init_d, mask=offs_d < D, other=0.0)
            if SCALE:
                y = y * s
            if CENTER:
                y -= tl.load(center + b * D + offs_d, mask=offs_d < D, other=0.0)
        kept = _store_center(high, low, pid * D + offs_d, y, offs_d < D, SPLIT)
        total += tl.sum(kept * kept, axis=0)
    tl.store(norms + pid, total)
    if MEDOIDS:
        tl.store(medoids + pid, token)


@kernel
def assign_kernel(
    x,
    scale,
    center,
    wn,
    keff,
    done,
    high,
    low,
    norms,
    medoids,
    lab,
    cost,
    counts,
    N,
    D,
    K,
    tiles,
    x_b,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    MEDOIDS: tl.constexpr,
    PRECISION: tl.constexpr,
    HOLD: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """argmin_j ||y_i - c_j||^2 for BN tokens of one image, as ||c_j||^2 - 2 y_i . c_j; counts += members.

    x (B, N, D) any strides; high, low (B, K, D) in x's dtype (low only with SPLIT); norms float32 (B, K);
    lab int32, cost float32 (B, N): w_i * distance; counts int32 (B, K), integer atomics.
    HOLD: D <= BD, so the token tile is loaded once and stays.  Reads N D + ceil(N / BN) K D elements an image.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    if tl.load(done + b) != 0:
        return
    i = ((pid % tiles) * BN).to(tl.int32) + tl.arange(0, BN)
    clusters = tl.load(keff + b)
    s = tl.load(scale + b)
    w = tl.load(wn + b * N + i, mask=i < N, other=-1.0)
    valid = (i < N) & (w != -1.0)
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    center += b * D
    high += b * K * D
    low += b * K * D
    own = tl.zeros([BN], tl.float32)
    if HOLD:
        hold = load_rows(x, center, s, i, valid, tl.arange(0, BD), D, x_n, x_d, CENTER, SCALE, CONTIG)
        own = tl.sum(hold * hold, axis=1)
        tile = hold.to(high.dtype.element_ty)
    else:
        for d0 in range(0, D, BD):
            part = load_rows(x, center, s, i, valid, d0 + tl.arange(0, BD), D, x_n, x_d, CENTER, SCALE, CONTIG)
            own += tl.sum(part * part, axis=1)
    best = tl.full([BN], float("inf"), tl.float32)
    arg = tl.zeros([BN], tl.int32)
    mine = tl.full([BN], 2147483647, tl.int32)
    for j0 in range(0, clusters, BK):
        j = j0 + tl.arange(0, BK)
        acc = tl.zeros([BN, BK], tl.float32)
        for d0 in range(0, D, BD):
            offs_d = d0 + tl.arange(0, BD)
            if not HOLD:
                tile = load_rows(x, center, s, i, valid, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG).to(
                    high.dtype.element_ty
                )
            at = j.to(tl.int64)[None, :] * D + offs_d[:, None]
            live = (j < clusters)[None, :] & (offs_d < D)[:, None]
            acc = product(tile, tl.load(high + at, mask=live, other=0.0), acc, PRECISION)
            if SPLIT:
                acc = product(tile, tl.load(low + at, mask=live, other=0.0), acc, PRECISION)
        q = tl.load(norms + b * K + j, mask=j < clusters, other=0.0)
        value = tl.where((j < clusters)[None, :], no_nan(q[None, :] - 2.0 * acc, float("inf")), float("inf"))
        least, where = tl.min(value, axis=1, return_indices=True)
        best, arg = better(least, j0 + where, best, arg)
        if MEDOIDS:
            medoid = tl.load(medoids + b * K + j, mask=j < clusters, other=-1)
            names = tl.where(medoid[None, :] == i[:, None], j[None, :], 2147483647)
            mine = tl.minimum(mine, tl.min(names, axis=1))
    distance = tl.maximum(best + own, 0.0)
    if MEDOIDS:
        arg = tl.where(mine < 2147483647, mine, arg)
        distance = tl.where(mine < 2147483647, 0.0, distance)
    tl.store(lab + b * N + i, tl.where(valid, arg, -1), mask=i < N)
    tl.store(cost + b * N + i, w * distance, mask=i < N)
    tl.atomic_add(counts + b * K + arg, 1, mask=valid, sem="relaxed")


@kernel
def settle_kernel(keff, done, lab, prev, cost, counts, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program per image: repair empty clusters, then mark the image done when its labels did not change."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done + b) != 0:
        return
    repair_image(lab + b * N, cost + b * N, counts + b * K, tl.load(keff + b), N, BLOCK, BLOCK_K)
    changed = settle_image(lab + b * N, prev + b * N, N, BLOCK)
    tl.debug_barrier()
    tl.store(done + b, (changed == 0).to(tl.int32))


@triton.jit
def _lists(
    lab,
    wn,
    counts,
    lo,
    K,
    N,
    tmp,
    lst,
    coef,
    start,
    cnt,
    mass,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Member lists of clusters lo .. lo + BC - 1 of one image, in token order: a counting sort whose offsets come
    from the counts, so that every cluster tile works alone.  Pointers are the image's."""
    j = lo + tl.arange(0, BC)
    size = tl.load(counts + j, mask=j < K, other=0)
    base = 0
    for k0 in range(0, lo, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        base += tl.sum(tl.load(counts + k, mask=k < lo, other=0), axis=0)
    first = base + tl.cumsum(size, axis=0) - size
    tl.store(start + j, first, mask=j < K)
    tl.store(cnt + j, size, mask=j < K)
    # Compact the tile's tokens, in token order.
    filled = base
    for n0 in range(0, N, BLOCK):
        i = n0 + tl.arange(0, BLOCK)
        label = tl.load(lab + i, mask=i < N, other=-1)
        hit = ((label >= lo) & (label < lo + BC)).to(tl.int32)
        tl.store(tmp + filled + tl.cumsum(hit, axis=0) - 1, i, mask=hit != 0)
        filled += tl.sum(hit, axis=0)
    tl.debug_barrier()
    # Split them by cluster and add up the weights, both in token order.
    run = tl.zeros([BC], tl.int32)
    total = tl.zeros([BC], tl.float32)
    for e0 in range(base, filled, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        token = tl.load(tmp + e, mask=e < filled, other=0)
        label = tl.load(lab + token, mask=e < filled, other=-1)
        w = tl.load(wn + token, mask=e < filled, other=0.0)
        hit = label[None, :] == j[:, None]
        flag = hit.to(tl.int32)
        place = (first + run)[:, None] + tl.cumsum(flag, axis=1) - 1
        tl.store(lst + place, token[None, :] + tl.zeros([BC, BLOCK_E], tl.int32), mask=hit)
        run += tl.sum(flag, axis=1)
        total += tl.sum(tl.where(hit, w[None, :], 0.0), axis=1)
    tl.store(mass + j, total, mask=j < K)
    tl.debug_barrier()
    for e0 in range(base, filled, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        token = tl.load(lst + e, mask=e < filled, other=0)
        label = tl.load(lab + token, mask=e < filled, other=lo)
        p = coefficient(
            tl.load(wn + token, mask=e < filled, other=0.0),
            tl.load(mass + label, mask=e < filled, other=1.0),
            tl.load(cnt + label, mask=e < filled, other=1),
        )
        tl.store(coef + e, p, mask=e < filled)
    tl.debug_barrier()


@triton.jit
def mean_tile(
    x,
    m,
    scale,
    lst,
    coef,
    first,
    size,
    offs_d,
    D,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """sum over the members lst[first .. first + size) of coef * row, for one feature tile (BD,), in fixed order:
    lane r adds members r, r + R, ..., then the R lanes are added."""
    acc = tl.zeros([R, BD], tl.float32)
    for e0 in range(0, size, R):
        e = e0 + tl.arange(0, R)
        live = e < size
        token = tl.load(lst + first + e, mask=live, other=0)
        p = tl.load(coef + first + e, mask=live, other=0.0)
        rows = load_rows(x, m, scale, token, live, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG)
        acc += tl.where(live[:, None], p[:, None] * rows, 0.0)
    return tl.sum(acc, axis=0)


@kernel
def update_kernel(
    x,
    scale,
    center,
    wn,
    keff,
    done,
    lab,
    counts,
    next_counts,
    tmp,
    lst,
    coef,
    start,
    cnt,
    mass,
    high,
    low,
    norms,
    medoids,
    N,
    D,
    K,
    tiles,
    x_b,
    x_n,
    x_d,
    means,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    MEDOIDS: tl.constexpr,
    BC: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Member lists of BC clusters of one image and, when `means` is 1, their centers (or medoids).

    next_counts (B, K) is cleared for the next assignment.  Reads N labels and the members' rows.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    if tl.load(done + b) != 0:
        return
    lo = ((pid % tiles) * BC).to(tl.int32)
    clusters = tl.load(keff + b)
    s = tl.load(scale + b)
    j = lo + tl.arange(0, BC)
    tl.store(next_counts + b * K + j, tl.zeros([BC], tl.int32), mask=j < K)
    lst += b * N
    coef += b * N
    _lists(
        lab + b * N,
        wn + b * N,
        counts + b * K,
        lo,
        K,
        N,
        tmp + b * N,
        lst,
        coef,
        start + b * K,
        cnt + b * K,
        mass + b * K,
        BC,
        BLOCK,
        BLOCK_E,
        BLOCK_K,
    )
    if means == 0:
        return
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    center += b * D
    for c in range(lo, tl.minimum(lo + BC, clusters)):
        at = b * K + c
        first = tl.load(start + at)
        size = tl.load(cnt + at)
        total = 0.0
        for d0 in range(0, D, BD):
            offs_d = d0 + tl.arange(0, BD)
            y = mean_tile(x, center, s, lst, coef, first, size, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG, R, BD)
            kept = _store_center(high, low, at * D + offs_d, y, offs_d < D, SPLIT)
            total += tl.sum(kept * kept, axis=0)
        if MEDOIDS:
            tl.debug_barrier()
            zero = tl.load(mass + at) == 0
            best = float("inf")
            chosen = tl.load(lst + first, mask=size > 0, other=0)
            for e0 in range(0, size, R):
                e = e0 + tl.arange(0, R)
                token = tl.load(lst + first + e, mask=e < size, other=0)
                distance = tl.zeros([R], tl.float32)
                for d0 in range(0, D, BD):
                    offs_d = d0 + tl.arange(0, BD)
                    rows = load_rows(x, center, s, token, e < size, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG)
                    mu = tl.load(high + at * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
                    if SPLIT:
                        mu += tl.load(low + at * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
                    gap = tl.where((e < size)[:, None], rows - mu[None, :], 0.0)
                    distance += tl.sum(gap * gap, axis=1)
                distance = no_nan(distance, float("inf"))
                if size == 2:  # both are equally far from the mean up to its rounding: the heavier one decides
                    distance = -tl.load(wn + b * N + token, mask=e < size, other=0.0)
                distance = tl.where(e < size, distance, float("inf"))
                least, where = tl.min(distance, axis=0, return_indices=True)
                win = (least < best) & (zero == 0)
                at_token = tl.load(lst + first + e0 + where, mask=win, other=0)
                chosen = tl.where(win, at_token, chosen)
                best = tl.where(win, least, best)
            tl.debug_barrier()
            total = 0.0
            for d0 in range(0, D, BD):
                offs_d = d0 + tl.arange(0, BD)
                tile = load_rows(
                    x,
                    center,
                    s,
                    chosen + tl.zeros([1], tl.int32),
                    tl.full([1], True, tl.int1),
                    offs_d,
                    D,
                    x_n,
                    x_d,
                    CENTER,
                    SCALE,
                    CONTIG,
                )
                kept = _store_center(high, low, at * D + offs_d, tl.sum(tile, axis=0), offs_d < D, SPLIT)
                total += tl.sum(kept * kept, axis=0)
            tl.store(medoids + at, chosen)
        tl.store(norms + at, total)
