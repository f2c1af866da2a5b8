"""The direct path (contract 4): three launches an iteration, whatever K is; nothing of size N x K in memory.

assign_kernel (nearest.py) -> settle_kernel (repair, early stop) -> update_kernel (member lists by counting sort, then
means or medoids).  All return at once for an image that is done.
"""

import triton
import triton.language as tl

from .device import (
    eights,
    first_that_counts,
    image_of,
    kernel,
    load_rows,
    mean_tile,
    narrow,
    no_nan,
    repair_image,
    settle_image,
)
from .lists import member_lists


@triton.jit
def store_center(high, low, at, value, live, SPLIT: tl.constexpr):
    """Store a float32 center row as `high` (+ `low`, its rounding error, for half types); returns what was kept."""
    top = narrow(value, high.dtype.element_ty)
    tl.store(high + at, top, mask=live)
    kept = top.to(tl.float32)
    if SPLIT:
        rest = narrow(value - kept, low.dtype.element_ty)
        tl.store(low + at, rest, mask=live)
        kept += rest.to(tl.float32)
    return tl.where(live, kept, 0.0)


@triton.jit
def center_on_token(
    x,
    center,
    s,
    token,
    high,
    low,
    D,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    BD: tl.constexpr,
):
    """The center at `high`, `low` becomes a token; returns its squared norm."""
    total = 0.0
    one = tl.full([1], True, tl.int1)
    for d0 in range(0, D, BD):
        offs_d = d0 + tl.arange(0, BD)
        row = load_rows(x, center, s, token + tl.zeros([1], tl.int32), one, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG)
        kept = store_center(high, low, offs_d, tl.sum(row, axis=0), offs_d < D, SPLIT)
        total += tl.sum(kept * kept, axis=0)
    return total


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
    center += b * D
    high += pid * D
    low += pid * D
    total = 0.0
    if FROM_TOKENS:
        token = tl.load(lst + b * N + j)
        total = center_on_token(x, center, s, token, high, low, D, x_n, x_d, CENTER, SCALE, CONTIG, SPLIT, BD)
        if MEDOIDS:
            tl.store(medoids + pid, token)
    else:
        for d0 in range(0, D, BD):
            offs_d = d0 + tl.arange(0, BD)
            y = tl.load(init + b * init_b + j * init_k + offs_d.to(tl.int64) * init_d, mask=offs_d < D, other=0.0)
            if SCALE:
                y = y * s
            if CENTER:
                y -= tl.load(center + offs_d, mask=offs_d < D, other=0.0)
            kept = store_center(high, low, offs_d, y, offs_d < D, SPLIT)
            total += tl.sum(kept * kept, axis=0)
    tl.store(norms + pid, total)


@kernel
def settle_kernel(keff, done, lab, prev, cost, wn, loss, counts, N, K, t, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program per image, iteration t: repair empty clusters, then mark the image done where it has settled."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done + b) != 0:
        return
    repaired = repair_image(lab + b * N, cost + b * N, counts + b * K, tl.load(keff + b), N, BLOCK, BLOCK_K)
    goes_on = settle_image(lab + b * N, prev + b * N, cost + b * N, wn + b * N, loss + b, t, repaired, N, BLOCK)
    tl.debug_barrier()
    tl.store(done + b, (goes_on == 0).to(tl.int32))


@triton.jit
def nearest_member(
    x,
    center,
    s,
    wn,
    lst,
    size,
    weight,
    high,
    low,
    D,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """The member nearest to the mean at `high`, `low`, the first of equals; of two the heavier one; where the weights
    add up to 0 the first.  lst: pointer to the first of `size` members."""
    best = float("inf")
    chosen = tl.load(lst, mask=size > 0, other=0)
    for e0 in range(0, size, R):
        e = e0 + tl.arange(0, R)
        token = tl.load(lst + e, mask=e < size, other=0)
        distance = tl.zeros([R], tl.float32)
        for d0 in range(0, D, BD):
            offs_d = d0 + tl.arange(0, BD)
            rows = load_rows(x, center, s, token, e < size, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG)
            mu = tl.load(high + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            if SPLIT:
                mu += tl.load(low + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            gap = tl.where((e < size)[:, None], rows - mu[None, :], 0.0)
            distance += tl.sum(gap * gap, axis=1)
        distance = no_nan(distance, float("inf"))
        w = tl.load(wn + token, mask=e < size, other=0.0)
        if size == 2:  # both are equally far from the mean up to its rounding: the heavier one decides
            distance = -w
        distance = tl.where(w > 0, distance, float("inf"))  # what weighs nothing moves nothing
        least, where = tl.min(distance, axis=0, return_indices=True)
        win = (least < best) & (weight != 0)
        at_token = tl.load(lst + e0 + where, mask=win, other=0)
        chosen = tl.where(win, at_token, chosen)
        best = tl.where(win, least, best)
    return chosen


@triton.jit
def move_centers(
    x,
    center,
    s,
    wn,
    lst,
    coef,
    start,
    cnt,
    mass,
    high,
    low,
    norms,
    medoids,
    lo,
    hi,
    D,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    MEDOIDS: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Means, or medoids, of the clusters lo .. hi - 1 from their member lists.  Pointers are the image's."""
    for c in range(lo, hi):
        first = tl.load(start + c)
        size = tl.load(cnt + c)
        at = D.to(tl.int64) * c
        lead = tl.load(lst + first + first_that_counts(coef + first, size, R), mask=size > 0, other=0)
        total = 0.0
        for d0 in range(0, D, BD):
            offs_d = d0 + tl.arange(0, BD)
            base, rest = mean_tile(
                x, s, lst + first, coef + first, size, lead, offs_d, D, x_n, x_d, SCALE, CONTIG, R, BD
            )
            if CENTER:
                base -= tl.load(center + offs_d, mask=offs_d < D, other=0.0)
            kept = store_center(high + at, low + at, offs_d, base + rest, offs_d < D, SPLIT)
            total += tl.sum(kept * kept, axis=0)
        if MEDOIDS:
            tl.debug_barrier()
            chosen = nearest_member(
                x,
                center,
                s,
                wn,
                lst + first,
                size,
                tl.load(mass + c),
                high + at,
                low + at,
                D,
                x_n,
                x_d,
                CENTER,
                SCALE,
                CONTIG,
                SPLIT,
                R,
                BD,
            )
            tl.debug_barrier()
            total = center_on_token(
                x, center, s, chosen, high + at, low + at, D, x_n, x_d, CENTER, SCALE, CONTIG, SPLIT, BD
            )
            tl.store(medoids + c, chosen)
        tl.store(norms + c, total)


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
    j = lo + tl.arange(0, BC)
    tl.store(next_counts + b * K + j, tl.zeros([BC], tl.int32), mask=j < K)
    member_lists(
        lab + b * N,
        wn + b * N,
        counts + b * K,
        lo,
        K,
        N,
        tmp + b * N,
        lst + b * N,
        coef + b * N,
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
    move_centers(
        x,
        center + b * D,
        tl.load(scale + b),
        wn + b * N,
        lst + b * N,
        coef + b * N,
        start + b * K,
        cnt + b * K,
        mass + b * K,
        high + b * K * D,
        low + b * K * D,
        norms + b * K,
        medoids + b * K,
        lo,
        tl.minimum(lo + BC, tl.load(keff + b)),
        D,
        x_n,
        x_d,
        CENTER,
        SCALE,
        CONTIG,
        SPLIT,
        MEDOIDS,
        R,
        BD,
    )
