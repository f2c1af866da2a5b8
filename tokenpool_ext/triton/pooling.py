"""pool, unpool and their gradients for given labels: counting sort, then segmented means in a fixed order."""

import triton.language as tl

from .device import coefficient, first_that_counts, kahan, kernel, narrow


@kernel
def labels_kernel(
    assignment,
    weights,
    lab,
    wn,
    counts,
    N,
    K,
    total,
    a_b,
    a_n,
    w_b,
    w_n,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int64 labels (any strides) -> int32 lab (B, N), -1 where outside 0 .. K - 1; wn float32 (B, N), 1 without
    weights; counts int32 (B, K) += members (integer atomics).  One program per BLOCK of all `total` = B N tokens."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = at // N
    i = at % N
    label = tl.load(assignment + b * a_b + i * a_n, mask=at < total, other=-1)
    label = tl.where((label >= 0) & (label < K), label, -1).to(tl.int32)
    w = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_WEIGHTS:
        w = tl.load(weights + b * w_b + i * w_n, mask=at < total, other=0.0)
    tl.store(lab + at, label, mask=at < total)
    tl.store(wn + at, w, mask=at < total)
    tl.atomic_add(counts + b * K + label, 1, mask=label >= 0, sem="relaxed")


@kernel
def segment_kernel(
    x, lst, coef, start, cnt, out, N, D, K, x_b, x_n, x_d, MEAN: tl.constexpr, R: tl.constexpr, BD: tl.constexpr
):
    """out (B, K, D) = sum over a cluster's members, in a fixed order, of coef * row (MEAN) or of row.

    One program per (image, cluster); x (B, N, D) any strides; compensated float32 sums.  A mean is the first member
    that counts plus the mean difference from it, so that equal members give themselves; members of coef 0 are not read.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    first = tl.load(start + pid)
    size = tl.load(cnt + pid)
    lst += b * N + first
    coef += b * N + first
    lead = 0
    if MEAN:
        lead = tl.load(lst + first_that_counts(coef, size, R), mask=size > 0, other=0)
    for d0 in range(0, D, BD):
        offs_d = d0 + tl.arange(0, BD)
        acc = tl.zeros([R, BD], tl.float32)
        carry = tl.zeros([R, BD], tl.float32)
        shift = tl.zeros([BD], tl.float32)
        if MEAN:
            row = lead.to(tl.int64)  # type: ignore[attr-defined]  # an int for Python, a number on the GPU
            at = x + b * x_b + row * x_n + offs_d.to(tl.int64) * x_d
            shift = tl.load(at, mask=offs_d < tl.where(size > 0, D, 0), other=0.0).to(tl.float32)
        for e0 in range(0, size, R):
            e = e0 + tl.arange(0, R)
            live = e < size
            token = tl.load(lst + e, mask=live, other=0)
            p = tl.full([R], 1.0, tl.float32)
            if MEAN:
                p = tl.load(coef + e, mask=live, other=0.0)
                live = live & (p != 0)
            rows = tl.load(
                x + b * x_b + token.to(tl.int64)[:, None] * x_n + offs_d.to(tl.int64)[None, :] * x_d,
                mask=live[:, None] & (offs_d < D)[None, :],
                other=0.0,
            ).to(tl.float32)
            if MEAN:
                rows = 2.0 * p[:, None] * (0.5 * rows - 0.5 * shift[None, :])
                rows = tl.where(live[:, None], rows, 0.0)
            acc, carry = kahan(acc, carry, rows)
        total = shift + tl.sum(acc, axis=0)
        tl.store(out + pid * D + offs_d, narrow(total, out.dtype.element_ty), mask=offs_d < D)


@kernel
def pool_backward_kernel(
    grad,
    x,
    centers,
    lab,
    wn,
    mass,
    counts,
    grad_x,
    grad_w,
    N,
    D,
    K,
    tiles,
    g_b,
    g_k,
    g_d,
    x_b,
    x_n,
    x_d,
    c_b,
    c_k,
    c_d,
    HAS_WEIGHTS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """grad_x_i = share_i g[a_i] and, HAS_WEIGHTS, grad_w_i = (x_i - c_{a_i}) . g[a_i] / W (0 when W = 0); one program
    per (image, BN tokens).  grad, centers (B, K, D) and x (B, N, D) any strides; mass float32 (B, K) contiguous; lab,
    wn, counts from labels_kernel; grad_x (B, N, D) x.dtype and grad_w float32 (B, N) contiguous."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    i = (pid % tiles) * BN + tl.arange(0, BN)
    label = tl.load(lab + b * N + i, mask=i < N, other=-1)
    valid = label >= 0
    j = tl.maximum(label, 0).to(tl.int64)
    total = tl.load(mass + b * K + j, mask=valid, other=1.0)
    size = tl.load(counts + b * K + j, mask=valid, other=1)
    share = coefficient(tl.load(wn + b * N + i, mask=valid, other=0.0), total, size)
    dot = tl.zeros([BN], tl.float32)
    for d0 in range(0, D, BD):
        offs_d = (d0 + tl.arange(0, BD)).to(tl.int64)
        inside = valid[:, None] & (offs_d < D)[None, :]
        g = tl.load(grad + b * g_b + j[:, None] * g_k + offs_d[None, :] * g_d, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            v = tl.load(x + b * x_b + i[:, None] * x_n + offs_d[None, :] * x_d, mask=inside, other=0.0)
            c = tl.load(centers + b * c_b + j[:, None] * c_k + offs_d[None, :] * c_d, mask=inside, other=0.0)
            dot += tl.sum((v.to(tl.float32) - c.to(tl.float32)) * g, axis=1)
        tl.store(
            grad_x + (b * N + i)[:, None] * D + offs_d[None, :],
            narrow(tl.where(inside, share[:, None] * g, 0.0), grad_x.dtype.element_ty),
            mask=(i < N)[:, None] & (offs_d < D)[None, :],
        )
    if HAS_WEIGHTS:
        regular = valid & (total != 0)
        slope = tl.div_rn(dot, tl.where(regular, total, 1.0))
        tl.store(grad_w + b * N + i, tl.where(regular, slope, 0.0), mask=i < N)


@kernel
def unpool_kernel(
    centers, assignment, out, N, D, K, tiles, c_b, c_k, c_d, a_b, a_n, BN: tl.constexpr, BD: tl.constexpr
):
    """out[b, i] = centers[b, a_i], zeros where a_i is outside 0 .. K - 1.  One program per (image, BN tokens)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    i = (pid % tiles) * BN + tl.arange(0, BN)
    label = tl.load(assignment + b * a_b + i * a_n, mask=i < N, other=-1)
    valid = (label >= 0) & (label < K)
    label = tl.where(valid, label, 0)
    for d0 in range(0, D, BD):
        offs_d = (d0 + tl.arange(0, BD)).to(tl.int64)
        row = tl.load(
            centers + b * c_b + label[:, None] * c_k + offs_d[None, :] * c_d,
            mask=valid[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )
        tl.store(out + (b * N + i)[:, None] * D + offs_d[None, :], row, mask=(i < N)[:, None] & (offs_d < D)[None, :])
