"""Device functions shared by the kernels.  All arrays named here are per batch chunk and contiguous unless a stride
is passed; `b` is the image, already int64, so that every offset is 64 bits wide.

Token values enter every product through `load_rows`: scaled by the image's power of two, and, for float32, relative
to the image's centering vector (prepare.py).  Weights are read from `wn`: normalised, and -1 marks padding.
"""

import inspect
import os

import triton
import triton.language as tl

PATIENCE = tl.constexpr(100)  # iterations after which labels that change must lower the loss
# Distances below this share of the tokens' squared norms are lost in the rounding of products: 256 float32 epsilons.
RESOLVED = tl.constexpr(2.0**-15)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SIZES = ("N", "D", "K", "H", "factor")


def kernel(fn):
    """`triton.jit` for a kernel: of its runtime arguments only pointers are specialised (for alignment).

    Sizes, strides and flags are not: Triton would compile a new kernel for every value that is 1 or a multiple of 16.
    By convention pointers come first, and the first size is named N, D or K (scale: a float, see attention.py).
    """
    names = [n for n, p in inspect.signature(fn).parameters.items() if p.annotation is inspect.Parameter.empty]
    first = next(i for i, n in enumerate(names) if n in SIZES)
    return triton.jit(fn, do_not_specialize=names[first:])


@triton.jit
def eights(n):
    """n, which is a multiple of 8, in a form from which the compiler sees that it is (for 16-byte loads)."""
    return (n // 8) * 8


@triton.jit
def image_of(x, b, stride_b, CONTIG: tl.constexpr):
    """Pointer to image b of x."""
    if CONTIG:
        stride_b = eights(stride_b)
    return x + b * stride_b


@triton.jit
def load_rows(
    x,
    m,
    scale,
    tok,
    live,
    offs_d,
    D,
    stride_n,
    stride_d,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
):
    """float32 tile (len(tok), len(offs_d)) of scaled, centered tokens; rows that are not live and columns >= D are 0.

    x: pointer to the image; m: pointer to its centering vector (D,); tok int32 token indices; live bool.
    CONTIG: the feature stride is 1 and rows are 16-byte aligned (so loads may be vectorised).
    """
    if CONTIG:
        stride_n = eights(stride_n)
        D = eights(D)
        cols = offs_d.to(tl.int64)
    else:
        cols = offs_d.to(tl.int64) * stride_d
    inside = live[:, None] & (offs_d < D)[None, :]
    y = tl.load(x + tok.to(tl.int64)[:, None] * stride_n + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        y = y * scale
    if CENTER:
        y = tl.where(inside, y - tl.load(m + offs_d, mask=offs_d < D, other=0.0)[None, :], 0.0)
    return y


@triton.jit
def exponent_scales(peak, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(scale, 1/scale): the power of two that brings `peak` (> 0, float32) into [1, 2); 1 for 0, inf and NaN.

    LOW and HIGH bound the biased exponent, so that both numbers stay normal.
    """
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    regular = (peak > 0) & (exponent < 255)
    exponent = tl.where(regular, tl.minimum(tl.maximum(exponent, LOW), HIGH), 127)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    return down, up


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32.  Triton's interpreter has no bfloat16 product: there the operands are widened, which
    changes no product."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(v, DTYPE: tl.constexpr):
    """float32 -> DTYPE, rounding to nearest even; Triton's interpreter would cut bfloat16 off instead."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        v = tl.where(v == v, (bits & -65536).to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def no_nan(v, other):
    return tl.where(v == v, v, other)


@triton.jit
def repair_image(lab, cost, counts, keff, N, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Give every empty cluster j < keff a token (contract 2.2): ascending j, the token with the largest cost among
    clusters of at least two members, ties to the lowest index.  Returns the number of empty clusters.  All pointers
    are the image's.

    lab int32 (N,), -1 = padding; cost float32 (N,) >= 0 or NaN (counts as 0), becomes 0 where a token moves; counts
    int32 (K,), kept up to date.  Bounded: at most keff passes over the tokens, none when no cluster is empty.
    """
    offs = tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    empty = 0
    for k0 in range(0, keff, BLOCK_K):
        j = k0 + offs_k
        c = tl.load(counts + j, mask=j < keff, other=1)
        empty += tl.sum((c == 0).to(tl.int32), axis=0)
    if empty > 0:
        for j in range(0, keff):
            if tl.load(counts + j) == 0:
                best = -1.0
                token = 0
                for n0 in range(0, N, BLOCK):
                    i = n0 + offs
                    label = tl.load(lab + i, mask=i < N, other=-1)
                    members = tl.load(counts + tl.maximum(label, 0), mask=label >= 0, other=0)
                    key = tl.load(cost + i, mask=i < N, other=0.0)
                    key = tl.where((label >= 0) & (members >= 2), tl.maximum(no_nan(key, 0.0), 0.0), -1.0)
                    value, at = tl.max(key, axis=0, return_indices=True)
                    at = n0 + at
                    token = tl.where(value > best, at, token)
                    best = tl.maximum(value, best)
                if best >= 0:
                    donor = tl.load(lab + token)
                    size = tl.load(counts + donor)
                    left = tl.load(cost + token) * 0.0  # a NaN stays
                    tl.debug_barrier()  # everyone has read before anyone writes
                    tl.store(lab + token, j)
                    tl.store(cost + token, left)
                    tl.store(counts + donor, size - 1)
                    tl.store(counts + j, 1)
                tl.debug_barrier()
    return empty


@triton.jit
def unresolved(cost, wn, squares, step, N, BLOCK: tl.constexpr):
    """Are the tokens' distances to their centers lost in the rounding of products, which is as large as their squared
    norms?  Pointers are the image's: cost = weight * distance; `squares` holds the norms, `step` elements apart."""
    near = tl.zeros([BLOCK], tl.float64)
    far = tl.zeros([BLOCK], tl.float64)
    for n0 in range(0, N, BLOCK):
        i = n0 + tl.arange(0, BLOCK)
        w = tl.load(wn + i, mask=i < N, other=-1.0)
        counts = w > 0
        distance = tl.load(cost + i, mask=counts, other=0.0).to(tl.float64) / tl.where(counts, w, 1.0).to(tl.float64)
        near += distance
        far += tl.load(squares + i.to(tl.int64) * step, mask=counts, other=0.0).to(tl.float64)
    return tl.sum(near, axis=0) < tl.sum(far, axis=0) * RESOLVED  # false where anything is not a number


@triton.jit
def settle_image(lab, prev, cost, wn, loss, t, repaired, N, BLOCK: tl.constexpr):
    """1 if the image goes on with the labels of iteration t: then prev = lab.  0 if they repeat, or where clusters had
    to be repaired (or very late) and the loss did not fall: the labels are those in prev.  Pointers are the image's.

    cost float32 (N,): weight times distance; loss float64 (1,): their sum, one iteration ago and then now.
    """
    offs = tl.arange(0, BLOCK)
    changed = 0
    total = tl.zeros([BLOCK], tl.float64)
    for n0 in range(0, N, BLOCK):
        i = n0 + offs
        new = tl.load(lab + i, mask=i < N, other=-1)
        old = tl.load(prev + i, mask=i < N, other=-1)
        changed += tl.sum((new != old).to(tl.int32), axis=0)
        w = tl.load(wn + i, mask=i < N, other=-1.0)
        total += tl.load(cost + i, mask=w > 0, other=0.0).to(tl.float64)
    now = tl.sum(total, axis=0)
    falls = now < tl.load(loss)
    in_vain = (t > 0) & ((repaired > 0) | (t >= PATIENCE)) & (falls == 0)
    goes_on = ((changed > 0) & (in_vain == 0)).to(tl.int32)
    tl.debug_barrier()
    if goes_on > 0:
        tl.store(loss, now)
        for n0 in range(0, N, BLOCK):
            i = n0 + offs
            tl.store(prev + i, tl.load(lab + i, mask=i < N, other=-1), mask=i < N)
    return goes_on


@triton.jit
def better(value, label, best, arg):
    """Running argmin: strictly smaller wins, so earlier (lower) labels keep ties; inf never wins over label 0."""
    win = value < best
    return tl.where(win, value, best), tl.where(win, label, arg)


@triton.jit
def coefficient(w, total, count):
    """Share of a token of weight w in its cluster's mean: w / total, or 1 / count when the weights add up to zero."""
    zero = total == 0
    return tl.div_rn(tl.where(zero, 1.0, w), tl.where(zero, tl.maximum(count, 1).to(tl.float32), total))


@triton.jit
def first_that_counts(coef, size, R: tl.constexpr):
    """The place of the first entry that is not 0 among `size` of coef; 0 if there is none.  Reads R at a time, and most
    often one."""
    at = 0
    if tl.load(coef, mask=size > 0, other=1.0) == 0:
        found = 0
        for e0 in range(0, size, R):
            if found == 0:
                e = e0 + tl.arange(0, R)
                p = tl.load(coef + e, mask=e < size, other=0.0)
                least = tl.min(tl.where(p != 0, e, 2147483647), axis=0)
                if least < 2147483647:
                    at = least
                    found = 1
    return at


@triton.jit
def kahan(total, carry, term):
    """(total + term, its rounding error to be taken off the next term): exact to a few units whatever the number of
    terms."""
    corrected = term - carry
    following = total + corrected
    return following, (following - total) - corrected


@triton.jit
def mean_tile(
    x,
    scale,
    lst,
    coef,
    size,
    lead,
    offs_d,
    D,
    x_n,
    x_d,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """(row of token `lead`, sum over members of coef * (row - that row)), scaled, not centered, (BD,) each: a cluster's
    mean is their sum, and that token to the bit where all are equal.  lst, coef: pointers to the first of `size`
    members; those of coef 0 are not read.  Fixed order: lane r adds members r, r + R, ..., then the R lanes are added.
    """
    base = load_rows(
        x,
        x,
        scale,
        lead + tl.zeros([1], tl.int32),
        lead >= tl.zeros([1], tl.int32),
        offs_d,
        D,
        x_n,
        x_d,
        False,
        SCALE,
        CONTIG,
    )
    acc = tl.zeros([R, BD], tl.float32)
    carry = tl.zeros([R, BD], tl.float32)
    for e0 in range(0, size, R):
        e = e0 + tl.arange(0, R)
        p = tl.load(coef + e, mask=e < size, other=0.0)
        live = p != 0
        token = tl.load(lst + e, mask=live, other=0)
        rows = load_rows(x, x, scale, token, live, offs_d, D, x_n, x_d, False, SCALE, CONTIG)
        term = tl.where(live[:, None], 2.0 * p[:, None] * (0.5 * rows - 0.5 * base), 0.0)
        acc, carry = kahan(acc, carry, term)
    return tl.sum(base, axis=0), tl.sum(acc, axis=0)
