"""The gram path (contract 4): one launch builds G = Y Y^T for a chunk of images, one launch runs all iterations.

Used while an image's Gram matrix stays in cache reach (heuristics.py).  After G, an iteration costs N^2 additions:
each token adds its row of G to its cluster's row, whatever D is.
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
    no_nan,
    product,
    repair_image,
    settle_image,
    unresolved,
)


@kernel
def gram_kernel(
    x,
    scale,
    center,
    wn,
    gram,
    N,
    D,
    row,
    tiles,
    x_b,
    x_n,
    x_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """gram[b, l, i] = y_l . y_i (float32, rows of `row` elements); padding gives zeros.

    One program per (image, tile pair); pairs above the diagonal return at once and are written by their mirror.
    Reads 2 B N D (N / BM) / 2 elements through L2, writes 4 B N^2 bytes.
    """
    pid = tl.program_id(0).to(tl.int64)
    tm = ((pid // tiles) % tiles).to(tl.int32)
    tn = (pid % tiles).to(tl.int32)
    if tn > tm:
        return
    b = pid // (tiles * tiles)
    row = eights(row)
    offs_m = tm * BM + tl.arange(0, BM)
    offs_n = tn * BM + tl.arange(0, BM)
    live_m = (offs_m < N) & (tl.load(wn + b * N + offs_m, mask=offs_m < N, other=-1.0) != -1.0)
    live_n = (offs_n < N) & (tl.load(wn + b * N + offs_n, mask=offs_n < N, other=-1.0) != -1.0)
    s = tl.load(scale + b)
    x = image_of(x, b, x_b, CONTIG)
    if CONTIG:
        D = eights(D)
    center += b * D
    acc = tl.zeros([BM, BM], tl.float32)
    for d0 in range(0, D, BD):
        offs_d = d0 + tl.arange(0, BD)
        left = load_rows(x, center, s, offs_m, live_m, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG)
        right = load_rows(x, center, s, offs_n, live_n, offs_d, D, x_n, x_d, CENTER, SCALE, CONTIG)
        left = left.to(x.dtype.element_ty)
        right = right.to(x.dtype.element_ty)
        acc = product(left, tl.trans(right), acc, PRECISION)
    inside = (offs_m < N)[:, None] & (offs_n < row)[None, :]  # rows are padded: 16-byte stores
    base = gram + b * N * row
    tl.store(base + offs_m.to(tl.int64)[:, None] * row + offs_n[None, :], acc, mask=inside)
    if tn < tm:
        mirror = (offs_n < N)[:, None] & (offs_m < row)[None, :]
        tl.store(base + offs_n.to(tl.int64)[:, None] * row + offs_m[None, :], tl.trans(acc), mask=mirror)


@triton.jit
def _assign(
    gram,
    wn,
    lab,
    cost,
    counts,
    norms,
    lst,
    coef,
    start,
    cnt,
    medoids,
    keff,
    N,
    row,
    MEDOIDS: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """Label and repair cost of every token of one image from the member lists; counts += members (integer atomics).

    Tiles of BJ clusters x BI tokens: step m adds the m-th member's row of G to each cluster's row, in member order.
    """
    for i0 in range(0, N, BI):
        i = i0 + tl.arange(0, BI)
        w = tl.load(wn + i, mask=i < N, other=-1.0)
        valid = (i < N) & (w != -1.0)
        own = tl.load(gram + i.to(tl.int64) * (row + 1), mask=i < N, other=0.0)
        best = tl.full([BI], float("inf"), tl.float32)
        arg = tl.zeros([BI], tl.int32)
        mine = tl.full([BI], 2147483647, tl.int32)
        for j0 in range(0, keff, BJ):
            j = j0 + tl.arange(0, BJ)
            first = tl.load(start + j, mask=j < keff, other=0)
            size = tl.load(cnt + j, mask=j < keff, other=0)
            acc = tl.zeros([BJ, BI], tl.float32)
            for m in range(0, tl.max(size, axis=0)):
                p = tl.load(coef + first + m, mask=m < size, other=0.0)
                live = p != 0  # what has no share may be infinite
                token = tl.load(lst + first + m, mask=live, other=0)
                g = tl.load(
                    gram + token.to(tl.int64)[:, None] * row + i[None, :],
                    mask=live[:, None] & (i < row)[None, :],
                    other=0.0,
                )
                acc += tl.where(live[:, None], p[:, None] * g, 0.0)
            q = tl.load(norms + j, mask=j < keff, other=0.0)
            value = q[:, None] - 2.0 * acc
            value = tl.where((j < keff)[:, None], no_nan(value, float("inf")), float("inf"))
            low, at = tl.min(value, axis=0, return_indices=True)
            best, arg = better(low, j0 + at, best, arg)
            if MEDOIDS:
                medoid = tl.load(medoids + j, mask=j < keff, other=-1)
                names = tl.where(medoid[:, None] == i[None, :], j[:, None], 2147483647)
                mine = tl.minimum(mine, tl.min(names, axis=0))
        distance = tl.maximum(best + own, 0.0)
        if MEDOIDS:
            arg = tl.where(mine < 2147483647, mine, arg)
            distance = tl.where(mine < 2147483647, 0.0, distance)
        tl.store(lab + i, tl.where(valid, arg, -1), mask=i < N)
        tl.store(cost + i, w * distance, mask=i < N)
        tl.atomic_add(counts + arg, 1, mask=valid, sem="relaxed")


@triton.jit
def _update(
    gram,
    wn,
    lab,
    share,
    inner,
    norms,
    lst,
    coef,
    start,
    cnt,
    mass,
    medoids,
    N,
    row,
    MEDOIDS: tl.constexpr,
    TI: tl.constexpr,
    TL: tl.constexpr,
):
    """Member lists (a stable counting sort by rank), masses, shares, center norms and medoids from the labels.

    Each pass compares every token i with every token l: its cost does not depend on how the labels are distributed.
    """
    for i0 in range(0, N, TI):  # pass 1: rank, size and weight of each token's cluster
        i = i0 + tl.arange(0, TI)
        label = tl.load(lab + i, mask=i < N, other=-1)
        w = tl.load(wn + i, mask=i < N, other=0.0)
        ranks = tl.zeros([TI, TL], tl.int32)  # members of the cluster before i
        belows = tl.zeros([TI, TL], tl.int32)  # tokens in lower clusters
        sizes = tl.zeros([TI, TL], tl.int32)
        totals = tl.zeros([TI, TL], tl.float32)
        for l0 in range(0, N, TL):
            k = l0 + tl.arange(0, TL)
            other = tl.load(lab + k, mask=k < N, other=-1)
            wk = tl.load(wn + k, mask=k < N, other=0.0)
            real = (other >= 0)[None, :]
            same = (other[None, :] == label[:, None]) & real
            ranks += (same & (k[None, :] < i[:, None])).to(tl.int32)
            belows += ((other[None, :] < label[:, None]) & real).to(tl.int32)
            sizes += same.to(tl.int32)
            totals += tl.where(same, wk[None, :], 0.0)
        rank = tl.sum(ranks, axis=1)
        below = tl.sum(belows, axis=1)
        size = tl.sum(sizes, axis=1)
        total = tl.sum(totals, axis=1)
        valid = label >= 0
        p = coefficient(w, total, size)
        tl.store(lst + below + rank, i, mask=valid)
        tl.store(coef + below + rank, p, mask=valid)
        tl.store(share + i, p, mask=valid)
        leader = valid & (rank == 0)
        tl.store(start + label, below, mask=leader)
        tl.store(cnt + label, size, mask=leader)
        tl.store(mass + label, total, mask=leader)
    tl.debug_barrier()
    for i0 in range(0, N, TI):  # pass 2: inner product of each token with its cluster's mean
        i = i0 + tl.arange(0, TI)
        label = tl.load(lab + i, mask=i < N, other=-1)
        products = tl.zeros([TI, TL], tl.float32)
        for l0 in range(0, N, TL):
            k = l0 + tl.arange(0, TL)
            other = tl.load(lab + k, mask=k < N, other=-1)
            p = tl.load(share + k, mask=other >= 0, other=0.0)
            same = (other[None, :] == label[:, None]) & (p != 0)[None, :]
            g = tl.load(gram + k.to(tl.int64)[None, :] * row + i[:, None], mask=same, other=0.0)
            products += tl.where(same, p[None, :] * g, 0.0)
        tl.store(inner + i, tl.sum(products, axis=1), mask=label >= 0)
    tl.debug_barrier()
    for i0 in range(0, N, TI):  # pass 3: squared norm of the mean; or the member nearest to it
        i = i0 + tl.arange(0, TI)
        label = tl.load(lab + i, mask=i < N, other=-1)
        valid = label >= 0
        if MEDOIDS:
            zero = tl.load(mass + label, mask=valid, other=1.0) == 0
            # Of two members both are equally far from the mean up to its rounding: the heavier one decides.
            pair = tl.load(cnt + label, mask=valid, other=0) == 2
            e = tl.load(gram + i.to(tl.int64) * (row + 1), mask=valid, other=0.0)
            e = no_nan(e - 2.0 * tl.load(inner + i, mask=valid, other=0.0), float("inf"))
            w = tl.load(wn + i, mask=valid, other=0.0)
            e = tl.where(w > 0, e, float("inf"))  # what weighs nothing moves nothing
            beaten = tl.zeros([TI, TL], tl.int32)
            for l0 in range(0, N, TL):
                k = l0 + tl.arange(0, TL)
                other = tl.load(lab + k, mask=k < N, other=-1)
                same = (other[None, :] == label[:, None]) & (other >= 0)[None, :]
                ek = tl.load(gram + k.to(tl.int64) * (row + 1), mask=other >= 0, other=0.0)
                ek = no_nan(ek - 2.0 * tl.load(inner + k, mask=other >= 0, other=0.0), float("inf"))
                wk = tl.load(wn + k, mask=other >= 0, other=0.0)
                ek = tl.where(wk > 0, ek, float("inf"))
                before = k[None, :] < i[:, None]
                ahead = (ek[None, :] < e[:, None]) | ((ek[None, :] == e[:, None]) & before)
                heavier = (wk[None, :] > w[:, None]) | ((wk[None, :] == w[:, None]) & before)
                ahead = tl.where(pair[:, None], heavier, ahead)
                ahead = tl.where(zero[:, None], before, ahead)
                beaten += (same & ahead).to(tl.int32)
            chosen = valid & (tl.sum(beaten, axis=1) == 0)
            tl.store(medoids + label, i, mask=chosen)
            tl.store(norms + label, tl.load(gram + i.to(tl.int64) * (row + 1), mask=chosen, other=0.0), mask=chosen)
        else:
            first = tl.load(lst + tl.load(start + label, mask=valid, other=0), mask=valid, other=-1)
            squares = tl.zeros([TI, TL], tl.float32)
            for l0 in range(0, N, TL):
                k = l0 + tl.arange(0, TL)
                other = tl.load(lab + k, mask=k < N, other=-1)
                p = tl.load(share + k, mask=other >= 0, other=0.0)
                same = (other[None, :] == label[:, None]) & (p != 0)[None, :]
                h = tl.load(inner + k, mask=other >= 0, other=0.0)
                squares += tl.where(same, (p * h)[None, :], 0.0)
            tl.store(norms + label, tl.sum(squares, axis=1), mask=valid & (first == i))
    tl.debug_barrier()


@kernel
def iterate_kernel(
    gram,
    wn,
    keff,
    lab,
    prev,
    cost,
    counts,
    loss,
    exact,
    share,
    inner,
    norms,
    lst,
    coef,
    start,
    cnt,
    mass,
    medoids,
    unit_coef,
    unit_start,
    unit_cnt,
    N,
    K,
    row,
    num_iters,
    labelled,
    MEDOIDS: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    TI: tl.constexpr,
    TL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All iterations of one image in one program; an image that has settled stops by itself.  One whose distances its
    Gram matrix cannot resolve, which the first assignment shows, is marked in `exact` and left to exact_kernel.

    gram float32 (Bc, N, row); loss float64 (Bc,).  Per-image scratch: lab, prev, lst int32 (N,); cost, share, inner,
    coef float32 (N,); counts, start, cnt, medoids int32 (K,); norms, mass float32 (K,).  On entry lst / coef / start /
    cnt describe the initial centers as lists of tokens (prepare.py), unless `labelled` is 1: then lab, cost and counts
    already hold the first assignment (to given centers).  With MEDOIDS, lst is only written at an update, `medoids`
    holds the centers, and unit_* (of K elements, shared by all images) describe lists of one token.  On exit prev holds
    the labels, and lst / coef / start / cnt / mass (and medoids) describe them.
    """
    b = tl.program_id(0).to(tl.int64)
    row = eights(row)
    gram += b * N * row
    wn += b * N
    lab += b * N
    prev += b * N
    cost += b * N
    share += b * N
    inner += b * N
    lst += b * N
    coef += b * N
    counts += b * K
    start += b * K
    cnt += b * K
    norms += b * K
    mass += b * K
    medoids += b * K
    clusters = tl.load(keff + b)
    offs_k = tl.arange(0, BLOCK_K)
    if labelled == 0:
        for k0 in range(0, clusters, BLOCK_K):
            j = k0 + offs_k
            token = tl.load(lst + j, mask=j < clusters, other=0)
            tl.store(
                norms + j,
                tl.load(gram + token.to(tl.int64) * (row + 1), mask=j < clusters, other=0.0),
                mask=j < clusters,
            )
            if MEDOIDS:
                tl.store(medoids + j, token, mask=j < clusters)
        tl.debug_barrier()
    t = 0
    goes_on = 1
    while (t < num_iters) & (goes_on > 0):
        if (t > 0) | (labelled == 0):
            for k0 in range(0, clusters, BLOCK_K):
                tl.store(counts + k0 + offs_k, tl.zeros([BLOCK_K], tl.int32), mask=k0 + offs_k < clusters)
            tl.debug_barrier()
            if MEDOIDS:
                _assign(
                    gram,
                    wn,
                    lab,
                    cost,
                    counts,
                    norms,
                    medoids,
                    unit_coef,
                    unit_start,
                    unit_cnt,
                    medoids,
                    clusters,
                    N,
                    row,
                    MEDOIDS,
                    BI,
                    BJ,
                )
            else:
                _assign(
                    gram,
                    wn,
                    lab,
                    cost,
                    counts,
                    norms,
                    lst,
                    coef,
                    start,
                    cnt,
                    medoids,
                    clusters,
                    N,
                    row,
                    MEDOIDS,
                    BI,
                    BJ,
                )
            tl.debug_barrier()
        if t == 0:
            if unresolved(cost, wn, gram, row + 1, N, BLOCK):
                goes_on = 0
                tl.store(exact + b, 1)
        if goes_on > 0:
            repaired = repair_image(lab, cost, counts, clusters, N, BLOCK, BLOCK_K)
            goes_on = settle_image(lab, prev, cost, wn, loss + b, t, repaired, N, BLOCK)
            if goes_on > 0:
                _update(
                    gram, wn, lab, share, inner, norms, lst, coef, start, cnt, mass, medoids, N, row, MEDOIDS, TI, TL
                )
        t += 1
        tl.debug_barrier()
