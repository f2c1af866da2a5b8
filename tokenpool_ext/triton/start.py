"""The farthest-first start (init="farthest", Gonzalez 1985): one program an image makes all K choices, in one launch.

First the heaviest token, then K - 1 times the token of largest weight times squared distance to the nearest chosen
one; ties to the lowest index.  `state` float32 (B, N) holds that squared distance, or one of the marks below.  A
product that is not a number counts as distance 0.
"""

import triton
import triton.language as tl

from .device import eights, image_of, kernel, load_rows, no_nan

ZERO_WEIGHT = tl.constexpr(-1.0)  # after every token of weight
CHOSEN = tl.constexpr(-2.0)
PADDING = tl.constexpr(-3.0)


@triton.jit
def _first_largest(most, at):
    """The lowest index among the lanes of largest value."""
    top = tl.max(most, axis=0)
    return tl.min(tl.where(most == top, at, 2147483647), axis=0)


@triton.jit
def _heaviest(wn, state, N, BLOCK: tl.constexpr):
    """The heaviest token of an image; fills `state`.  Pointers are the image's."""
    most = tl.full([BLOCK], PADDING, tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    for n0 in range(0, N, BLOCK):
        i = n0 + tl.arange(0, BLOCK)
        w = tl.load(wn + i, mask=i < N, other=-1.0)
        valid = (i < N) & (w != -1.0)
        w = tl.maximum(no_nan(w, 0.0), 0.0)
        rank = tl.where(w > 0, float("inf"), ZERO_WEIGHT)
        tl.store(state + i, tl.where(valid, rank, PADDING), mask=i < N)
        w = tl.where(valid, w, PADDING)
        at = tl.where(w > most, i, at)
        most = tl.maximum(w, most)
    tl.debug_barrier()
    return _first_largest(most, at)


@triton.jit
def _closer(wn, state, i, N, token, apart):
    """state = min(state, apart) where a distance stands, CHOSEN at `token`; returns the new values times weights."""
    old = tl.load(state + i, mask=i < N, other=PADDING)
    apart = tl.maximum(no_nan(apart, 0.0), 0.0)
    now = tl.where(old >= 0, tl.minimum(apart, old), old)
    now = tl.where(i == token, CHOSEN, now)
    tl.store(state + i, now, mask=i < N)
    return tl.where(now >= 0, now * tl.load(wn + i, mask=i < N, other=0.0), now)


@kernel
def farthest_gram_kernel(gram, wn, keff, lst, coef, state, squares, N, row, BLOCK: tl.constexpr):
    """Writes lst int32 and coef = 1 float32 (B, N), entries j < keff: the chosen tokens as lists of one (prepare.py).

    gram float32 (B, N, row); state, squares float32 (B, N) scratch.  Reads K - 1 rows of G an image.
    """
    b = tl.program_id(0).to(tl.int64)
    row = eights(row)
    gram += b * N * row
    state += b * N
    squares += b * N
    clusters = tl.load(keff + b)
    for n0 in range(0, N, BLOCK):  # the diagonal, side by side
        i = n0 + tl.arange(0, BLOCK)
        tl.store(squares + i, tl.load(gram + i.to(tl.int64) * (row + 1), mask=i < N, other=0.0), mask=i < N)
    token = _heaviest(wn + b * N, state, N, BLOCK)
    for j in range(0, clusters):
        tl.store(lst + b * N + j, token)
        tl.store(coef + b * N + j, 1.0)
        if j + 1 < clusters:
            square = tl.load(squares + token)
            chosen = gram + token.to(tl.int64) * row
            most = tl.full([BLOCK], PADDING, tl.float32)
            at = tl.zeros([BLOCK], tl.int32)
            for n0 in range(0, N, BLOCK):
                i = n0 + tl.arange(0, BLOCK)
                g = tl.load(chosen + i, mask=i < N, other=0.0)
                apart = tl.load(squares + i, mask=i < N, other=0.0) + square - 2.0 * g
                value = _closer(wn + b * N, state, i, N, token, apart)
                at = tl.where(value > most, i, at)
                most = tl.maximum(value, most)
            tl.debug_barrier()
            token = _first_largest(most, at)


@triton.jit
def pick_farthest(
    x,
    s,
    wn,
    lst,
    coef,
    state,
    clusters,
    N,
    D,
    x_n,
    x_d,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As farthest_gram_kernel, from the tokens of one image: by differences from the token chosen last, so no centering
    is needed.  Reads K - 1 times the tokens that may still be chosen for their distance.  Pointers are the image's."""
    token = _heaviest(wn, state, N, BLOCK)
    for j in range(0, clusters):
        tl.store(lst + j, token)
        tl.store(coef + j, 1.0)
        if j + 1 < clusters:
            one = tl.full([1], True, tl.int1)
            most = tl.full([BN], PADDING, tl.float32)
            at = tl.zeros([BN], tl.int32)
            for n0 in range(0, N, BN):
                i = n0 + tl.arange(0, BN)
                live = tl.load(state + i, mask=i < N, other=PADDING) >= 0
                apart = tl.zeros([BN], tl.float32)
                for d0 in range(0, D, BD):
                    offs_d = d0 + tl.arange(0, BD)
                    rows = load_rows(x, x, s, i, live, offs_d, D, x_n, x_d, False, SCALE, CONTIG)
                    chosen = load_rows(
                        x, x, s, token + tl.zeros([1], tl.int32), one, offs_d, D, x_n, x_d, False, SCALE, CONTIG
                    )
                    gap = rows - chosen
                    apart += tl.sum(gap * gap, axis=1)
                value = _closer(wn, state, i, N, token, apart)
                at = tl.where(value > most, i, at)
                most = tl.maximum(value, most)
            tl.debug_barrier()
            token = _first_largest(most, at)


@kernel
def farthest_kernel(
    x,
    scale,
    wn,
    keff,
    lst,
    coef,
    state,
    N,
    D,
    x_b,
    x_n,
    x_d,
    SCALE: tl.constexpr,
    CONTIG: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As farthest_gram_kernel, from the tokens x (B, N, D), any strides."""
    b = tl.program_id(0).to(tl.int64)
    pick_farthest(
        image_of(x, b, x_b, CONTIG),
        tl.load(scale + b),
        wn + b * N,
        lst + b * N,
        coef + b * N,
        state + b * N,
        tl.load(keff + b),
        N,
        D,
        x_n,
        x_d,
        SCALE,
        CONTIG,
        BN,
        BD,
        BLOCK,
    )
