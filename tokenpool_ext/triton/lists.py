"""Member lists of clusters, in token order: a counting sort by label, whose result every mean is made from."""

import triton
import triton.language as tl

from .device import coefficient, kahan, kernel


@triton.jit
def member_lists(
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
    carry = tl.zeros([BC], tl.float32)
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
        total, carry = kahan(total, carry, tl.sum(tl.where(hit, w[None, :], 0.0), axis=1))
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


@kernel
def lists_kernel(
    wn,
    lab,
    counts,
    tmp,
    lst,
    coef,
    start,
    cnt,
    mass,
    N,
    K,
    tiles,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The lists of given labels (for pool): one program per BC clusters of one image."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    member_lists(
        lab + b * N,
        wn + b * N,
        counts + b * K,
        ((pid % tiles) * BC).to(tl.int32),
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
