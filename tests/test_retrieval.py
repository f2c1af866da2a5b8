"""tokenpool_ext.retrieval: every form of input, counts, bounds, and documents that do not touch each other."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

import tokenpool_ext as tp
from tokenpool_ext.retrieval import TokenPooler
from tokenpool_ext.retrieval.pooler import _energy, padded_length
from tokenpool_ext.retrieval.refine import refined


def documents(*lengths, features=24, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        normalize(torch.randn(n, features, generator=generator) + torch.randn(1, features, generator=generator), dim=-1)
        .to(dtype)
        for n in lengths
    ]  # fmt: skip


def assert_same(a, b):
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b)):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num()), f"document {i}"


RAGGED = (40, 0, 1, 2, 3, 97, 41, 40, 300, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_factor": 3},
        {"pool_factor": 1.5, "protected_tokens": 1},
        {"num_tokens": 9, "protected_tokens": 2},
        {"max_error": 0.2},
        {"distance_threshold": 0.3, "max_tokens": 20},
        {"pool_factor": 2, "normalize": False},
        {"pool_factor": 8, "protected_tokens": 1},  # refined
        {"max_error": 0.3, "refine": 4},
    ],
    ids=str,
)
def test_every_form_and_order_gives_what_one_document_alone_gives(options):
    docs = documents(*RAGGED)
    pooler = TokenPooler(**options)
    alone = [pooler([x], return_assignment=True) for x in docs]
    pooled, assignment = pooler(docs, return_assignment=True)
    assert_same(pooled, [a[0][0] for a in alone])
    assert_same(assignment, [a[1][0] for a in alone])
    assert_same(pooler(docs[::-1])[::-1], pooled)

    lengths = torch.tensor([len(x) for x in docs])
    padded = torch.full((len(docs), 311, 24), float("nan"))
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    for b, x in enumerate(docs):  # padding in front, between and behind
        rows = torch.randperm(311, generator=torch.Generator().manual_seed(b))[: len(x)].sort().values
        padded[b, rows], mask[b, rows] = x, True
    out, out_mask, labels = pooler(padded, mask, return_assignment=True)
    assert_same([x[m] for x, m in zip(out, out_mask)], pooled)
    assert_same([a[m] for a, m in zip(labels, mask)], assignment)
    assert (labels[~mask] == -1).all() and (out[~out_mask] == 0).all()

    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    flat, out_ends, labels = pooler(torch.cat(docs), cu_seqlens=ends, return_assignment=True)
    assert_same(flat.split(out_ends.diff().tolist()), pooled)
    assert_same(labels.split(lengths.tolist()), assignment)


@given(
    st.lists(st.integers(0, 70), min_size=0, max_size=8),
    st.floats(1, 8),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
)
def test_counts_norms_means_and_order(lengths, factor, protected, dtype, duplicates):
    docs = documents(*lengths, dtype=dtype)
    if duplicates:
        docs = [x[:1].expand_as(x) if len(x) else x for x in docs]
    pooled, assignment = TokenPooler(factor, protected_tokens=protected)(docs, return_assignment=True)
    for x, y, a in zip(docs, pooled, assignment):
        free = max(len(x) - protected, 0)
        assert len(y) == len(x) - free + min(free, max(int(free // factor), 1))
        assert y.dtype == dtype and a.shape == (len(x),) and a.dtype == torch.int64
        if len(x) == 0:
            continue
        assert a[: len(x) - free].tolist() == list(range(len(x) - free))
        seen = list(dict.fromkeys(a.tolist()))
        assert seen == list(range(len(y)))  # every vector stands for a token, in reading order
        means = torch.stack([normalize(x.double(), dim=-1)[a == j].mean(0) for j in range(len(y))])
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
        torch.testing.assert_close(y.double(), normalize(means, dim=-1), rtol=0, atol=tolerance)


def test_means_are_renormalised_in_float32():
    """Two tokens at an angle of 90 degrees: the mean of bfloat16 rows, rounded once, after its norm became 1."""
    x = torch.eye(8, dtype=torch.bfloat16)[:2]
    pooled = TokenPooler(2)([x])[0]
    assert torch.equal(pooled, torch.full((1, 2), 0.5**0.5).to(torch.bfloat16) @ x)


def test_protected_tokens_are_kept():
    x = documents(30)[0]
    pooled = TokenPooler(4, protected_tokens=3, normalize=False)([x])[0]
    assert torch.equal(pooled[:3], x[:3]) and len(pooled) == 3 + 27 // 4


def test_nan_stays_in_its_document():
    docs = documents(50, 50, 50)
    clean = TokenPooler(3)(docs)
    docs[1][7] = float("nan")
    for options in ({"pool_factor": 3}, {"max_error": 0.3}, {"distance_threshold": 0.3}):
        pooled, assignment = TokenPooler(**options)(docs, return_assignment=True)
        assert torch.isfinite(pooled[0]).all() and torch.isfinite(pooled[2]).all()
        assert 0 <= int(assignment[1].min()) and int(assignment[1].max()) < len(pooled[1])
        if "pool_factor" in options:
            assert torch.equal(pooled[0], clean[0]) and torch.equal(pooled[2], clean[2])


def relative_error(x, y, assignment):
    x = x.double() / x.double().abs().max()  # no square overflows or vanishes
    means = tp.pool(x, assignment, len(y))
    return float((x - means[assignment]).square().sum() / x.square().sum())


SIZES = [(torch.float32, 1e-30), (torch.float32, 1e-13), (torch.float32, 1e19), (torch.bfloat16, 1e30)]
SIZES += [(torch.float64, 1e-200), (torch.float64, 1e200)]


@pytest.mark.parametrize("dtype, size", SIZES, ids=str)
def test_tokens_of_any_length_are_scaled_to_unit_norm(dtype, size):
    docs = [x.double() for x in documents(40, 2, 1)]
    pooled, assignment = TokenPooler(3)([(x * size).to(dtype) for x in docs], return_assignment=True)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    for x, y, a in zip(docs, pooled, assignment):
        means = torch.stack([normalize(x, dim=-1)[a == j].mean(0) for j in range(len(y))])
        torch.testing.assert_close(y.double(), normalize(means, dim=-1), rtol=0, atol=tolerance)
    x = (docs[0] * size).to(dtype).requires_grad_()
    TokenPooler(3)([x])[0].sum().backward()
    assert x.grad.isfinite().all()
    mixed = docs[0].to(dtype)  # a token of another length changes no other
    mixed[::2] *= size
    same = TokenPooler(3)([docs[0].to(dtype)])[0]
    torch.testing.assert_close(TokenPooler(3)([mixed])[0], same, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("dtype, size", SIZES, ids=str)
@pytest.mark.parametrize("refine", [0, 3])
def test_bounds_hold_for_tokens_of_any_length_that_are_not_scaled(dtype, size, refine):
    x = (documents(60)[0].double() * size).to(dtype)
    for bound in (0.0, 0.2):
        pooler = TokenPooler(max_error=bound, normalize=False, refine=refine)
        pooled, assignment = pooler([x], return_assignment=True)
        assert relative_error(x, pooled[0], assignment[0]) <= bound + 1e-6 and len(pooled[0]) > 5
    near = TokenPooler(distance_threshold=0.2, normalize=False, refine=refine)
    assert len(near([x])[0]) == len(near([(x.double() / size).to(dtype)])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalized", [True, False])
def test_equal_tokens_are_at_distance_zero(dtype, normalized):
    """Tokens of zeros, too: they stand for each other, and for no other token."""
    for features in (16, 24, 128):
        generator = torch.Generator().manual_seed(1)
        x = torch.cat([torch.randn(5, features, generator=generator), torch.zeros(1, features)]).to(dtype)
        for options in ({"distance_threshold": 0.0}, {"max_error": 0.0}, {"distance_threshold": 0.01}):
            pooled, labels = TokenPooler(**options, normalize=normalized)([x.repeat(7, 1)], return_assignment=True)
            assert len(pooled[0]) == 6 and labels[0].tolist() == list(range(6)) * 7, options


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_max_error_keeps_the_bound_with_one_vector_less_missing_it(bound):
    docs = documents(1, 2, 30, 64, 150)
    pooled, assignment = TokenPooler(max_error=bound)(docs, return_assignment=True)
    for x, y, a in zip(docs, pooled, assignment):
        assert relative_error(x, y, a) <= bound + 1e-6
        if len(y) > 1:
            fewer, labels = TokenPooler(num_tokens=len(y) - 1)([x], return_assignment=True)
            assert relative_error(x, fewer[0], labels[0]) > bound - 1e-6


@pytest.mark.parametrize("bound", [0.05, 0.2, 0.5, 2.0])
def test_distance_threshold_keeps_the_bound_with_one_vector_less_missing_it(bound):
    def worst(x, y, a):
        return float((1 - (x * y[a]).sum(-1)).max())

    docs = documents(1, 2, 30, 64, 150)
    pooled, assignment = TokenPooler(distance_threshold=bound)(docs, return_assignment=True)
    for x, y, a in zip(docs, pooled, assignment):
        assert worst(x, y, a) <= bound + 1e-5
        if len(y) > 1:
            fewer, labels = TokenPooler(num_tokens=len(y) - 1)([x], return_assignment=True)
            assert worst(x, fewer[0], labels[0]) > bound - 1e-5


def test_groups_of_equal_tokens_are_found_by_every_bound():
    x = torch.eye(16)[torch.tensor([3, 3, 5, 5, 5, 9])]
    for options in ({"max_error": 0.01}, {"distance_threshold": 0.01}):
        assert torch.equal(TokenPooler(**options)([x])[0], torch.eye(16)[[3, 5, 9]])


def test_refinement_lowers_the_loss_by_what_its_moves_say():
    """0, 2 | 3.1 costs 2; moving the middle token gains 2 - 0.605: 0 | 2, 3.1 costs 0.605."""
    x = torch.tensor([[0.0], [2.0], [3.1]], dtype=torch.float64)
    assert refined(x, torch.tensor([0, 0, 1]), 2, 1).tolist() == [0, 1, 1]
    assert refined(x, torch.tensor([0, 1, 1]), 2, 5).tolist() == [0, 1, 1]
    same = torch.ones(6, 3)  # equal tokens: no move gains, no cluster is emptied
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(refined(same, labels, 3, 5), labels)
    for x in documents(80, 200, features=48):
        start = tp.kmeans(x, 16, init="farthest").assignment
        losses = []
        for rounds in range(6):
            labels = refined(x, start, 16, rounds)
            assert sorted(set(labels.tolist())) == list(range(16)) == list(dict.fromkeys(labels.tolist()))
            losses.append(relative_error(x, torch.empty(16, 1), labels))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_max_tokens_wins_over_a_bound_and_a_factor():
    x = documents(60)
    assert len(TokenPooler(max_error=0.0, max_tokens=7)(x)[0]) == 7
    assert len(TokenPooler(2, max_tokens=7)(x)[0]) == 7
    assert len(TokenPooler(max_tokens=7, protected_tokens=2)(x)[0]) == 7
    assert len(TokenPooler(20, max_tokens=7)(x)[0]) == 3


def test_padding_is_at_most_an_eighth_and_a_matter_of_the_document_alone():
    for n in range(1, 5000):
        assert n <= padded_length(n) <= n * 1.125


def test_gradients_reach_the_tokens():
    x = documents(20, dtype=torch.float64)[0].requires_grad_()
    labels = TokenPooler(3)([x.detach()], return_assignment=True)[1][0]
    weights = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((TokenPooler(3)([x])[0] * weights).sum(), x)
    means = torch.stack([normalize(x, dim=-1)[labels == j].mean(0) for j in range(6)])
    (expected,) = torch.autograd.grad((normalize(means, dim=-1) * weights).sum(), x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=str)
def test_a_refined_document_changes_no_other(options):
    """K < n / 5 in the first one alone: the others' means came from another sum beside it."""
    docs = documents(40, *[9, 12, 40] * 10, features=3, dtype=torch.float64)
    docs[0] = docs[0][:1].expand(40, 3)
    for bound in ({"max_error": 0.05}, {"pool_factor": 4.5}, {"num_tokens": 8}):
        pooler = TokenPooler(**bound, **options)
        assert_same(pooler(docs), [pooler([x])[0] for x in docs])


def test_bounds_are_decided_alike_in_any_batch_with_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for x in documents(*range(400, 430), features=128):
            assert torch.equal(_energy(x[None]), _energy(torch.stack([x, x]))[:1])
    finally:
        torch.set_num_threads(before)


def test_vmap_is_a_larger_batch():
    x = torch.stack(documents(12, 12, 12, 12, 12, 12)).view(3, 2, 12, 24)
    x[0, 1, 3] *= 1e-30  # by itself scaled
    x[1, 0, :2] = 0
    for options in ({"pool_factor": 3}, {"num_tokens": 2, "protected_tokens": 1}, {"pool_factor": 1, "refine": 3}):
        pooler = TokenPooler(**options)
        for function in (
            lambda x: pooler(x, return_assignment=True),
            lambda x: pooler(list(x)),
            lambda x: pooler(x.flatten(0, 1), cu_seqlens=torch.tensor([0, 5, 24])),
        ):
            got = torch.vmap(lambda x: tuple(function(x)))(x)
            for a, parts in zip(got, zip(*(function(each) for each in x))):
                torch.testing.assert_close(a, torch.stack(parts), rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="documents beside max_error must not be mapped over by torch.vmap"):
        torch.vmap(TokenPooler(max_error=0.2))(x)
    for argument, value in (("mask", torch.ones(3, 2, 12) > 0), ("cu_seqlens", torch.tensor([[0, 12]] * 3))):
        with pytest.raises(TypeError, match=f"{argument} must not be mapped"):
            torch.vmap(lambda x, v: TokenPooler(2)(x, **{argument: v})[0])(x if argument == "mask" else x[:, 0], value)


def test_results_do_not_keep_the_batch_in_memory():
    for y in TokenPooler(2)(documents(100, 100, 3)):
        assert y.untyped_storage().nbytes() == y.numel() * 4


def test_empty_inputs():
    pooler = TokenPooler(2)
    assert pooler([]) == [] and pooler([], return_assignment=True) == ([], [])
    out, mask = pooler(torch.zeros(0, 5, 8))
    assert out.shape == (0, 0, 8) and mask.shape == (0, 0)
    out, ends = pooler(torch.zeros(0, 8), cu_seqlens=torch.tensor([0, 0]))
    assert out.shape == (0, 8) and ends.tolist() == [0, 0]
    assert pooler([torch.zeros(0, 8)])[0].shape == (0, 8)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda p: p([torch.zeros(2, 4), torch.zeros(3)]), ValueError, r"documents\[1\]"),
        (lambda p: p([torch.zeros(2, 4), torch.zeros(3, 5)]), ValueError, r"documents\[1\].*D = 4"),
        (lambda p: p([torch.zeros(2, 4), torch.zeros(3, 4).long()]), TypeError, r"documents\[1\]"),
        (lambda p: p([torch.zeros(2, 4), np.zeros((3, 4))]), TypeError, r"documents\[1\].*torch.as_tensor"),
        (lambda p: p(3), TypeError, "documents"),
        (lambda p: p(torch.zeros(3, 4)), ValueError, "documents"),
        (lambda p: p(torch.zeros(1, 3, 4), torch.ones(1, 3)), TypeError, "mask"),
        (lambda p: p(torch.zeros(1, 3, 4), torch.ones(1, 2) > 0), ValueError, "mask"),
        (lambda p: p([torch.zeros(3, 4)], torch.ones(1, 3) > 0), ValueError, "mask"),
        (lambda p: p(torch.zeros(3, 4), cu_seqlens=torch.tensor([0, 2])), ValueError, "cu_seqlens"),
        (lambda p: p(torch.zeros(3, 4), cu_seqlens=torch.tensor([0, 2, 1, 3])), ValueError, "document 1"),
        (lambda p: p(torch.zeros(3, 4), cu_seqlens=[0, 3]), TypeError, "cu_seqlens"),
        (lambda p: p(torch.zeros(1, 3, 4).to_sparse()), TypeError, "documents must be a dense"),
        (lambda p: p([torch.zeros(3, 4, device="meta")]), TypeError, r"documents\[0\] must hold values"),
        (lambda p: p(torch.zeros(1, 3, 4, device="meta")), TypeError, "documents must hold values"),
        (lambda p: p(torch.zeros(3, 4), cu_seqlens=torch.zeros(2, device="meta").int()), TypeError, "cu_seqlens must"),
        (lambda p: p([torch.zeros(3, 4).to_sparse()]), TypeError, r"documents\[0\] must be a dense"),
        (lambda p: p([torch.nested.nested_tensor([torch.zeros(3)])]), TypeError, r"documents\[0\] must be a dense"),
    ],
)
def test_bad_input_names_the_argument_or_the_document(call, error, words):
    with pytest.raises(error, match=words):
        call(TokenPooler(2))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({}, ValueError, "pool_factor"),
        ({"pool_factor": 2, "max_error": 0.1}, ValueError, "pool_factor and max_error"),
        ({"num_tokens": 2, "max_tokens": 3}, ValueError, "num_tokens"),
        ({"pool_factor": 0.5}, ValueError, "pool_factor"),
        ({"pool_factor": float("nan")}, ValueError, "pool_factor"),
        ({"pool_factor": "3"}, TypeError, "pool_factor"),
        ({"max_error": 1.5}, ValueError, "max_error"),
        ({"distance_threshold": -1}, ValueError, "distance_threshold"),
        ({"num_tokens": 2, "protected_tokens": 2}, ValueError, "num_tokens"),
        ({"pool_factor": 2, "protected_tokens": -1}, ValueError, "protected_tokens"),
        ({"pool_factor": 2, "refine": -1}, ValueError, "refine"),
        ({"pool_factor": 2, "normalize": 1}, TypeError, "normalize"),
        ({"pool_factor": 2, "backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        TokenPooler(**options)


def test_progress_counts_every_document(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    TokenPooler(2)(documents(*RAGGED), progress=True)
    assert "10/10" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=False"):
        TokenPooler(2)(documents(4), progress=True)


@pytest.mark.parametrize(
    "name, value", [("pool_factor", 0.5), ("max_tokens", 0), ("num_iters", 0), ("normalize", 1), ("backend", "gpu")]
)
def test_attributes_set_later_are_checked(name, value):
    pooler = TokenPooler(2)
    setattr(pooler, name, value)
    with pytest.raises((TypeError, ValueError), match=f"TokenPooler: {name}"):
        pooler([torch.randn(8, 4)])


@pytest.mark.parametrize("name, value", [("num_tokens", 3), ("max_error", 0.2), ("distance_threshold", 0.2)])
def test_a_second_rule_set_later_is_refused_and_in_place_of_the_first_holds(name, value):
    pooler, x = TokenPooler(2), documents(40)
    setattr(pooler, name, value)
    with pytest.raises(ValueError, match=f"pool_factor and {name}|{name} and pool_factor"):
        pooler(x)
    pooler.pool_factor = None
    assert torch.equal(pooler(x)[0], TokenPooler(**{name: value})(x)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"pool_factor": 1.5, "max_tokens": 7, "normalize": False, "num_iters": 3, "refine": 0, "backend": "reference"},
        {"max_error": 0.0, "protected_tokens": 2},
        {"distance_threshold": 0},
        {"num_tokens": 4},
    ],
)
def test_the_repr_makes_it_again(options):
    pooler = eval(repr(TokenPooler(**options)))
    assert vars(pooler) == vars(TokenPooler(**options))


@pytest.mark.filterwarnings("error")
def test_numbers_of_numpy_are_welcome():
    x = documents(40)
    for number in (np.float32(2), np.float64(2), np.float16(2), np.int8(2)):
        assert torch.equal(TokenPooler(number)(x)[0], TokenPooler(2)(x)[0])
