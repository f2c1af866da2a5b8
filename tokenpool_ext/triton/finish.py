"""From member lists to results: centers in the input's dtype, masses, labels (sorted or not), inertia."""

import triton.language as tl

from .device import eights, first_that_counts, image_of, kernel, load_rows, mean_tile, narrow


@kernel
def finish_kernel(
    x,
    scale,
    unscale,
    wn,
    w_unscale,
    keff,
    lst,
    coef,
    start,
    cnt,
    mass,
    medoids,
    centers_out,
    label_out,
    mass_out,
    medoid_out,
    part,
    apart,
    N,
    D,
    K,
    x_b,
    x_n,
    x_d,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    MEDOIDS: tl.constexpr,
    SORT: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (image, cluster).  Outputs, all contiguous: centers_out (B, K, D) x.dtype; label_out int64
    (B, N), already -1 for padding; mass_out float32 (B, K); medoid_out int64 (B, K); part float32 (B, K): the
    cluster's share of the inertia, in scaled units.  K-Means: medoid_out is the member nearest to the mean; apart
    float32 (B, N) is room for the members' squared distances.  Reads every member's row (from L2 the second time).

    A mean is the first member that counts plus the mean difference from it, so equal members come back bit for bit.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    j = (pid % K).to(tl.int32)
    live_cluster = j < tl.load(keff + b)
    size = tl.load(cnt + pid, mask=live_cluster, other=0)
    first = tl.load(start + pid, mask=live_cluster, other=0)
    lst += b * N
    coef += b * N
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    s = tl.load(scale + b)
    back = tl.load(unscale + b)
    offs = tl.arange(0, BLOCK)
    rank = j
    if SORT:
        if size > 0:
            mine = tl.load(lst + first)
            rank = 0
            for k0 in range(0, K, BLOCK):
                k = k0 + offs
                other_size = tl.load(cnt + b * K + k, mask=k < K, other=0)
                other = tl.load(
                    lst + tl.load(start + b * K + k, mask=other_size > 0, other=0),
                    mask=other_size > 0,
                    other=2147483647,
                )
                rank += tl.sum((other < mine).to(tl.int32), axis=0)
    for e0 in range(0, size, BLOCK):
        e = e0 + offs
        token = tl.load(lst + first + e, mask=e < size, other=0)
        tl.store(label_out + b * N + token, rank + tl.zeros([BLOCK], tl.int64), mask=e < size)
    out = b * K + rank
    total_mass = tl.load(mass + pid, mask=size > 0, other=0.0)
    tl.store(mass_out + out, total_mass * tl.load(w_unscale + b))
    medoid = 0
    if MEDOIDS:
        medoid = tl.load(medoids + pid, mask=size > 0, other=0)
        tl.store(medoid_out + out, tl.where(size > 0, medoid, -1).to(tl.int64))
    lead = medoid
    if not MEDOIDS:
        lead = tl.load(lst + first + first_that_counts(coef + first, size, R), mask=size > 0, other=0)
    loss = tl.zeros([R], tl.float64)
    for d0 in range(0, D, BD):
        offs_d = d0 + tl.arange(0, BD)
        inside = offs_d < D
        if MEDOIDS:
            row = tl.load(
                x + medoid.to(tl.int64) * x_n + offs_d.to(tl.int64) * x_d,  # type: ignore[attr-defined]  # on the GPU
                mask=offs_d < tl.where(size > 0, D, 0),
                other=0.0,
            )
            tl.store(centers_out + out * D + offs_d, row, mask=inside)
            mean = row.to(tl.float32)
            if SCALE:
                mean = mean * s
        else:
            base, rest = mean_tile(
                x, s, lst + first, coef + first, size, lead, offs_d, D, x_n, x_d, SCALE, CONTIG, R, BD
            )
            mean = base + rest
            tl.store(
                centers_out + out * D + offs_d,
                narrow(tl.where(size > 0, mean * back, 0.0), centers_out.dtype.element_ty),
                mask=inside,
            )
        for e0 in range(0, size, R):
            e = e0 + tl.arange(0, R)
            live = e < size
            token = tl.load(lst + first + e, mask=live, other=0)
            w = tl.load(wn + b * N + token, mask=live, other=0.0)
            rows = load_rows(x, x, s, token, live, offs_d, D, x_n, x_d, False, SCALE, CONTIG)
            gap = tl.where(live[:, None] & inside[None, :], rows - mean[None, :], 0.0)
            squares = tl.sum(gap * gap, axis=1)
            loss += tl.where(w != 0, squares * w, 0.0).to(tl.float64)
            if not MEDOIDS:
                before = tl.load(apart + b * N + token, mask=e < size * (d0 // BD), other=0.0)
                tl.store(apart + b * N + token, before + squares, mask=live)
        if not MEDOIDS:
            tl.debug_barrier()  # of the distances: the next tile adds to them, then they are compared
    tl.store(part + pid, tl.sum(loss, axis=0).to(tl.float32))
    if not MEDOIDS:
        # The nearest member, the first of equals; of two that differ the heavier one, for rounding would break every
        # tie of theirs.
        least = float("inf")
        most = 0.0
        nearest = tl.load(lst + first, mask=size > 0, other=-1)
        heaviest = tl.load(wn + b * N + nearest, mask=size > 0, other=0.0)
        heavier = nearest
        for e0 in range(0, size, BLOCK):
            e = e0 + offs
            token = tl.load(lst + first + e, mask=e < size, other=2147483647)
            far = tl.load(apart + b * N + token, mask=e < size * tl.minimum(D, 1), other=0.0)
            w = tl.load(wn + b * N + token, mask=e < size, other=-1.0)
            far = tl.where((e < size) & (far == far), far, float("inf"))
            lowest = tl.min(far, axis=0)
            if lowest < least:
                nearest = tl.min(tl.where(far == lowest, token, 2147483647), axis=0)
                least = lowest
            most = tl.maximum(most, tl.max(tl.where(e < size, far, 0.0), axis=0))
            heavy = tl.max(w, axis=0)
            if heavy > heaviest:
                heavier = tl.min(tl.where(w == heavy, token, 2147483647), axis=0)
                heaviest = heavy
        if size == 2:
            nearest = tl.where(most > 0, heavier, nearest)
        tl.store(medoid_out + out, nearest.to(tl.int64))


@kernel
def inertia_kernel(part, unscale, w_unscale, inertia, K, BLOCK: tl.constexpr):
    """One program per image: inertia (B,) float32 = the sum of part (B, K) in a fixed order, in the input's units,
    saturated at the largest float32 (NaN and Inf of the input show as NaN)."""
    b = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float64)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        acc += tl.load(part + b * K + k, mask=k < K, other=0.0).to(tl.float64)
    back = tl.load(unscale + b).to(tl.float64)
    total = tl.sum(acc, axis=0) * tl.load(w_unscale + b).to(tl.float64) * back * back
    tl.store(inertia + b, tl.where(total > 3.4028234663852886e38, 3.4028234663852886e38, total).to(tl.float32))
