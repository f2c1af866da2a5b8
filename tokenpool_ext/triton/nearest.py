"""Nearest centers of tokens, without a matrix of size N x K: by products, or exactly, by differences.

Where products cannot tell an image's distances apart (groups far from each other, one token very much longer than the
others), which its first assignment shows, `resolve_kernel` marks it in `exact`, and it is assigned by differences.
"""

import triton
import triton.language as tl

from .device import better, eights, image_of, kernel, load_rows, no_nan, product, unresolved

NARROW = tl.constexpr(16)  # clusters at a time beside the tiles of a product, for want of registers


@triton.jit
def by_products(
    x,
    center,
    s,
    i,
    valid,
    clusters,
    high,
    low,
    norms,
    D,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    HOLD: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """(squared distance less the token's squared norm, label, squared norm) of the tokens i, as ||c||^2 - 2 y . c."""
    if HOLD:
        hold = load_rows(x, center, s, i, valid, tl.arange(0, BD), D, x_n, x_d, CENTER, SCALE, CONTIG)
        own = tl.sum(hold * hold, axis=1)
        tile = hold.to(high.dtype.element_ty)
    best = tl.full([BN], float("inf"), tl.float32)
    arg = tl.zeros([BN], tl.int32)
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
        q = tl.load(norms + j, mask=j < clusters, other=0.0)
        value = tl.where((j < clusters)[None, :], no_nan(q[None, :] - 2.0 * acc, float("inf")), float("inf"))
        least, where = tl.min(value, axis=1, return_indices=True)
        best, arg = better(least, j0 + where, best, arg)
    if not HOLD:  # after the loop, for want of registers
        own = tl.zeros([BN], tl.float32)
        for d0 in range(0, D, BD):
            part = load_rows(x, center, s, i, valid, d0 + tl.arange(0, BD), D, x_n, x_d, CENTER, SCALE, CONTIG)
            own += tl.sum(part * part, axis=1)
    return best, arg, own


@triton.jit
def by_differences(
    x,
    center,
    s,
    i,
    valid,
    clusters,
    high,
    low,
    D,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """(squared distance, label) of the tokens i: sums over features, in their order, of squared differences."""
    best = tl.full([BN], float("inf"), tl.float32)
    arg = tl.zeros([BN], tl.int32)
    for j0 in range(0, clusters, BK):
        j = j0 + tl.arange(0, BK)
        total = tl.zeros([BN, BK], tl.float32)
        for d in range(0, D):
            column = load_rows(x, center, s, i, valid, d + tl.arange(0, 1), D, x_n, x_d, CENTER, SCALE, CONTIG)
            at = j.to(tl.int64) * D + d
            c = tl.load(high + at, mask=j < clusters, other=0.0).to(tl.float32)
            if SPLIT:
                c += tl.load(low + at, mask=j < clusters, other=0.0).to(tl.float32)
            gap = column - c[None, :]
            total += gap * gap
        value = tl.where((j < clusters)[None, :], no_nan(total, float("inf")), float("inf"))
        least, where = tl.min(value, axis=1, return_indices=True)
        best, arg = better(least, j0 + where, best, arg)
    return best, arg


@triton.jit
def store_labels(
    distance, arg, i, valid, wn, clusters, medoids, lab, cost, counts, N, MEDOIDS: tl.constexpr, BK: tl.constexpr
):
    """Labels and weighted distances of the tokens i; counts += members (integer atomics).  A medoid belongs to its own
    cluster, the lowest if several name it.  Pointers are the image's."""
    if MEDOIDS:
        mine = tl.zeros_like(i) + 2147483647
        for j0 in range(0, clusters, BK):
            j = j0 + tl.arange(0, BK)
            medoid = tl.load(medoids + j, mask=j < clusters, other=-1)
            names = tl.where(medoid[None, :] == i[:, None], j[None, :], 2147483647)
            mine = tl.minimum(mine, tl.min(names, axis=1))
        arg = tl.where(mine < 2147483647, mine, arg)
        distance = tl.where(mine < 2147483647, 0.0, distance)
    tl.store(lab + i, tl.where(valid, arg, -1), mask=i < N)
    tl.store(cost + i, tl.load(wn + i, mask=i < N, other=0.0) * distance, mask=i < N)
    tl.atomic_add(counts + arg, 1, mask=valid, sem="relaxed")


@kernel
def assign_kernel(
    x,
    scale,
    center,
    wn,
    keff,
    done,
    exact,
    high,
    low,
    norms,
    medoids,
    lab,
    cost,
    squares,
    counts,
    N,
    D,
    K,
    tiles,
    x_b,
    x_n,
    x_d,
    first,
    only_exact,
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
    """argmin_j ||y_i - c_j||^2 for BN tokens of one image.

    x (B, N, D) any strides; high, low (B, K, D) in x's dtype (low only with SPLIT); norms float32 (B, K);
    lab int32, cost float32 (B, N): w_i * distance; counts int32 (B, K) += members.  `first` 1: squares float32 (B, N)
    = squared norms.  `only_exact` 1: for images marked in `exact` alone.
    HOLD: D <= BD, so the token tile is loaded once and stays.  Reads N D + ceil(N / BN) K D elements an image.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    differences = tl.load(exact + b)
    if (tl.load(done + b) != 0) | ((only_exact != 0) & (differences == 0)):
        return
    i = ((pid % tiles) * BN).to(tl.int32) + tl.arange(0, BN)
    clusters = tl.load(keff + b)
    s = tl.load(scale + b)
    valid = (i < N) & (tl.load(wn + b * N + i, mask=i < N, other=-1.0) != -1.0)
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    center += b * D
    high += b * K * D
    low += b * K * D
    norms += b * K
    if differences != 0:
        distance, arg = by_differences(
            x, center, s, i, valid, clusters, high, low, D, x_n, x_d, CENTER, SCALE, CONTIG, SPLIT, BN, NARROW
        )
    else:
        best, arg, own = by_products(
            x,
            center,
            s,
            i,
            valid,
            clusters,
            high,
            low,
            norms,
            D,
            x_n,
            x_d,
            CENTER,
            SCALE,
            CONTIG,
            SPLIT,
            PRECISION,
            HOLD,
            BN,
            BK,
            BD,
        )
        distance = tl.maximum(best + own, 0.0)
        if first != 0:
            tl.store(squares + b * N + i, own, mask=i < N)
    store_labels(
        distance,
        arg,
        i,
        valid,
        wn + b * N,
        clusters,
        medoids + b * K,
        lab + b * N,
        cost + b * N,
        counts + b * K,
        N,
        MEDOIDS,
        NARROW,
    )


@kernel
def resolve_kernel(wn, cost, squares, counts, exact, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program per image, after the first assignment: exact = 1, and counts = 0 again, where it was by rounding."""
    b = tl.program_id(0).to(tl.int64)
    if unresolved(cost + b * N, wn + b * N, squares + b * N, 1, N, BLOCK):
        tl.store(exact + b, 1)
        for k0 in range(0, K, BLOCK_K):
            j = k0 + tl.arange(0, BLOCK_K)
            tl.store(counts + b * K + j, tl.zeros([BLOCK_K], tl.int32), mask=j < K)
