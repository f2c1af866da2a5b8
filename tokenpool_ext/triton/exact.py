"""Images whose distances their Gram matrix cannot resolve, as iterate_kernel marks them: all iterations of one image by
one program, from the tokens, with the means of the direct path and assignments by differences."""

import triton.language as tl

from .device import eights, image_of, kernel, repair_image, settle_image
from .direct import center_on_token, move_centers
from .lists import member_lists
from .nearest import by_differences, store_labels
from .start import pick_farthest


@kernel
def exact_kernel(
    x,
    scale,
    center,
    wn,
    keff,
    exact,
    lab,
    prev,
    cost,
    counts,
    loss,
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
    x_b,
    x_n,
    x_d,
    num_iters,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    SPLIT: tl.constexpr,
    FROM_TOKENS: tl.constexpr,
    FARTHEST: tl.constexpr,
    MEDOIDS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns at once for an image that is not marked.  On entry lst (FROM_TOKENS) or high and low hold the initial
    centers, prev labels of no iteration; on exit all is as iterate_kernel leaves it."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(exact + b) == 0:
        return
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    s = tl.load(scale + b)
    clusters = tl.load(keff + b)
    center += b * D
    wn += b * N
    lab += b * N
    prev += b * N
    cost += b * N
    tmp += b * N
    lst += b * N
    coef += b * N
    counts += b * K
    start += b * K
    cnt += b * K
    mass += b * K
    norms += b * K
    medoids += b * K
    high += b * K * D
    low += b * K * D
    if FARTHEST:
        pick_farthest(x, s, wn, lst, coef, cost, clusters, N, D, x_n, x_d, SCALE, CONTIG, BN, BD, BLOCK)
        tl.debug_barrier()
    if FROM_TOKENS:
        for c in range(0, clusters):
            token = tl.load(lst + c)
            at = D.to(tl.int64) * c
            center_on_token(x, center, s, token, high + at, low + at, D, x_n, x_d, CENTER, SCALE, CONTIG, SPLIT, BD)
            if MEDOIDS:
                tl.store(medoids + c, token)
    t = 0
    goes_on = 1
    while (t < num_iters) & (goes_on > 0):
        for k0 in range(0, K, BLOCK_K):
            j = k0 + tl.arange(0, BLOCK_K)
            tl.store(counts + j, tl.zeros([BLOCK_K], tl.int32), mask=j < K)
        tl.debug_barrier()
        for n0 in range(0, N, BN):
            i = n0 + tl.arange(0, BN)
            valid = (i < N) & (tl.load(wn + i, mask=i < N, other=-1.0) != -1.0)
            distance, arg = by_differences(
                x, center, s, i, valid, clusters, high, low, D, x_n, x_d, CENTER, SCALE, CONTIG, SPLIT, BN, BK
            )
            store_labels(distance, arg, i, valid, wn, clusters, medoids, lab, cost, counts, N, MEDOIDS, BK)
        tl.debug_barrier()
        repaired = repair_image(lab, cost, counts, clusters, N, BLOCK, BLOCK_K)
        goes_on = settle_image(lab, prev, cost, wn, loss + b, t, repaired, N, BLOCK)
        tl.debug_barrier()
        if goes_on > 0:
            for lo in range(0, clusters, BC):
                member_lists(lab, wn, counts, lo, K, N, tmp, lst, coef, start, cnt, mass, BC, BLOCK, BLOCK_E, BLOCK_K)
                move_centers(
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
                    tl.minimum(lo + BC, clusters),
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
        t += 1
        tl.debug_barrier()
