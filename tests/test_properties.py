"""Any input whatever: finite, K rows, labels in range, consistent (contract 7; Hypothesis)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import INTERPRET
from helpers import TOLERANCES, assert_consistent, assert_identical, f64
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tokenpool_ext as tp

pytestmark = pytest.mark.each_path

# The fixture `backend` only sets an environment variable, the same for every example.
relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=8 if INTERPRET else settings.default.max_examples,
)


@st.composite
def problems(draw, max_n=13):
    """Arguments of one clustering call, with everything awkward the contract allows."""
    B, N = draw(st.integers(1, 3)), draw(st.integers(1, max_n))
    D = draw(st.sampled_from([1, 2, 3, 5, 7, 16, 17]))
    dtype = draw(st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16, torch.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    kind = draw(
        st.sampled_from(["normal", "duplicates", "constant", "integers", "zeros", "two values", "one far away"])
    )
    x = {
        "normal": lambda: rng.standard_normal((B, N, D)),
        "duplicates": lambda: rng.standard_normal((B, N, D))[:, rng.integers(0, max(1, N // 3), N)],
        "constant": lambda: np.full((B, N, D), rng.standard_normal()),
        "integers": lambda: rng.integers(-2, 3, (B, N, D)).astype(float),
        "zeros": lambda: np.zeros((B, N, D)),
        "two values": lambda: np.where(rng.random((B, N, 1)) < 0.5, 1.0, -3.0) * np.ones(D),
        "one far away": lambda: rng.standard_normal((B, N, D)) + 1e3 * (np.arange(N) == 0)[None, :, None],
    }[kind]()
    if dtype in (torch.float32, torch.float64):
        x = x * 10.0 ** draw(st.sampled_from([0, 0, 0, -30, -12, 8, 30]))
    elif dtype == torch.float16:
        x = x * draw(st.sampled_from([1.0, 1.0, 10.0, 1e-3]))
    acc = TOLERANCES[dtype].acc
    weights = draw(st.sampled_from([None, None, "random", "zeros", "some zero", "integers", "one hot", "wild"]))
    w = {
        None: lambda: None,
        "random": lambda: rng.random((B, N)),
        "zeros": lambda: np.zeros((B, N)),
        "some zero": lambda: rng.random((B, N)) * (rng.random((B, N)) < 0.5),
        "integers": lambda: rng.integers(0, 4, (B, N)).astype(float),
        "one hot": lambda: np.eye(N)[rng.integers(0, N, B)],
        "wild": lambda: 10.0 ** rng.uniform(-6, 6, (B, N)),
    }[weights]()
    mask = rng.random((B, N)) < draw(st.sampled_from([0.3, 0.8])) if draw(st.integers(0, 3)) == 0 else None
    K = draw(st.sampled_from([1, N, max(1, N // 2), draw(st.integers(1, N))]))
    counts = rng.integers(1, K + 1, B) if draw(st.integers(0, 3)) == 0 else None
    if counts is not None:
        K = int(counts.max())
    start = draw(
        st.sampled_from([None, None, "topk", "strided", "farthest", "kmeans++", "random", "indices", "bipartite"])
    )
    if start == "bipartite" and 2 * (K if counts is None else counts.min()) < N:  # refused
        start = None
    if start == "indices":
        start = torch.from_numpy(rng.integers(0, N, (B, K)))
    x = torch.from_numpy(x).to(dtype)
    layout = draw(st.sampled_from(["plain", "plain", "transposed", "holes"]))
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "holes":
        x = torch.stack([x, x * float("nan")], -1)[..., 0]
    return dict(
        x=x,
        K=K,
        counts=None if counts is None else torch.from_numpy(counts),
        weights=None if w is None else torch.from_numpy(w).to(acc),
        mask=None if mask is None else torch.from_numpy(mask),
        init=start,
        num_iters=draw(st.integers(1, 6)),
        sort=draw(st.booleans()),
        algorithm=draw(st.sampled_from(["kmeans", "kmedoids"])),
    )


def call(backend, p, **changes):
    p = {**p, **changes}

    def move(t):
        return t.to(backend.device) if isinstance(t, torch.Tensor) else t

    x = p["x"] if p["x"].dtype in backend.dtypes else p["x"].float()
    weights = p["weights"] if p["weights"] is None or x.dtype == p["x"].dtype else p["weights"].float()
    k = p["K"] if p["counts"] is None else p["counts"]
    result = getattr(tp, p["algorithm"])(
        move(x),
        move(k),
        weights=move(weights),
        mask=move(p["mask"]),
        init=move(p["init"]),
        num_iters=p["num_iters"],
        sort=p["sort"],
        generator=torch.Generator(backend.device).manual_seed(0),
        backend=backend.name,
    )
    return x, weights, result


@relaxed
@given(p=problems())
def test_any_input_gives_a_consistent_result(backend, p):
    x, w, got = call(backend, p)
    assert_consistent(
        got,
        x,
        p["K"],
        weights=w,
        mask=p["mask"],
        algorithm=p["algorithm"],
        sort=p["sort"],
        counts=None if p["counts"] is None else p["counts"].tolist(),
    )
    assert_identical(got, call(backend, p)[2], what="run to run")


@relaxed
@given(p=problems())
def test_inertia_never_rises(backend, p):
    before = None
    for t in (1, 5) if backend.interpreted else (1, 2, 4, 8):
        x, w, got = call(backend, p, num_iters=t)
        now = f64(got.inertia)
        if before is not None:
            scale = [float(np.abs(f64(x[b])[:, :]).max()) ** 2 * x.shape[2] * x.shape[1] for b in range(len(x))]
            heavy = np.ones(len(x)) if w is None else f64(w).max(1)
            with np.errstate(over="ignore"):
                slack = np.minimum(np.array(scale) * heavy * 8 * TOLERANCES[x.dtype].distance, 1e38)
            assert (now <= before * (1 + 4 * TOLERANCES[x.dtype].inertia) + slack).all(), f"{before} -> {now} at {t}"
        before = now


@relaxed
@given(
    p=problems(), bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]), where=st.integers(0, 2**20)
)
def test_bad_numbers_are_contained(backend, p, bad, where):
    """One value spoiled: labels in range, nothing hangs, all other images keep their bits."""
    clean = call(backend, p)[2]
    x = p["x"].clone()
    image = where % len(x)
    token, feature = divmod(where % x[image].numel(), x.shape[2])  # its features need not be neighbours in memory
    x[image, token, feature] = bad if x.dtype != torch.float16 else min(bad, 6e4)
    got = call(backend, p, x=x)[2]
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if p["mask"] is None else p["mask"]
    a = got.assignment.cpu()
    assert ((a >= -1) & (a < p["K"])).all() and ((a == -1) == ~valid).all()
    if got.medoids is not None:
        assert ((got.medoids >= -1) & (got.medoids < x.shape[1])).all()
    if isinstance(p["init"], str) and p["init"] in ("kmeans++", "random"):
        return  # one generator serves the whole batch in order
    if backend.name == "reference":
        return  # test_clustering checks it there on plain layouts
    for b in range(len(x)):
        if b != image:
            for name, u, v in zip(got._fields, clean, got):
                if u is not None:
                    assert_identical(u[b], v[b], what=f"image {b} {name}")


@relaxed
@given(
    B=st.integers(0, 3),
    N=st.integers(1, 12),
    D=st.sampled_from([1, 3, 8, 17]),
    K=st.integers(1, 6),
    seed=st.integers(0, 2**20),
    weighted=st.booleans(),
)
@example(B=1, N=1, D=1, K=6, seed=0, weighted=True)
def test_unpool_of_pool_is_a_projection(backend, B, N, D, K, seed, weighted):
    """Pooling what was unpooled gives the same means; the residual is orthogonal to the clusters."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((B, N, D))).float().to(backend.device)
    a = torch.from_numpy(rng.integers(-1, K, (B, N))).to(backend.device)
    w = torch.from_numpy(rng.random((B, N)) + 0.1).float().to(backend.device) if weighted else None
    c = tp.pool(x, a, K, weights=w, backend=backend.name)
    back = tp.unpool(c, a, backend=backend.name)
    torch.testing.assert_close(tp.pool(back, a, K, weights=w, backend=backend.name), c, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        tp.pool(x - back, a, K, weights=w, backend=backend.name), torch.zeros_like(c), rtol=0, atol=1e-5
    )
    assert not back[a < 0].any()
