"""Wrong arguments: the error names the argument, what was expected and what came (contract 7)."""

from __future__ import annotations

import re
import types
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_identical, tokens

import tokenpool_ext as tp
from tokenpool_ext.backends import REGISTRY, run

B, N, D, K = 2, 8, 3, 4
CLUSTERING = ["kmeans", "kmedoids"]


def good(**changes):
    arguments = dict(x=tokens(B, N, D), num_clusters=K)
    arguments.update(changes)
    return arguments


def refused(function, arguments, error, name, *contains):
    """`function(**arguments)` raises `error` whose message names `name`, says what was wanted and what came."""
    with pytest.raises(error) as caught:
        getattr(tp, function)(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), f"does not name {name}: {message}"
    assert function in message, f"does not name the function: {message}"
    assert re.search(r"\bgot\b", message), f"does not say what came: {message}"
    assert re.search(r"\b(must|needs?|expected|cannot)\b", message), f"does not say what was expected: {message}"
    for text in contains:
        assert text in message, f"{text!r} is missing: {message}"
    assert len(message) < 400


class NotATensor:
    pass


ones = torch.ones
META = torch.device("meta")

# (error, argument named, changed arguments, texts the message must hold)
CLUSTER_CASES = {
    "x list": (TypeError, "x", dict(x=[[1.0, 2.0]]), ["list"]),
    "x none": (TypeError, "x", dict(x=None), ["NoneType"]),
    "x int": (TypeError, "x", dict(x=ones(B, N, D, dtype=torch.int64)), ["int64", "float32"]),
    "x bool": (TypeError, "x", dict(x=ones(B, N, D, dtype=torch.bool)), ["bool"]),
    "x complex": (TypeError, "x", dict(x=ones(B, N, D, dtype=torch.complex64)), ["complex64"]),
    "x float8": (TypeError, "x", dict(x=ones(B, N, D).to(torch.float8_e4m3fn)), ["float8"]),
    "x sparse": (TypeError, "x", dict(x=ones(B, N, D).to_sparse()), ["sparse"]),
    "x nested": (
        TypeError,
        "x",
        dict(x=torch.nested.nested_tensor([ones(N, D), ones(N, D)], layout=torch.jagged)),
        ["nested", "mask"],
    ),
    "x 1-d": (ValueError, "x", dict(x=ones(N)), ["(8,)", "(B, N, D)"]),
    "x 4-d": (ValueError, "x", dict(x=ones(1, B, N, D)), ["(1, 2, 8, 3)", "(B, N, D)"]),
    "k float": (TypeError, "num_clusters", dict(num_clusters=4.0), ["float"]),
    "k string": (TypeError, "num_clusters", dict(num_clusters="4"), ["str"]),
    "k bool": (TypeError, "num_clusters", dict(num_clusters=True), ["bool"]),
    "k none": (TypeError, "num_clusters", dict(num_clusters=None), ["NoneType"]),
    "k list": (TypeError, "num_clusters", dict(num_clusters=[4, 4]), ["list"]),
    "k zero": (ValueError, "num_clusters", dict(num_clusters=0), ["0"]),
    "k negative": (ValueError, "num_clusters", dict(num_clusters=-3), ["-3"]),
    "k above N": (ValueError, "num_clusters", dict(num_clusters=9), ["9", "8"]),
    "k float tensor": (TypeError, "num_clusters", dict(num_clusters=ones(B)), ["float32"]),
    "k wrong shape": (ValueError, "num_clusters", dict(num_clusters=ones(3, dtype=torch.int64)), ["(3,)", "(2,)"]),
    "k 2-d": (ValueError, "num_clusters", dict(num_clusters=ones(B, 1, dtype=torch.int64)), ["(2, 1)"]),
    "k holds zero": (ValueError, "num_clusters", dict(num_clusters=torch.tensor([4, 0])), ["0"]),
    "k holds too much": (ValueError, "num_clusters", dict(num_clusters=torch.tensor([4, 9])), ["9"]),
    "k device": (
        ValueError,
        "num_clusters",
        dict(num_clusters=ones(B, dtype=torch.int64, device=META)),
        ["meta", "cpu"],
    ),
    "weights list": (TypeError, "weights", dict(weights=[1.0] * N), ["list"]),
    "weights complex": (TypeError, "weights", dict(weights=ones(B, N, dtype=torch.complex64)), ["complex64"]),
    "weights shape": (ValueError, "weights", dict(weights=ones(B, N + 1)), ["(2, 9)", "(2, 8)"]),
    "weights 3-d": (ValueError, "weights", dict(weights=ones(B, N, 1)), ["(2, 8, 1)", "(2, 8)"]),
    "weights 1-d": (ValueError, "weights", dict(weights=ones(N)), ["(8,)", "(2, 8)"]),
    "weights negative": (
        ValueError,
        "weights",
        dict(weights=ones(B, N).index_fill(1, torch.tensor([2]), -1.0)),
        ["-1"],
    ),
    "weights device": (ValueError, "weights", dict(weights=ones(B, N, device=META)), ["meta", "cpu"]),
    "weights nan": (ValueError, "weights", dict(weights=ones(B, N) * float("nan"), check_finite=True), ["nan"]),
    "x nan": (ValueError, "x", dict(x=ones(B, N, D) * float("nan"), check_finite=True), ["NaN"]),
    "mask list": (TypeError, "mask", dict(mask=[True] * N), ["list"]),
    "mask int": (TypeError, "mask", dict(mask=ones(B, N, dtype=torch.int64)), ["int64", "bool"]),
    "mask float": (TypeError, "mask", dict(mask=ones(B, N)), ["float32", "bool"]),
    "mask shape": (ValueError, "mask", dict(mask=ones(B, N - 1, dtype=torch.bool)), ["(2, 7)", "(2, 8)"]),
    "mask device": (ValueError, "mask", dict(mask=ones(B, N, dtype=torch.bool, device=META)), ["meta", "cpu"]),
    "init unknown": (ValueError, "init", dict(init="kmeans+"), ["kmeans+", "kmeans++", "topk"]),
    "init number": (TypeError, "init", dict(init=3), ["int"]),
    "init list": (TypeError, "init", dict(init=[0, 1, 2, 3]), ["list"]),
    "init bool": (TypeError, "init", dict(init=ones(B, K, dtype=torch.bool)), ["bool"]),
    "init complex": (TypeError, "init", dict(init=ones(B, K, D, dtype=torch.complex64)), ["complex64"]),
    "init index shape": (ValueError, "init", dict(init=ones(B, K + 1, dtype=torch.int64)), ["(2, 5)", "(2, 4)"]),
    "init index 3-d": (ValueError, "init", dict(init=ones(B, K, D, dtype=torch.int64)), ["(2, 4, 3)", "(2, 4)"]),
    "init index above": (ValueError, "init", dict(init=ones(B, K, dtype=torch.int64) * N), ["8", "7"]),
    "init index below": (ValueError, "init", dict(init=-ones(B, K, dtype=torch.int64)), ["-1"]),
    "init device": (ValueError, "init", dict(init=ones(B, K, dtype=torch.int64, device=META)), ["meta", "cpu"]),
    "init half": (ValueError, "init|num_clusters", dict(init="bipartite", num_clusters=3), ["N/2", "3"]),
    "num_iters zero": (ValueError, "num_iters", dict(num_iters=0), ["0"]),
    "num_iters negative": (ValueError, "num_iters", dict(num_iters=-2), ["-2"]),
    "num_iters float": (TypeError, "num_iters", dict(num_iters=5.0), ["float"]),
    "num_iters bool": (TypeError, "num_iters", dict(num_iters=True), ["bool"]),
    "num_iters none": (TypeError, "num_iters", dict(num_iters=None), ["NoneType"]),
    "sort": (TypeError, "sort", dict(sort="yes"), ["str"]),
    "sort none": (TypeError, "sort", dict(sort=None), ["NoneType"]),
    "check_finite": (TypeError, "check_finite", dict(check_finite=1), ["int"]),
    "generator": (TypeError, "generator", dict(generator=0), ["int", "torch.Generator"]),
    "backend unknown": (ValueError, "backend", dict(backend="gpu"), ["gpu", "cuda", "triton", "cpu", "reference"]),
    "backend type": (TypeError, "backend", dict(backend=1), ["int"]),
}


@pytest.mark.parametrize("function", CLUSTERING)
@pytest.mark.parametrize("case", CLUSTER_CASES)
def test_clustering_arguments(function, case):
    error, name, changes, contains = CLUSTER_CASES[case]
    refused(function, good(**changes), error, name, *contains)


def test_centers_as_a_start():
    refused("kmeans", good(init=ones(B, K, D + 1)), ValueError, "init", "(2, 4, 4)", "(2, 4, 3)")
    refused("kmeans", good(init=ones(B, K + 1, D)), ValueError, "init", "(2, 5, 3)", "(2, 4, 3)")
    refused("kmeans", good(init=ones(B, K)), ValueError, "init", "(2, 4)", "(2, 4, 3)")
    refused("kmedoids", good(init=ones(B, K, D)), TypeError, "init", "indices")


@pytest.mark.parametrize("function", CLUSTERING)
def test_wrong_index_with_per_image_k(function):
    """Slots beyond an image's own K are never read; the others are checked as ever."""
    counts = torch.tensor([4, 2])
    init = torch.tensor([[0, 1, 2, 3], [0, 1, 99, -5]])
    getattr(tp, function)(**good(num_clusters=counts, init=init))
    refused(function, good(num_clusters=counts, init=init.flip(1)), ValueError, "init", "99")


@pytest.mark.parametrize("function", CLUSTERING)
def test_unbatched_arguments_must_be_unbatched(function):
    x = tokens(1, N, D)[0]
    refused(function, dict(x=x, num_clusters=K, weights=ones(1, N)), ValueError, "weights", "(1, 8)", "(8,)")
    refused(function, dict(x=x, num_clusters=K, mask=ones(1, N) > 0), ValueError, "mask", "(1, 8)", "(8,)")
    refused(function, dict(x=x, num_clusters=K, init=torch.arange(K)[None]), ValueError, "init", "(1, 4)", "(4,)")


@pytest.mark.parametrize("function", CLUSTERING)
def test_everything_after_num_clusters_is_by_name(function):
    with pytest.raises(TypeError):
        getattr(tp, function)(tokens(B, N, D), K, ones(B, N))
    with pytest.raises(TypeError, match="wieghts"):
        getattr(tp, function)(tokens(B, N, D), K, wieghts=ones(B, N))


@pytest.mark.parametrize("function", CLUSTERING)
def test_start_at_padding_is_refused_or_harmless(function):
    """Padding never influences anything, not even when a start names it."""
    x, mask = tokens(B, N, D), torch.arange(N) < torch.tensor([[8], [5]])
    spoiled = torch.where(mask[:, :, None], x, float("nan"))
    init = torch.tensor([[0, 1, 2, 3], [0, 1, 6, 7]])
    for name in [n for n, state in tp.backends().items() if state == "ok" and n in ("reference", "cpu")]:
        try:
            got = getattr(tp, function)(spoiled, K, mask=mask, init=init, backend=name)
        except ValueError as error:
            assert "init" in str(error)
            continue
        from helpers import assert_consistent

        assert_consistent(got, torch.where(mask[:, :, None], x, 0), K, mask=mask, algorithm=function)


LABELS = torch.zeros(B, N, dtype=torch.int64)
POOL_CASES = {
    "x list": (TypeError, "x", dict(x=[1.0]), ["list"]),
    "x int": (TypeError, "x", dict(x=ones(B, N, D, dtype=torch.int32)), ["int32"]),
    "x 1-d": (ValueError, "x", dict(x=ones(N)), ["(8,)"]),
    "x sparse": (TypeError, "x", dict(x=ones(B, N, D).to_sparse()), ["sparse"]),
    "assignment list": (TypeError, "assignment", dict(assignment=[0] * N), ["list"]),
    "assignment float": (TypeError, "assignment", dict(assignment=ones(B, N)), ["float32"]),
    "assignment bool": (TypeError, "assignment", dict(assignment=ones(B, N) > 0), ["bool"]),
    "assignment shape": (ValueError, "assignment", dict(assignment=LABELS[:, :-1]), ["(2, 7)", "(2, 8)"]),
    "assignment batch": (ValueError, "assignment", dict(assignment=LABELS[:1]), ["(1, 8)", "(2, 8)"]),
    "assignment 1-d": (ValueError, "assignment", dict(assignment=LABELS[0]), ["(8,)"]),
    "assignment device": (ValueError, "assignment", dict(assignment=LABELS.to(META)), ["meta", "cpu"]),
    "assignment above": (ValueError, "assignment", dict(assignment=LABELS + K), ["4", "-1 to K-1 = 3"]),
    "assignment below": (ValueError, "assignment", dict(assignment=LABELS.int() - 2), ["-2", "-1 to K-1 = 3"]),
    "k float": (TypeError, "num_clusters", dict(num_clusters=2.0), ["float"]),
    "k zero": (ValueError, "num_clusters", dict(num_clusters=0), ["0"]),
    "k bool": (TypeError, "num_clusters", dict(num_clusters=True), ["bool"]),
    "weights shape": (ValueError, "weights", dict(weights=ones(B, N - 1)), ["(2, 7)", "(2, 8)"]),
    "weights type": (TypeError, "weights", dict(weights=1.0), ["float"]),
    "weights negative": (ValueError, "weights", dict(weights=-ones(B, N)), ["-1"]),
    "weights device": (ValueError, "weights", dict(weights=ones(B, N, device=META)), ["meta", "cpu"]),
    "backend": (ValueError, "backend", dict(backend="opencl"), ["opencl", "reference"]),
}


@pytest.mark.parametrize("case", POOL_CASES)
def test_pool_arguments(case):
    error, name, changes, contains = POOL_CASES[case]
    refused("pool", {**dict(x=tokens(B, N, D), assignment=LABELS, num_clusters=K), **changes}, error, name, *contains)


UNPOOL_CASES = {
    "centers list": (TypeError, "centers", dict(centers=[1.0]), ["list"]),
    "centers int": (TypeError, "centers", dict(centers=ones(B, K, D, dtype=torch.int64)), ["int64"]),
    "centers 4-d": (ValueError, "centers", dict(centers=ones(1, B, K, D)), ["(1, 2, 4, 3)"]),
    "assignment float": (TypeError, "assignment", dict(assignment=ones(B, N)), ["float32"]),
    "assignment batch": (ValueError, "assignment", dict(assignment=LABELS[:1]), ["(1, 8)"]),
    "assignment 3-d": (ValueError, "assignment", dict(assignment=LABELS[..., None]), ["(2, 8, 1)"]),
    "assignment device": (ValueError, "assignment", dict(assignment=LABELS.to(META)), ["meta", "cpu"]),
    "assignment above": (ValueError, "assignment", dict(assignment=LABELS + K), ["4", "-1 to K-1 = 3"]),
    "backend": (ValueError, "backend", dict(backend=""), ["reference"]),
}


@pytest.mark.parametrize("case", [c for c in UNPOOL_CASES if c != "backend"])
def test_unpool_arguments(case):
    error, name, changes, contains = UNPOOL_CASES[case]
    refused("unpool", {**dict(centers=tokens(B, K, D), assignment=LABELS), **changes}, error, name, *contains)


Q, KEYS = ones(2, 3, 5, 4), ones(2, 3, 7, 4)
ATTENTION_CASES = {
    "q list": (TypeError, "q", dict(q=[1.0]), ["list"]),
    "q int": (TypeError, "q", dict(q=Q.long()), ["int64"]),
    "q 3-d": (ValueError, "q", dict(q=Q[0]), ["(3, 5, 4)", "(B, H, Nq, d)"]),
    "k none": (TypeError, "k", dict(k=None), ["NoneType"]),
    "k dtype": (TypeError, "k", dict(k=KEYS.double()), ["float64", "float32"]),
    "k 5-d": (ValueError, "k", dict(k=KEYS[None]), ["(1, 2, 3, 7, 4)"]),
    "k heads": (ValueError, "k", dict(k=KEYS[:, :1]), ["(2, 1, 7, 4)", "(2, 3, 5, 4)"]),
    "k width": (ValueError, "k", dict(k=KEYS[..., :3]), ["(2, 3, 7, 3)"]),
    "k device": (ValueError, "k", dict(k=KEYS.to(META)), ["meta", "cpu"]),
    "scale string": (TypeError, "scale", dict(scale="auto"), ["str"]),
    "scale tensor": (TypeError, "scale", dict(scale=torch.tensor([1.0, 2.0])), ["Tensor"]),
    "scale bool": (TypeError, "scale", dict(scale=True), ["bool"]),
    "scale nan": (ValueError, "scale", dict(scale=float("nan")), ["nan"]),
    "lse list": (TypeError, "lse", dict(lse=[0.0]), ["list"]),
    "lse int": (TypeError, "lse", dict(lse=ones(2, 3, 5, dtype=torch.int64)), ["int64"]),
    "lse shape": (ValueError, "lse", dict(lse=ones(2, 3, 7)), ["(2, 3, 7)", "(2, 3, 5)"]),
    "lse device": (ValueError, "lse", dict(lse=ones(2, 3, 5, device=META)), ["meta", "cpu"]),
    "backend": (ValueError, "backend", dict(backend="flash"), ["flash", "reference"]),
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_received_arguments(case):
    error, name, changes, contains = ATTENTION_CASES[case]
    refused("attention_received", {**dict(q=Q, k=KEYS), **changes}, error, name, *contains)


# Choosing a backend ------------------------------------------------------------------------------------------------


def test_an_absent_backend_never_falls_back():
    for name, state in tp.backends().items():
        if state != "ok":
            with pytest.raises(RuntimeError) as caught:
                tp.kmeans(tokens(B, N, D), K, backend=name)
            assert name in str(caught.value) and state in str(caught.value), "the reason must be in the message"


def test_backends_lists_all_four_in_order():
    assert list(tp.backends()) == ["cuda", "triton", "cpu", "reference"]
    assert tp.backends()["reference"] == "ok"
    assert all(isinstance(state, str) and state for state in tp.backends().values())


def test_environment_override(monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_BACKEND", "reference")
    assert tp.kmeans(tokens(B, N, D), K).centers.shape == (B, K, D)
    monkeypatch.setenv("TOKENPOOL_EXT_BACKEND", "cudda")
    with pytest.raises(ValueError, match="TOKENPOOL_EXT_BACKEND.*cudda"):
        tp.kmeans(tokens(B, N, D), K)
    tp.kmeans(tokens(B, N, D), K, backend="reference")  # the argument wins


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_float64_weights_that_float32_does_not_hold_are_refused(size):
    """Taken as float32 they would be zeros or infinite; without a look at them the means came out plain or NaN."""
    x, weights = tokens(2, 6, 3), torch.rand(2, 6, dtype=torch.float64) + 0.1
    some = weights * torch.tensor([[1.0], [size]], dtype=torch.float64)
    calls = {
        "kmeans: weights": lambda x, w: tp.kmeans(x, 2, weights=w),
        "kmedoids: weights": lambda x, w: tp.kmedoids(x[1], 2, weights=w[1]),
        "pool: weights": lambda x, w: tp.pool(x, torch.zeros(2, 6).long(), 1, weights=w),
        "TokenPooling: scores": lambda x, w: tp.TokenPooling(2)(x, w),
        "compress: scores": lambda x, w: tp.compress(x, 2, scores=w),
    }
    for words, call in calls.items():
        call(x, weights)
        call(x.double(), some)  # held, and right (test_scaling_weights_changes_nothing)
        with pytest.raises(ValueError, match=words):
            call(x, some)
    one = torch.tensor([[True], [False]]).expand(2, 6)
    assert_identical(tp.kmeans(x, 2, weights=some, mask=one), tp.kmeans(x, 2, weights=weights, mask=one))
    tp.kmeans(x, 2, weights=weights * 0)


def test_numbers_of_numpy_are_welcome():
    x, scores = tokens(2, 12, 3), torch.arange(12.0).expand(2, 12)
    assert_identical(tp.kmeans(x, np.int64(5), num_iters=np.uint8(3)), tp.kmeans(x, 5, num_iters=3))
    assert torch.equal(tp.pool(x, tp.kmeans(x, 5).assignment, np.int32(5)), tp.kmeans(x, 5).centers)
    assert torch.equal(tp.TokenPooling(np.int64(5))(x, scores), tp.TokenPooling(5)(x, scores))
    assert repr(tp.TokenPooling(keep_ratio=np.float32(0.7))) == repr(tp.TokenPooling(keep_ratio=float(np.float32(0.7))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tp.attention_received(Q, Q, scale=np.float32(2)), tp.attention_received(Q, Q, scale=2.0))
    assert str(tp.explain(np.int64(2), 12, 5, 3)) == str(tp.explain(2, 12, 5, 3))
    refused("kmeans", good(num_clusters=np.bool_(True)), TypeError, "num_clusters", "bool")


def test_weights_of_integers_are_welcome():
    a = tp.kmeans(tokens(B, N, D), K, weights=torch.arange(B * N).reshape(B, N))
    b = tp.kmeans(tokens(B, N, D), K, weights=torch.arange(B * N).reshape(B, N).float())
    assert a.assignment.equal(b.assignment)


@pytest.mark.parametrize("init", [None, "strided"])
def test_values_of_a_negative_view_are_those_it_shows(init):
    """torch keeps the sign of such a view apart from its memory, at which the checks look."""
    x, w = tokens(1, 8, 3), torch.rand(1, 8) + 0.5
    with pytest.raises(ValueError, match="weights must be >= 0"):
        tp.kmeans(x, 3, weights=torch._neg_view(w), init=init)
    assert_identical(tp.kmeans(x, 3, weights=w, init=init), tp.kmeans(x, 3, weights=torch._neg_view(-w), init=init))


def test_tensors_without_memory_of_their_own():
    x = tokens(2, 16, 4)
    zeros = torch._efficientzerotensor((2, 16))
    assert_identical(
        tp.kmeans(x, 4, weights=zeros, init="strided"), tp.kmeans(x, 4, weights=torch.zeros(2, 16), init="strided")
    )
    kept = []
    torch.func.grad(lambda w: kept.append(w) or w.sum())(torch.ones(2, 16))  # outlives its transform
    assert tp.kmeans(x, 4, weights=kept[0]).assignment.shape == (2, 16)
    none = tp.kmeans(torch.empty(0, 10**9, 4), 3, weights=torch.empty(0, 10**9))
    assert none.centers.shape == (0, 3, 4)


def test_errors_survive_optimised_python():
    """No assert stands where an error is due: the checks hold under python -O."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import torch, tokenpool_ext as tp\n"
        "for bad in (dict(num_clusters=0), dict(num_clusters=2, num_iters=0), dict(num_clusters=2, init='no')):\n"
        "    try: tp.kmeans(torch.ones(1, 4, 2), **bad)\n"
        "    except ValueError: pass\n"
        "    else: raise SystemExit(f'accepted {bad}')\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_memory_that_is_not_there_is_named():
    """What torch says of it, where torch can be asked (2.13 and later)."""
    labels = torch.zeros(1, 2, dtype=torch.int64)  # both want more than any address space has
    for words, call in (
        (f"copy {4 << 46} bytes", lambda: tp.unpool(torch.zeros(1, 1, 1).expand(1, 1, 1 << 46), labels, backend="cpu")),
        (f"allocate {4 << 47} bytes", lambda: tp.pool(torch.zeros(1, 2, 1 << 17), labels, 1 << 30, backend="cpu")),
    ):
        with pytest.raises(RuntimeError, match=f"could not {words}.*(tried to allocate|out of memory)"):
            call()


@pytest.mark.parametrize("name, kind", [("cuda", torch.OutOfMemoryError), ("cpu", RuntimeError)])
def test_a_gpu_out_of_memory_raises_what_torch_raises(name, kind, monkeypatch):
    def kmeans(*args):
        raise RuntimeError("torch could not allocate 9 numbers: CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(REGISTRY[name], "ops", types.SimpleNamespace(kmeans=kmeans))
    with pytest.raises(RuntimeError, match="20 GiB") as caught:
        run((REGISTRY[name],), "kmeans")
    assert type(caught.value) is kind
