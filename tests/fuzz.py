"""Every public function with hostile shapes, strides, dtypes and values.

    python tests/fuzz.py [--cases 10000] [--seed 0]

A call may refuse (ValueError, TypeError), and then both backends do. Else both give results of the promised shape and
dtype whose labels are in range and leave the arguments as they were; of finite tokens the results are finite and the
masses add up to the weights; pool, unpool and attention_received give the reference's values. A crash or a hang ends
the process with another status.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import time
import warnings

import torch

import tokenpool_ext as tp

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REFUSALS = (ValueError, TypeError)
SECONDS = 60  # no case takes one of them


def floats(r: random.Random, shape, dtype=None):
    """A tensor of this shape with values and strides that a caller might have by accident."""
    dtype = dtype or r.choice(FLOATS)
    g = torch.Generator().manual_seed(r.getrandbits(31))
    kind = r.choice(("normal", "normal", "integers", "same", "zero", "large", "tiny", "offset", "halves"))
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "integers":
        x = torch.randint(-2, 3, shape, generator=g).double()
    elif kind == "halves":
        x = torch.where(x > 0, 1.0, -1.0) + 1e-3 * x
    else:
        scale, shift = {"same": (0, 3), "zero": (0, 0), "large": (1e3, 0), "tiny": (1e-6, 0)}.get(
            kind, (1, 100 if kind == "offset" else 0)
        )
        x = x * scale + shift
    x = x.to(dtype)
    if r.random() < 0.1 and x.numel():
        x.view(-1)[r.randrange(x.numel())] = r.choice((float("nan"), float("inf"), -float("inf")))
    return strided(r, x)


def strided(r: random.Random, x):
    """The same values with other strides."""
    how = r.choice(("plain", "plain", "transposed", "gap", "expanded"))
    if how == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "gap" and x.dim():
        return torch.stack((x, x + 1), -1)[..., 0]
    if how == "expanded" and x.dim() and x.shape[0] > 1:
        return x[:1].expand(x.shape)
    return x


def size(r: random.Random):
    return r.choice((0, 1, 1, 2, 3, 5, 8, 17, 33, 64, 100))


def clustering(r: random.Random):
    """(function, positional, keyword arguments) of kmeans or kmedoids."""
    b, n, d = r.choice((0, 1, 2, 3)), size(r), r.choice((0, 1, 2, 3, 7, 16, 33, 65))
    k = r.choice((1, 1, 2, 3, n, n // 2, n + 1, 0, -1))
    x = floats(r, (b, n, d) if r.random() < 0.97 else (n, d))
    keywords = {"num_iters": r.choice((0, 1, 2, 5)), "sort": r.random() < 0.2, "check_finite": r.random() < 0.2}
    if r.random() < 0.4:
        weights = floats(r, (b, n), torch.float32)
        keywords["weights"] = weights if r.random() < 0.1 else weights.abs()
    if r.random() < 0.3:
        keywords["mask"] = torch.rand(b, n, generator=torch.Generator().manual_seed(r.getrandbits(31))) < 0.8
    if r.random() < 0.2:
        k = torch.tensor([r.randrange(0, max(n, 1) + 1) for _ in range(b)], dtype=torch.int64)
    start = r.random()
    if start < 0.4:
        keywords["init"] = r.choice(("strided", "farthest", "topk", "bipartite"))
    elif start < 0.6 and isinstance(k, int) and 0 < k <= n:
        index = torch.tensor([[r.randrange(n) for _ in range(k)] for _ in range(b)], dtype=torch.int64).view(b, k)
        keywords["init"] = index - r.choice((0, 0, 0, 1)) if r.random() < 0.9 else index.int()
    elif start < 0.7 and isinstance(k, int) and k > 0:
        keywords["init"] = floats(r, (b, k, d), torch.float64 if x.dtype == torch.float64 else torch.float32)
    return r.choice((tp.kmeans, tp.kmedoids)), (x, k), keywords


def pooling(r: random.Random):
    b, n, d, k = r.choice((0, 1, 2)), size(r), r.choice((0, 1, 3, 16)), r.choice((0, 1, 2, 9))
    low, high = (0, max(k, 1)) if r.random() < 0.8 else (-1, k + 2)
    labels = torch.tensor([[r.randrange(low, high) for _ in range(n)] for _ in range(b)], dtype=torch.int64).view(b, n)
    if r.random() < 0.4:
        return tp.unpool, (floats(r, (b, k, d)), strided(r, labels)), {}
    weights = {"weights": floats(r, (b, n), torch.float32)} if r.random() < 0.4 else {}
    return tp.pool, (floats(r, (b, n, d)), strided(r, labels), k), weights


def attention(r: random.Random):
    b, h, d = r.choice((0, 1, 2)), r.choice((0, 1, 3)), r.choice((0, 1, 4, 16))
    dtype = r.choice(FLOATS)
    q, k = floats(r, (b, h, size(r), d), dtype), floats(r, (b, h, size(r), d), dtype if r.random() < 0.95 else None)
    return tp.attention_received, (q, k), {} if r.random() < 0.7 else {"scale": r.choice((0.0, 1.0, -1.0, 1e30))}


def call(function, arguments, keywords, backend):
    """(result, None), or (None, refusal)."""
    try:
        return function(*arguments, **keywords, backend=backend), None
    except REFUSALS as error:
        return None, error


def is_finite(t):
    return t is None or not isinstance(t, torch.Tensor) or bool(torch.isfinite(t).all())


def look_at_clusters(got, x, k, keywords):
    if x.dim() == 2:  # one image
        x, got = x[None], got._make(None if t is None else t[None] for t in got)
    counts = k if isinstance(k, torch.Tensor) else torch.full((x.shape[0],), k)
    rows = int(counts.max()) if counts.numel() else got.centers.shape[1]
    assert got.centers.shape == (x.shape[0], rows, x.shape[2]), got.centers.shape
    assert got.assignment.shape == x.shape[:2] and got.assignment.dtype == torch.int64
    mask = keywords.get("mask", torch.ones(x.shape[:2], dtype=torch.bool))
    here = got.assignment[mask]
    assert not here.numel() or (here.min() >= 0 and (got.assignment < counts[:, None])[mask].all()), (
        "label out of range"
    )
    if not (is_finite(x) and is_finite(keywords.get("weights")) and is_finite(keywords.get("init"))):
        return
    assert is_finite(got.centers) and is_finite(got.inertia) and (got.inertia >= 0).all(), "centers or inertia"
    weights = keywords.get("weights", torch.ones(x.shape[:2]))
    total = (weights.double() * mask).sum(1)
    torch.testing.assert_close(got.mass.double().sum(1), total, rtol=1e-2 if x.itemsize == 2 else 1e-4, atol=1e-6)


def one(seed: int) -> str:
    """Run one case; "refused", "ran" or AssertionError."""
    r = random.Random(seed)
    function, arguments, keywords = r.choice((clustering, clustering, pooling, attention))(r)
    before = [t.clone() for t in arguments if isinstance(t, torch.Tensor)]
    got, refusal = call(function, arguments, keywords, None)
    want, other = call(function, arguments, keywords, "reference")
    assert type(refusal) is type(other), f"{refusal!r} against the reference's {other!r}"
    after = [t for t in arguments if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) or not is_finite(a) for a, b in zip(before, after)), "an argument was changed"
    if refusal:
        return "refused"
    if isinstance(got, tp.Clusters):
        look_at_clusters(got, *arguments, keywords)
        look_at_clusters(want, *arguments, keywords)
        return "ran"
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape)
    finite = [is_finite(t) for t in (*arguments, *keywords.values())]
    if all(finite):
        tolerance = 1e-9 if got.dtype == torch.float64 else 1e-4 if got.dtype == torch.float32 else 2e-2
        scale = max([1.0] + [float(t.abs().max()) for t in arguments if isinstance(t, torch.Tensor) and t.numel()])
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    return "ran"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the others follow")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # imports much at its first call
    count, wrong, begun = {"refused": 0, "ran": 0}, 0, time.time()
    for seed in range(options.seed, options.seed + options.cases):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            count[one(seed)] += 1
        except Exception as error:
            wrong += 1
            print(f"case {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(f"{options.cases} cases in {time.time() - begun:.0f} s: {count}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
