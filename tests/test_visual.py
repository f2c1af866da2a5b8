"""`select` and `compress`: counts, order, positions, ragged images, videos, and placeholders."""

import numpy as np
import oracle
import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st

import tokenpool_ext as tp
from tokenpool_ext.visual import drop_placeholders


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def members_mean(x, assignment, k):
    return torch.stack([x.double()[assignment == j].mean(0) for j in range(k)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compress_returns_means_positions_and_sizes_of_the_same_clusters(dtype):
    x = tokens(3, 48, 16, dtype=dtype)
    out, positions, sizes, assignment = tp.compress(x, 12, grid=(6, 8))
    assert out.shape == (3, 12, 16) and out.dtype == dtype and positions.shape == (3, 12, 2)
    assert (sizes.sum(1) == 48).all() and (sizes > 0).all()
    cells = torch.cartesian_prod(torch.arange(6), torch.arange(8)).double()
    for b in range(3):
        assert torch.equal(sizes[b], torch.bincount(assignment[b], minlength=12))
        torch.testing.assert_close(out[b].double(), members_mean(x[b], assignment[b], 12), rtol=0, atol=1e-2)
        torch.testing.assert_close(positions[b].double(), members_mean(cells, assignment[b], 12), rtol=0, atol=1e-5)


def test_rows_are_in_the_order_of_the_token_nearest_to_each_mean_which_gives_the_medoids_cell():
    x = tokens(2, 48, 16)
    _, cells, _, assignment = tp.compress(x, 12, grid=(6, 8), position_of="medoid")
    for b in range(2):
        nearest = oracle.representatives(f64(x[b]), assignment[b], 12).tolist()
        assert nearest == sorted(nearest)
        assert cells[b].tolist() == [[i // 8, i % 8] for i in nearest]


def test_groups_that_are_apart_come_out_exactly():
    """Four quadrants of a 4 x 4 image, each of one token: means, positions and order known."""
    colours = torch.eye(4)
    quadrant = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    out, positions, sizes, assignment = tp.compress(colours[quadrant], 4, grid=(4, 4))
    assert torch.equal(out, colours) and torch.equal(assignment, quadrant) and sizes.tolist() == [4] * 4
    assert positions.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    indices, mask = tp.select(colours[quadrant], 4)
    assert torch.equal(quadrant[indices], torch.arange(4)) and torch.equal(mask.nonzero()[:, 0], indices)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1)), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
)
def test_ragged_images_are_what_each_alone_is(images, scored, duplicates):
    grids = [(h, w) for h, w, _ in images]
    counts = [max(1, round(h * w * share)) for h, w, share in images]
    xs = [tokens(h * w, 8, seed=i) for i, (h, w) in enumerate(grids)]
    if duplicates:
        xs = [x[:1].expand_as(x) for x in xs]
    scores = [tokens(len(x), seed=9).abs() for x in xs] if scored else None
    out, positions, sizes, assignment = tp.compress(xs, counts, grid=grids, scores=scores)
    indices, kept = tp.select(xs, counts, scores=scores)
    for i, (x, k) in enumerate(zip(xs, counts)):
        s = None if scores is None else scores[i]
        alone = tp.compress(x, k, grid=grids[i], scores=s)
        for a, b in zip((out[i], positions[i], sizes[i], assignment[i]), alone):
            assert torch.equal(a, b)
        assert out[i].shape == (k, 8) and int(sizes[i].sum()) == len(x)
        assert torch.equal(indices[i], tp.select(x, k, scores=s)[0])
        assert indices[i].shape == (k,) and (indices[i].diff() > 0).all() and int(kept[i].sum()) == k

    longest = max(map(len, xs))
    padded = torch.full((len(xs), longest, 8), float("nan"))
    mask = torch.zeros(len(xs), longest, dtype=torch.bool)
    for b, x in enumerate(xs):
        padded[b, longest - len(x) :], mask[b, longest - len(x) :] = x, True
    dense = tp.compress(padded, torch.tensor(counts), mask=mask)
    indices, kept = tp.select(padded, torch.tensor(counts), mask=mask)
    plain = tp.compress(xs, counts)
    assert plain.positions is None and dense.positions is None
    for b, k in enumerate(counts):
        assert torch.equal(dense.tokens[b, :k], plain.tokens[b]) and (dense.tokens[b, k:] == 0).all()
        assert torch.equal(dense.assignment[b][mask[b]], plain.assignment[b])
        assert (dense.assignment[b][~mask[b]] == -1).all() and not kept[b][~mask[b]].any()
        assert torch.equal(padded[b][kept[b]], padded[b, indices[b, :k]]) and (indices[b, k:] == -1).all()


def test_select_keeps_rows_and_a_nan_stays_in_its_image():
    x = tokens(3, 40, 8)
    clean, _ = tp.select(x, 7)
    x[1, 3] = float("nan")
    indices, mask = tp.select(x, 7)
    assert torch.equal(indices[0], clean[0]) and torch.equal(indices[2], clean[2])
    assert (mask.sum(1) == 7).all()
    out = tp.compress(x, 7, grid=(5, 8))
    assert torch.isfinite(out.tokens[0]).all() and torch.isfinite(out.tokens[2]).all()
    assert (out.sizes.sum(1) == 40).all()


@pytest.mark.parametrize("frames, window, k", [(6, 2, 30), (7, 3, 20), (5, 8, 4)])
def test_a_window_of_a_video_merges_nothing_outside(frames, window, k):
    x = tokens(2, frames * 12, 8)
    out, positions, sizes, assignment = tp.compress(x, k, grid=(frames, 3, 4), temporal_window=window)
    assert out.shape == (2, k, 8) and positions.shape == (2, k, 3) and (sizes.sum(1) == frames * 12).all()
    of_token = torch.arange(frames * 12) // 12 // window
    for b in range(2):
        of_cluster = torch.empty(k, dtype=torch.int64).scatter_(0, assignment[b], of_token)
        assert torch.equal(of_cluster[assignment[b]], of_token) and (of_cluster.diff() >= 0).all()
        torch.testing.assert_close(out[b].double(), members_mean(x[b], assignment[b], k), rtol=0, atol=1e-5)
    indices, mask = tp.select(x, k, grid=(frames, 3, 4), temporal_window=window)
    assert (mask.sum(1) == k).all() and (indices.diff() > 0).all()
    assert torch.equal(of_token[indices].sort(1).values, of_token[indices])


def test_scores_weigh_and_gradients_flow():
    x = tokens(30, 8, dtype=torch.float64).requires_grad_()
    scores = tokens(30, seed=1).abs()
    out, positions, _, assignment = tp.compress(x, 5, positions=tokens(30, 3, seed=2), scores=scores)
    w = scores.double()
    for j in range(5):
        rows = assignment == j
        expected = (w[rows, None] * x.detach()[rows]).sum(0) / w[rows].sum()
        torch.testing.assert_close(out[j].detach(), expected, rtol=0, atol=1e-6)
    out.sum().backward()
    share = w / torch.zeros(5, dtype=torch.float64).index_add_(0, assignment, w)[assignment]
    torch.testing.assert_close(x.grad, share[:, None].expand(30, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grid": (3, 4), "position_weight": 0.7},
        {"grid": (3, 2, 2), "temporal_window": 2, "position_of": "medoid"},
        {"mask": torch.arange(24).view(2, 12) % 5 > 0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradients_reach_tokens_and_scores(options):
    x, s = tokens(2, 12, 3, dtype=torch.float64), tokens(2, 12, seed=1, dtype=torch.float64).abs() + 0.1
    inputs = x.requires_grad_(), s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: tp.compress(x, 4, scores=s, **options).tokens, inputs)
    if "mask" not in options:  # a list of images, and one alone
        images = lambda x, s: tuple(tp.compress(list(x), [4, 3], scores=list(s), **options).tokens)  # noqa: E731
        assert torch.autograd.gradcheck(images, inputs)
        assert torch.autograd.gradcheck(lambda x, s: tp.compress(x[0], 4, scores=s[0], **options).tokens, inputs)


def test_vmap_is_a_larger_batch():
    x, s = tokens(3, 2, 12, 4), tokens(3, 2, 12, seed=1).abs()
    masks = torch.arange(24).view(2, 12) % 5 > 0
    for options in ({}, {"grid": (3, 2, 2), "temporal_window": 2, "position_of": "medoid"}, {"mask": masks}):
        both = lambda x, s: (*tp.compress(x, 4, scores=s, **options)[::2], *tp.select(x, 4, scores=s))  # noqa: E731
        got = torch.vmap(both)(x, s)
        for a, parts in zip(got, zip(*(both(*each) for each in zip(x, s)))):
            assert torch.equal(a, torch.stack(parts))
    ragged = lambda x: tp.compress([x[0], x[1, :5]], [4, 2]).tokens[1]  # noqa: E731
    assert torch.equal(torch.vmap(ragged)(x), torch.stack([ragged(each) for each in x]))
    grad = torch.func.grad(lambda s, x: tp.compress(x, 4, scores=s).tokens.square().sum())
    torch.testing.assert_close(torch.vmap(grad)(s, x), torch.stack([grad(*each) for each in zip(s, x)]))
    for argument, value in (("mask", masks.expand(3, 2, 12)), ("num_tokens", torch.full((3, 2), 4))):
        for function in (tp.compress, tp.select):
            with pytest.raises(TypeError, match=rf"{argument} must not be mapped over by torch.vmap"):
                torch.vmap(lambda x, v: function(x, **{"num_tokens": 4, argument: v})[0])(x, value)
    with pytest.raises(TypeError, match="input_ids must not be mapped"):
        torch.vmap(lambda ids: drop_placeholders(ids, 9, [1]))(torch.full((2, 3), 9))


def test_positions_beside_a_mask_are_of_all_tokens():
    x, places, scores = tokens(2, 6, 3), tokens(2, 6, 2, seed=1), tokens(2, 6, seed=2).abs()
    mask = torch.tensor([[True] * 6, [False, True] * 3])
    merged = tp.compress(x, 3, mask=mask, positions=places, scores=scores)
    lists = tp.compress(x, 3, mask=mask, positions=list(places), scores=list(scores))
    assert torch.equal(lists.positions, merged.positions) and torch.equal(lists.tokens, merged.tokens)
    for b in range(2):
        rows = mask[b]
        alone = tp.compress(x[b, rows], 3, positions=places[b, rows], scores=scores[b, rows])
        assert torch.equal(merged.positions[b], alone.positions)
    for wrong in (places[:, :5], tokens(2, 7, 2), tokens(3, 6, 2)):
        with pytest.raises(ValueError, match="positions"):
            tp.compress(x, 3, mask=mask, positions=wrong)


def test_grids_and_counts_of_any_library():
    """`image_grid_thw` of a processor is a tensor, or a list of its rows; arrays and ranges are lists of numbers."""
    x, grids = tokens(2, 12, 4), torch.tensor([[3, 4], [2, 6]])
    want = tp.compress(x, [2, 3], grid=[(3, 4), (2, 6)])
    for grid in (grids, list(grids), grids.numpy(), list(grids.numpy()), [tuple(row) for row in grids]):
        for counts in (torch.tensor([2, 3]), np.array([2, 3]), range(2, 4), [torch.tensor(2), np.int64(3)]):
            for a, b in zip(tp.compress(x, counts, grid=grid), want):
                assert torch.equal(a, b)


def test_images_of_several_dtypes_keep_theirs():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    images = [tokens(9, 4, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    for x, y, a in zip(images, *tp.compress(images, 3)[::3]):
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), members_mean(x, a, 3), rtol=0, atol=torch.finfo(x.dtype).eps * 4)


def test_drop_placeholders():
    ids = torch.tensor([1, 9, 9, 9, 9, 2, 9, 9, 3])
    shorter, kept = drop_placeholders(ids, 9, [2, 1])
    assert shorter.tolist() == [1, 9, 9, 2, 9, 3] and torch.equal(ids[kept], shorter)
    assert drop_placeholders(ids, 9, [4, 2])[0].tolist() == ids.tolist()
    assert drop_placeholders(ids, 9, torch.tensor([0, 0]))[0].tolist() == [1, 2, 3]
    assert drop_placeholders(torch.tensor([1, 2]), 9, [])[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="2 runs"):
        drop_placeholders(ids, 9, [2])
    with pytest.raises(ValueError, match=r"counts\[1\].*2"):
        drop_placeholders(ids, 9, [2, 3])
    with pytest.raises(ValueError, match=r"counts\[1\].*-1"):
        drop_placeholders(ids, 9, [2, -1])


@pytest.mark.parametrize(
    "argument, value",
    [
        ("input_ids", [1, 9, 9]),
        ("input_ids", torch.tensor([[1, 9, 9]])),
        ("input_ids", torch.tensor([1.0, 9.0])),
        ("placeholder", 9.0),
        ("placeholder", None),
        ("counts", 1),
        ("counts", torch.tensor(1)),
        ("counts", [1.7]),
        ("counts", [True]),
        ("counts", torch.tensor([1.7])),
    ],
)
def test_drop_placeholders_refuses_what_is_no_integer(argument, value):
    good = {"input_ids": torch.tensor([1, 9, 9]), "placeholder": 9, "counts": [1]}
    with pytest.raises(TypeError, match=f"drop_placeholders: {argument}"):
        drop_placeholders(**{**good, argument: value})


SECOND_BELOW_0 = [torch.ones(8), torch.tensor([1.0, 1, 1, 1, 1, -2, 1, -3])]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: tp.compress(tokens(4), 2), ValueError, "tokens"),
        (lambda: tp.compress([], 2), ValueError, "tokens"),
        (lambda: tp.compress([tokens(4, 3), tokens(4, 2)], 2), ValueError, r"tokens\[1\]"),
        (lambda: tp.compress(tokens(4, 3).long(), 2), TypeError, "tokens"),
        (lambda: tp.compress(tokens(2, 4, 3), 2, scores=torch.tensor(1.0)), ValueError, "scores must hold 2 images"),
        (lambda: tp.compress([tokens(4, 3)] * 2, 2, grid=[(2, 2), None]), TypeError, "grid of image 1.*None"),
        (lambda: tp.compress(tokens(4, 3), torch.ones((), device="meta").int()), TypeError, "num_tokens must hold"),
        (lambda: tp.select([tokens(4, 3), tokens(1, 3)], 2), ValueError, "image 1"),
        (lambda: tp.select(tokens(4, 3), 0), ValueError, "num_tokens"),
        (lambda: tp.select(tokens(4, 3), 2.0), TypeError, "num_tokens"),
        (lambda: tp.select([tokens(4, 3)], [2, 2]), ValueError, "num_tokens"),
        (lambda: tp.compress(tokens(4, 3), 2, grid=(2, 3)), ValueError, "grid of image 0"),
        (lambda: tp.compress(tokens(4, 3), 2, temporal_window=1), ValueError, "temporal_window"),
        (lambda: tp.compress(tokens(4, 3), 2, grid=(2, 2), temporal_window=1), ValueError, "temporal_window"),
        (lambda: tp.compress(tokens(4, 3), 1, grid=(2, 2, 1), temporal_window=1), ValueError, "one a window"),
        (lambda: tp.compress(tokens(4, 3), 2, positions=tokens(3, 2)), ValueError, "positions"),
        (lambda: tp.compress(tokens(4, 3), 2, scores=tokens(3)), ValueError, "scores"),
        (lambda: tp.compress(tokens(4, 3), 2, position_of="mode"), ValueError, "position_of"),
        (lambda: tp.compress(tokens(4, 3), 2, num_iters=0), ValueError, "compress: num_iters"),
        (lambda: tp.select(tokens(4, 3), 2, num_iters=0), ValueError, "select: num_iters"),
        (lambda: tp.select(tokens(4, 3), 2, backend="gpu"), ValueError, "select: backend"),
        (lambda: tp.compress(tokens(2, 4, 3), 2, mask=torch.ones(2, 4)), TypeError, "mask"),
        (lambda: tp.compress(None, 2), TypeError, "compress: tokens must be a tensor or a list"),
        (lambda: tp.compress([tokens(4, 3), None], 2), TypeError, r"tokens\[1\] must be a torch.Tensor"),
        (lambda: tp.select(tokens(2, 4, 3).to_sparse(), 2), TypeError, "select: tokens must be a dense"),
        (lambda: tp.select(tokens(4, 3), 2, grid=4), TypeError, "select: grid must be"),
        (lambda: tp.select(tokens(4, 3), 2, scores=3), TypeError, "select: scores must be"),
        (lambda: tp.select(tokens(4, 3), 2, scores=-tokens(4).abs()), ValueError, "select: scores must be >= 0"),
        (lambda: tp.compress(tokens(4, 3), 2, scores=tokens(4) + 0j), TypeError, "scores of image 0 must be real"),
        (lambda: tp.compress(tokens(4, 3), 2, positions=tokens(4, 2) + 0j), TypeError, "positions of image 0 must be"),
        (
            lambda: tp.compress([tokens(8, 3)] * 2, 4, grid=[(2, 2, 2), (2, 4)], temporal_window=1),
            ValueError,
            r"got \(2, 4\) of image 1",
        ),
        (
            lambda: tp.select([tokens(8, 3)] * 2, 4, grid=(2, 2, 2), temporal_window=1, scores=SECOND_BELOW_0),
            ValueError,
            "scores must be >= 0, got -2 at image 1, token 5",
        ),
        (lambda: tp.select([tokens(4, 3)] * 2, [1, 0]), ValueError, "num_tokens of image 1 must be from 1"),
        (
            lambda: tp.compress([tokens(4, 3)] * 2, 2, positions=[tokens(4, 2), tokens(4, 3)]),
            ValueError,
            "positions of image 1.*one P",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_two_merged_tokens_the_first_stands_for_both_with_positions_too(dtype):
    """They are equally far from their mean, which rounding must not decide."""
    x = torch.randn(8, 36, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = tp.compress(x, 18, grid=(6, 6), position_of="medoid", position_weight=0.5)
    first = torch.where(out.assignment[:, None] == torch.arange(18)[:, None], torch.arange(36), 36).amin(2)
    cells, pairs = torch.stack([first // 6, first % 6], 2), out.sizes == 2
    assert pairs.sum() > 20 and torch.equal(out.positions[pairs], cells[pairs].float())


def test_the_medoid_is_the_token_nearest_to_its_mean_with_positions_too():
    x = torch.randn(2, 36, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = tp.compress(x, 9, grid=(6, 6), position_of="medoid", position_weight=3.0)
    for i in range(2):
        nearest = []
        for j in range(9):
            members = (out.assignment[i] == j).nonzero()[:, 0]
            offset = (x[i, members] - out.tokens[i, j]).square().sum(1)
            nearest.append(int(members[offset.argmin()]))
        assert (out.positions[i] @ torch.tensor([6.0, 1.0])).tolist() == nearest
        assert nearest == sorted(nearest), "reading order"
