"""Nested, sparse, quantised, float8 and complex tensors, and numbers no float holds: a TypeError or ValueError that
names the argument. A missing extension is said once."""

from __future__ import annotations

import warnings

import pytest
import torch

import tokenpool_ext as tp

X, S = torch.randn(2, 6, 4), torch.rand(2, 6)
ZEROS = torch.zeros(2, 6, dtype=torch.int64)


def nested(rows, **options):
    return torch.nested.nested_tensor(list(rows), **options)


def quantised(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def layer(**options):
    return tp.TokenPooling(2, num_prefix_tokens=0, **options)


CASES = {
    "tokens nested": (lambda: layer()(nested(X)), TypeError, "x must be a dense"),
    "tokens jagged": (lambda: layer()(nested(X, layout=torch.jagged)), TypeError, "x must be a dense"),
    "tokens sparse": (lambda: layer()(X.to_sparse()), TypeError, "TokenPooling: x must be a dense"),
    "tokens float8": (lambda: layer()(X.to(torch.float8_e4m3fn)), TypeError, "TokenPooling: x must be float32"),
    "tokens quantised": (lambda: layer()(quantised(X)), TypeError, "x must be a plain"),
    "tokens of a baseline": (lambda: tp.BipartiteMatching(4)(X.to(torch.float8_e5m2)), TypeError, "x must be float32"),
    "features float8": (
        lambda: tp.BipartiteMatching(4)(X, features=X.to(torch.float8_e5m2)),
        TypeError,
        "features must be float32",
    ),
    "features sparse": (lambda: layer()(X, features=X.to_sparse()), TypeError, "features must be a dense"),
    "scores nested": (lambda: layer()(X, nested(S)), TypeError, "scores must be a dense"),
    "scores quantised": (lambda: tp.ScorePruning(2)(X, quantised(S)), TypeError, "scores must be a plain"),
    "scores complex": (lambda: tp.ImportanceSampling(2)(X, S + 0j), TypeError, "scores must be real"),
    "sizes quantised": (lambda: layer()(X, sizes=quantised(S)), TypeError, "sizes must be a plain"),
    "sizes sparse": (lambda: tp.GridPooling(2)(X, sizes=S.to_sparse()), TypeError, "sizes must be a dense"),
    "mask nested": (lambda: layer()(X, mask=nested(S > 0)), TypeError, "mask must be a dense"),
    "K sparse": (lambda: tp.kmeans(X, torch.tensor([2, 3]).to_sparse()), TypeError, "num_clusters must be a dense"),
    "K nested": (lambda: tp.kmedoids(X, nested(ZEROS[:, :1])), TypeError, "num_clusters must be a dense"),
    "weights quantised": (lambda: tp.kmeans(X, 2, weights=quantised(S)), TypeError, "weights must be a plain"),
    "weights of pool": (lambda: tp.pool(X, ZEROS, 1, weights=quantised(S)), TypeError, "weights must be a plain"),
    "centers sparse": (lambda: tp.unpool(X.to_sparse(), ZEROS), TypeError, "centers must be a dense"),
    "init quantised": (lambda: tp.kmeans(X, 2, init=quantised(X[:, :2])), TypeError, "init must be a plain"),
    "scale": (lambda: tp.attention_received(X[:, None], X[:, None], scale=10**400), ValueError, "scale must be"),
    "scale below": (lambda: tp.attention_received(X[:, None], X[:, None], scale=-(10**400)), ValueError, "scale must"),
    "scale infinite": (lambda: tp.attention_received(X[:, None], X[:, None], scale=-1e999), ValueError, "scale must"),
    "keep_ratio": (lambda: tp.TokenPooling(keep_ratio=10**400), ValueError, "keep_ratio must be"),
    "num_iters": (lambda: layer(num_iters=10**400), ValueError, "num_iters must be"),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_is_wrong(case):
    call, error, words = CASES[case]
    with pytest.raises(error, match=words):
        call()


def test_a_missing_extension_is_said_once(monkeypatch):
    import sys

    from tokenpool_ext import loader

    backends = sys.modules["tokenpool_ext.backends"]  # the name in the package is the function

    monkeypatch.setattr(loader, "extension", None)
    monkeypatch.setattr(loader, "ops_reason", "it was not built")
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(RuntimeWarning, match="reference.*it was not built"):
        tp.kmeans(X, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.kmeans(X, 2)
        tp.unpool(X, ZEROS)
        tp.kmeans(X, 2, backend="reference")
