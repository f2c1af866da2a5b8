"""The Triton kernels against the reference and against the contract, on small shapes.

Runs on a GPU when there is one, and in Triton's interpreter when TRITON_INTERPRET=1 (test_triton_interpret.py starts
it so on machines without a GPU).  The shared bodies of the other test files cover the backends alike; here is what is
particular to this backend: both paths, odd feature counts, chunking, faults, registration.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 (see test_triton_interpret.py)", allow_module_level=True)

import tokenpool_ext  # noqa: E402
import tokenpool_ext.triton as backend  # noqa: E402
from tokenpool_ext import reference  # noqa: E402
from tokenpool_ext.triton import clustering, gram, heuristics, launch  # noqa: E402

DEVICE = "cpu" if INTERPRET else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = ("gram", "direct")
# One unit in the last place: sums in another order may round to the other side.
CENTER_RTOL = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
names = pytest.mark.parametrize("name", ("kmeans", "kmedoids"))
paths = pytest.mark.parametrize("path", PATHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def _path_from_planner(monkeypatch):
    monkeypatch.delenv(heuristics.PATH_VARIABLE, raising=False)


def tokens(B, N, D, dtype=torch.float32, seed=0):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def starts(B, N, K, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=g)[:K] for _ in range(B)]).to(DEVICE)


def run(name, x, init, num_iters=2, *, K=None, weights=None, mask=None, counts=None, sort=False, where=backend):
    K = init.shape[1] if K is None else K
    return getattr(where, name)(x, weights, mask, counts, init, K, num_iters, sort)


def same(got, want):
    """Bit for bit, NaN equal to NaN."""
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def agrees(got, want, dtype):
    """Equal labels and medoids (the random data here has no near-ties), values to rounding."""
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a, b)
    centers = CENTER_RTOL[dtype]
    torch.testing.assert_close(got[0], want[0], rtol=centers, atol=centers * 4, equal_nan=True)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- clustering --------------------------------------------------------------------------------------------------


@names
@paths
@dtypes
def test_matches_reference(name, path, dtype, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(2, 19, 7, dtype), starts(2, 19, 5)
    agrees(run(name, x, init), run(name, x, init, where=reference), dtype)


@names
@paths
def test_weights_padding_counts_sort(name, path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, weights = tokens(3, 18, 5), torch.rand(3, 18, device=DEVICE)
    mask = torch.ones(3, 18, dtype=torch.bool, device=DEVICE)
    mask[0, 12:] = False
    mask[1, 3:] = False  # fewer tokens than clusters
    weights[2, ::3] = 0
    x[~mask] = float("nan")
    weights[~mask] = float("nan")
    options = dict(weights=weights, mask=mask, counts=torch.tensor([4, 5, 2], device=DEVICE), sort=True)
    init = torch.arange(5, device=DEVICE).repeat(3, 1)
    got = run(name, x, init, **options)
    agrees(got, run(name, x, init, where=reference, **options), torch.float32)
    assert (got[1][~mask] == -1).all() and torch.isfinite(got[0]).all() and torch.isfinite(got[-1]).all()


@paths
@pytest.mark.parametrize("D", (1, 3, 15, 80, 1536, 4096))
def test_any_number_of_features(path, D, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    dtype = torch.bfloat16 if D in (80, 4096) else torch.float32
    x, init = tokens(1, 5, D, dtype), starts(1, 5, 2)
    agrees(run("kmeans", x, init, 1), run("kmeans", x, init, 1, where=reference), dtype)


@paths
def test_more_than_one_tile_of_everything(path, monkeypatch):
    """N, K and D above every tile, so that running minima, lists and partial sums cross tiles."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(1, 270, 70), starts(1, 270, 36)
    agrees(run("kmeans", x, init, 1), run("kmeans", x, init, 1, where=reference), torch.float32)


def test_more_tokens_than_one_chunk_of_statistics():
    x, init = tokens(1, 2100, 3), starts(1, 2100, 4)
    agrees(run("kmeans", x, init, 1), run("kmeans", x, init, 1, where=reference), torch.float32)


@paths
@pytest.mark.parametrize("K", (1, 6, 8))
def test_k_from_one_to_beyond_n(path, K, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = tokens(1, 6, 4)
    init = torch.arange(K, device=DEVICE)[None]
    got = run("kmeans", x, init)
    agrees(got, run("kmeans", x, init, where=reference), torch.float32)
    if K >= 6:
        assert torch.equal(got[0][:, :6], x)  # a lone token is its own mean, bit for bit


@paths
@dtypes
def test_initial_centers(path, dtype, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(2, 17, 6, dtype), torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    agrees(run("kmeans", x, init), run("kmeans", x, init, where=reference), dtype)


@names
@paths
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_farthest_start(name, path, dtype, monkeypatch):
    """An init of no indices: the picks of the reference, which the small integers decide exactly."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    g = torch.Generator().manual_seed(11)
    x = torch.randint(-2, 3, (2, 14, 20), generator=g).to(DEVICE, dtype)
    x[1, 7:] = x[1, :7]  # every token twice
    weights = torch.randint(0, 4, (2, 14), generator=g).float().to(DEVICE)
    mask = torch.ones(2, 14, dtype=torch.bool, device=DEVICE)
    mask[0, 9:] = False
    x[~mask] = weights[~mask] = float("nan")
    options = dict(K=8, weights=weights, mask=mask, counts=torch.tensor([8, 6], device=DEVICE))
    none = torch.empty(2, 0, dtype=torch.int64, device=DEVICE)
    got = run(name, x, none, 1, **options)
    picks = reference.seeds(x, 8, weights, mask, None, False)
    same(got, run(name, x, picks, 1, **options))
    agrees(got, run(name, x, none, 1, where=reference, **options), dtype)


def test_farthest_start_across_tiles(monkeypatch):
    """More tokens than one tile on either path: both pick the same, with ties between tiles."""
    x = torch.randint(-3, 4, (1, 270, 2), generator=torch.Generator().manual_seed(2)).float().to(DEVICE)
    none = torch.empty(1, 0, dtype=torch.int64, device=DEVICE)
    picks = reference.seeds(x, 3, None, None, None, False)
    for path in PATHS:
        monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
        monkeypatch.setattr(
            heuristics, "farthest_gram_configs", lambda *_: [dict(BLOCK=256, num_warps=4, num_stages=1)]
        )
        same(run("kmedoids", x, none, 1, K=3), run("kmedoids", x, picks, 1, K=3))


@names
@paths
def test_empty_clusters_are_repaired(name, path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = torch.zeros(3, 12, 2, device=DEVICE)  # all equal; two distinct values; one far outlier
    x[1, 6:] = 3
    x[2, 0] = 50
    init = torch.tensor([[0, 1, 2, 3, 4]], device=DEVICE).repeat(3, 1)
    got = run(name, x, init, 3)
    agrees(got, run(name, x, init, 3, where=reference), torch.float32)
    assert (got[2] > 0).all()


@paths
def test_centers_far_away_are_repaired(path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = torch.tensor([[[0.0], [1.0], [5.0], [6.0]]], device=DEVICE)
    init = torch.tensor([[[0.0], [1000.0], [2000.0]]], device=DEVICE)
    agrees(run("kmeans", x, init, 3), run("kmeans", x, init, 3, where=reference), torch.float32)


@names
@paths
def test_integer_ties_go_to_the_lowest_index(name, path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (2, 32, 2), generator=g).float().to(DEVICE)
    init = starts(2, 32, 6)
    agrees(run(name, x, init, 1), run(name, x, init, 1, where=reference), torch.float32)


@names
@paths
def test_ties_between_tiles_of_clusters_go_to_the_lowest_index(name, path, monkeypatch):
    """More clusters than a tile has (64 or 16), and every start twice, 35 clusters apart: 64 and above tie with 29
    on."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = torch.arange(70, device=DEVICE).remainder(35)[None, :, None].float()
    init = torch.arange(70, device=DEVICE).remainder(35)[None]
    agrees(run(name, x, init, 1), run(name, x, init, 1, where=reference), torch.float32)


@paths
def test_repair_ties_between_tiles_of_tokens_go_to_the_lowest_index(path, monkeypatch):
    """Tokens 10 and 280, in different tiles, are equally far away: the first empty cluster takes 10."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = torch.zeros(1, 300, 1, device=DEVICE)
    x[0, 10], x[0, 280] = 5, -5
    got = run("kmeans", x, torch.tensor([[0, 1, 2]], device=DEVICE), 1)
    assert got[1][0, 10] == 1 and got[1][0, 280] == 2 and (got[1] == 0).sum() == 298


@paths
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_moved_centers_keep_their_low_bits(path, dtype, monkeypatch):
    """Means of whole numbers that lie between two numbers of the dtype: rounded they would tie, or change sides."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    base = 128 if dtype == torch.bfloat16 else 1024  # numbers from here on are 1 apart
    x = torch.tensor([[4, 5, 6, 7], [4, 5, 7, 8]], device=DEVICE).add(base)[:, :, None].to(dtype)
    init = torch.tensor([[8, 4], [9, 3]], device=DEVICE).add(base)[:, :, None].float()
    got = run("kmeans", x, init, 3)
    assert got[1].tolist() == [[1, 1, 0, 0]] * 2 and got[-1].tolist() == [1.0, 1.0]


@paths
def test_weights_decide_the_repair_and_weightless_medoids(path, monkeypatch):
    """The token of most weighted cost fills an empty cluster; a cluster without weight keeps its lowest member."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = torch.tensor([[0.0, 0, 0, 6, 5, 20, 21, 22]], device=DEVICE)[:, :, None]
    weights = torch.tensor([[1.0, 1, 1, 1, 2, 0, 0, 0]], device=DEVICE)
    init = torch.tensor([[0, 1, 6]], device=DEVICE)  # 0 and 1 are one place: cluster 1 is empty
    for name in ("kmeans", "kmedoids"):
        got = run(name, x, init, 1, weights=weights)
        agrees(got, run(name, x, init, 1, weights=weights, where=reference), torch.float32)
    again = torch.tensor([[0, 3, 6]], device=DEVICE)
    assert run("kmeans", x, init, 1, weights=weights)[1].tolist() == [[0, 0, 0, 0, 1, 2, 2, 2]]  # 2 * 25 > 36
    assert run("kmedoids", x, again, 1, weights=weights)[3].tolist() == [[0, 4, 5]]


@names
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_a_batch_mates_number_of_clusters_changes_no_bit(name, dtype):
    """Nor whether it is there (contract 7).  The bfloat16 image has a near-tie that the two paths decide differently;
    in the float32 one the order in which 20 members are added shows."""
    K = 2 if dtype == torch.float32 else 4
    x = (tokens(16, 40, 20)[6:8] * 0.1 + (0 if dtype == torch.float32 else 8)).to(dtype)
    init = torch.arange(40, device=DEVICE).repeat(2, 1)
    init[0, :4] = starts(16, 40, 4)[6]
    counts = torch.tensor([K, 40], device=DEVICE)
    both = run(name, x, init, counts=counts)
    alone = run(name, x[:1], init[:1, :K], counts=counts[:1])
    same([both[0][:1, :K], both[1][:1], both[2][:1, :K], both[-1][:1]], [*alone[:3], alone[-1]])


@names
@paths
def test_padding_and_counts_equal_a_call_of_their_own(name, path, monkeypatch):
    """On one path, with K an int there: bit for bit."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init, weights = tokens(2, 150, 9), starts(2, 40, 20), torch.rand(2, 150, device=DEVICE)
    mask = torch.arange(150, device=DEVICE) < torch.tensor([[40], [150]], device=DEVICE)
    padded = run(name, x, init, 2, weights=weights, mask=mask, counts=torch.tensor([2, 20], device=DEVICE))
    alone = run(name, x[:1, :40], init[:1, :2], 2, weights=weights[:1, :40])
    same([padded[0][:1, :2], padded[1][:1, :40], padded[2][:1, :2], padded[-1][:1]], [*alone[:3], alone[-1]])


@names
@paths
def test_no_weights_equals_ones_and_powers_of_two(name, path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init, ones = tokens(1, 15, 5), starts(1, 15, 4), torch.ones(1, 15, device=DEVICE)
    plain = run(name, x, init)
    same(run(name, x, init, weights=ones), plain)
    scaled = run(name, x, init, weights=ones * 2.0**-80)
    assert torch.equal(scaled[0], plain[0]) and torch.equal(scaled[1], plain[1])


@paths
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_huge_and_tiny_numbers(path, dtype, monkeypatch):
    """The same image at five scales: powers of two change nothing; nothing overflows or vanishes."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    factors = torch.tensor([1.0, 2.0**100, 2.0**-100, 1e30, 1e-30], device=DEVICE)
    x = (tokens(1, 13, 5, dtype).float() * factors[:, None, None]).to(dtype)
    centers, assignment, _, _, inertia = run("kmeans", x, starts(1, 13, 4).repeat(5, 1))
    assert (assignment == assignment[0]).all()
    assert torch.isfinite(centers).all() and torch.isfinite(inertia).all()
    relative = centers.double() / factors.double()[:, None, None]
    assert torch.equal(relative[:3], relative[:1].repeat(3, 1, 1))
    torch.testing.assert_close(relative, relative[:1].repeat(5, 1, 1), rtol=2e-2, atol=2e-2)


@paths
def test_an_offset_changes_no_distance(path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    base = (tokens(1, 24, 6) * 64).round() / 64
    offset = torch.tensor([1e4, -1e4, 3e4, 0.0, 1e3, -7e3], device=DEVICE)
    init = starts(1, 24, 5)
    plain, moved = run("kmeans", base, init, 3), run("kmeans", base + offset, init, 3)
    assert torch.equal(plain[1], moved[1])
    torch.testing.assert_close(moved[-1], plain[-1], rtol=1e-3, atol=1e-3)


@paths
def test_a_huge_offset_beside_a_tiny_feature(path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x = tokens(1, 12, 2) * torch.tensor([0.0, 1e-10], device=DEVICE) + torch.tensor([1e30, 0.0], device=DEVICE)
    got, want = (run("kmeans", tokens, starts(1, 12, 3)) for tokens in (x, x[:, :, 1:]))
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0][:, :, 0], torch.full_like(got[0][:, :, 0], 1e30))
    torch.testing.assert_close(got[0][:, :, 1:], want[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-4, atol=0)


@names
@paths
def test_nan_and_inf_stay_in_their_image(name, path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(3, 10, 4), starts(3, 10, 3)
    clean = run(name, x[1:2], init[1:2])
    x[0, 4, 2], x[2, 4, 2] = float("nan"), float("inf")
    got = run(name, x, init)
    same([t[1:2] for t in got], clean)
    assert ((got[1] >= 0) & (got[1] < 3)).all()


@names
@paths
def test_an_image_does_not_depend_on_its_batch(name, path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(3, 21, 6), starts(3, 21, 3)
    batch = run(name, x, init)
    same(run(name, x[2:], init[2:]), [t[2:] for t in batch])


@paths
def test_strides_and_misalignment(path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(2, 14, 8), starts(2, 14, 4)
    want = run("kmeans", x, init)
    shifted = torch.zeros(2 * 14 * 8 + 1, device=DEVICE)[1:].view(2, 14, 8).copy_(x)
    sliced = torch.zeros(2, 11, 28, device=DEVICE).transpose(1, 2)[:, ::2, 2:10].copy_(x)
    for view in (shifted, sliced):
        got = run("kmeans", view, init)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
        if path == "gram":
            weights = torch.rand(14, 2, device=DEVICE).t()
            same(run("kmeans", view, init, weights=weights), run("kmeans", view, init, weights=weights.contiguous()))


@names
@paths
def test_stops_by_itself(name, path, monkeypatch):
    """Iterations after the labels repeat change nothing, and a converged start changes no label."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init = tokens(2, 16, 3), starts(2, 16, 3)
    long = run(name, x, init, 8)
    same(run(name, x, init, 12), long)
    if name == "kmeans":
        assert torch.equal(run(name, x, long[0].float(), 1)[1], long[1])


@names
def test_an_image_that_is_done_is_not_touched(name, monkeypatch):
    """Direct path: once its labels repeat, an iteration neither assigns, nor settles, nor lists members."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, "direct")
    x, init = tokens(1, 16, 3), starts(1, 16, 3)
    want, real, poisoned = run(name, x, init, 8), clustering.launch, {}

    def spy(kernel, where, configs, make):
        real(kernel, where, configs, make)
        if kernel.fn.__name__ == "update_kernel":
            given = make(configs[0])[1]
            if given["done"].all() and not poisoned:
                poisoned.update({key: given[key].fill_(77) for key in ("lab", "tmp")})

    monkeypatch.setattr(clustering, "launch", spy)
    agrees(want, run(name, x, init, 8, where=reference), torch.float32)
    same(run(name, x, init, 8), want)
    assert len(poisoned) == 2 and all((value == 77).all() for value in poisoned.values())


@names
@pytest.mark.skipif(not INTERPRET, reason="counts calls of a device function")
def test_an_image_that_is_done_leaves_the_loop(name, monkeypatch):
    """Gram path: the iterations end when the labels repeat."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, "gram")
    calls, settle = [], gram.settle_image

    def counted(*args, **kwargs):
        calls.append(1)
        return settle(*args, **kwargs)

    monkeypatch.setattr(gram, "settle_image", counted)
    x, init = tokens(1, 16, 3), starts(1, 16, 3)
    labels = [run(name, x, init, t)[1] for t in range(1, 8)]
    last = next(t for t in range(1, 7) if torch.equal(labels[t], labels[t - 1]))
    calls.clear()
    run(name, x, init, 30)
    assert len(calls) == last + 1


@paths
def test_chunks_of_the_batch_change_nothing(path, monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    x, init, weights = tokens(3, 12, 4), starts(3, 12, 4), torch.rand(3, 12, device=DEVICE)
    whole = run("kmedoids", x, init, weights=weights)
    monkeypatch.setattr(heuristics, "GRAM_BYTES_LIMIT", 4 * 12 * 16)
    monkeypatch.setattr(heuristics, "GRID_LIMIT", 8)
    assert heuristics.chunk_images(3, 12, 4, path) < 3
    same(run("kmedoids", x, init, weights=weights), whole)


@names
@pytest.mark.parametrize("shape", ((0, 5, 3), (2, 0, 3), (2, 5, 0)))
def test_empty_inputs(name, shape):
    x = torch.zeros(shape, device=DEVICE)
    init = torch.zeros(shape[0], 2, dtype=torch.int64, device=DEVICE)
    got, want = run(name, x, init), run(name, x, init, where=reference)
    assert [t.shape for t in got] == [t.shape for t in want] and [t.dtype for t in got] == [t.dtype for t in want]
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


# ---- pool, unpool, gradients -------------------------------------------------------------------------------------


def labels(B, N, K, seed=4):
    """Labels with padding (-1) and cluster 1 without members."""
    a = torch.randint(-1, K, (B, N), generator=torch.Generator().manual_seed(seed))
    return torch.where(a == 1, 2, a).to(DEVICE)


@dtypes
@pytest.mark.parametrize("weighted", (False, True))
def test_pool_and_gradients(dtype, weighted):
    B, N, D, K = 2, 37, 11, 5
    x, a = tokens(B, N, D, dtype), labels(B, N, K)
    weights = torch.rand(B, N, device=DEVICE) if weighted else None
    if weighted:
        weights[a == 3] = 0  # a cluster without weight: plain mean
    tolerance = dict(rtol=CENTER_RTOL[dtype], atol=CENTER_RTOL[dtype])
    centers, mass = backend.pool(x, a, weights, K)
    want_centers, want_mass = reference.pool(x, a, weights, K)
    torch.testing.assert_close(centers, want_centers, **tolerance)
    torch.testing.assert_close(mass, want_mass)
    assert (centers[:, 1] == 0).all() and (mass[:, 1] == 0).all()

    grad = tokens(B, K, D, dtype, seed=8)
    kept = grad.clone()
    got = backend.pool_backward(grad, x, want_centers, a, weights, want_mass)
    want = reference.pool_backward(grad, x, want_centers, a, weights, want_mass)
    torch.testing.assert_close(got[0], want[0], **tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(grad, kept)

    same([backend.unpool(centers, a)], [reference.unpool(centers, a)])
    torch.testing.assert_close(
        backend.unpool_backward(x, a, K),
        reference.unpool_backward(x, a, K),
        rtol=tolerance["rtol"],
        atol=16 * tolerance["atol"],
    )


def test_pool_ignores_labels_out_of_range_and_takes_strides():
    x, a = tokens(2, 20, 6), labels(2, 20, 4)
    wild = torch.where(a < 0, 2**40, a)
    wild[0, 0], a[0, 0] = -(2**40), -1
    same(backend.pool(x, wild, None, 4), backend.pool(x, a, None, 4))
    same([backend.unpool(x[:, :4], wild)], [backend.unpool(x[:, :4], a)])
    strided = torch.stack((a, a), -1)[..., 0]
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    same(backend.pool(view, strided, None, 4), backend.pool(x, a, None, 4))
    grad = tokens(2, 4, 6, seed=9).transpose(1, 2).contiguous().transpose(1, 2)
    centers, mass = backend.pool(x, a, None, 4)
    same(
        backend.pool_backward(grad, view, centers, strided, None, mass),
        backend.pool_backward(grad.contiguous(), x, centers, a, None, mass),
    )


@pytest.mark.parametrize("shape", ((0, 4, 3), (2, 0, 3), (2, 4, 0)))
def test_empty_pool(shape):
    x, a = torch.zeros(shape, device=DEVICE), torch.zeros(shape[:2], dtype=torch.int64, device=DEVICE)
    centers, mass = backend.pool(x, a, None, 3)
    assert centers.shape == (shape[0], 3, shape[2]) and mass.sum() == shape[0] * shape[1]
    assert backend.unpool(centers, a).shape == shape
    assert backend.unpool_backward(x, a, 3).shape == centers.shape
    gradients = backend.pool_backward(centers, x, centers, a, None, mass)
    assert gradients[0].shape == shape and gradients[1].shape == shape[:2]


def test_trains_through_the_public_functions():
    x, a = tokens(2, 12, 5).requires_grad_(), labels(2, 12, 4)
    weights = torch.rand(2, 12, device=DEVICE).requires_grad_()
    gradients = []
    for name in ("triton", "reference"):
        out = tokenpool_ext.unpool(tokenpool_ext.pool(x, a, 4, weights=weights, backend=name), a, backend=name)
        gradients.append(torch.autograd.grad(out.square().sum(), (x, weights)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@paths
def test_images_and_rows_further_apart_than_31_bits(path, monkeypatch):
    """Offsets in elements beyond 2^31, of images and of tokens, on memory that is mostly never touched."""
    monkeypatch.setenv(heuristics.PATH_VARIABLE, path)
    try:
        room = torch.empty(2**31 + 2**12, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB: {error}")
    D = 8
    dense = tokens(2, 17, D, torch.bfloat16)
    for shape, stride, K in (((2, 17, D), (2**31, 16, 1), 3), ((1, 17, D), (0, 2**27, 1), 17)):
        x, init = room.as_strided(shape, stride), starts(shape[0], 17, K)
        small = dense[: shape[0]]
        x.copy_(small)
        found, want = run("kmeans", x, init), run("kmeans", small, init)
        same(found, want)
        same(backend.pool(x, want[1], None, K), backend.pool(small, want[1], None, K))
        grad = room.as_strided((shape[0], K, D), (stride[0], stride[1], 1))  # the first K tokens
        same([backend.unpool(grad, want[1])], [backend.unpool(small[:, :K], want[1])])
        ones = torch.ones(shape[:2], device=DEVICE)
        same(
            *(
                backend.pool_backward(g, t, want[0], want[1], ones, want[2])
                for g, t in ((grad, x), (small[:, :K], small))
            )
        )


# ---- attention received ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", ((2, 2, 9, 13, 5), (1, 1, 70, 66, 64), (1, 2, 5, 33, 80)), ids=str)
def test_attention_received(dtype, shape):
    B, H, Nq, N, d = shape
    q, k = tokens(B * H, Nq, d, dtype).view(B, H, Nq, d), tokens(B * H, N, d, dtype, seed=7).view(B, H, N, d)
    want = reference.attention_received(q.double(), k.double(), 0.4, None).float()
    torch.testing.assert_close(backend.attention_received(q, k, 0.4, None), want, rtol=1e-4, atol=1e-6)
    lse = torch.logsumexp(0.4 * q.double() @ k.double().transpose(-1, -2), -1).float()
    strided = q.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    got = backend.attention_received(strided, k, 0.4, lse)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.full((B,), 1.0, device=DEVICE), rtol=1e-4, atol=1e-4)


# ---- registration ------------------------------------------------------------------------------------------------


def test_operators_are_registered_properly():
    x, init, a = tokens(1, 8, 4), starts(1, 8, 2), labels(1, 8, 3)
    centers, mass = backend.pool(x, a, None, 3)
    q = tokens(4, 6, 4).view(2, 2, 6, 4)
    ops = torch.ops.tokenpool_ext_triton
    for op, args in (
        (ops.kmeans, (x, None, None, None, init, 2, 1, False)),
        (ops.kmedoids, (x, mass.new_ones(1, 8), None, None, init, 2, 1, True)),
        (ops.pool, (x, a, None, 3)),
        (ops.pool_backward, (centers, x, centers, a, None, mass)),
        (ops.unpool, (centers, a)),
        (ops.unpool_backward, (x, a, 3)),
        (ops.attention_received, (q, q, 0.5, None)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_as_one_graph():
    def step(x, init):
        centers, assignment, mass, *_ = backend.kmeans(x, None, None, None, init, 3, 1, False)
        return backend.unpool(centers, assignment) + mass.sum()

    x, init = tokens(2, 8, 4), starts(2, 8, 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, init), step(x, init))
    longer = tokens(1, 11, 4)
    torch.testing.assert_close(compiled(longer, init[:1]), step(longer, init[:1]))


def test_bad_arguments_are_refused():
    x, init = tokens(2, 8, 4), starts(2, 8, 3)
    assert "float64" in backend.why_not("kmeans", x.double())
    assert backend.why_not("kmeans", x) is None
    assert "no operator" in backend.why_not("sort", x)
    with pytest.raises(ValueError, match=r"init must have shape \(2, 4\), got \(2, 3\)"):
        backend.kmeans(x, None, None, None, init, 4, 1, False)
    with pytest.raises(TypeError, match="init must be one of"):
        backend.kmeans(x, None, None, None, init.int(), 3, 1, False)
    with pytest.raises(ValueError, match="num_iters"):
        backend.kmeans(x, None, None, None, init, 3, 0, False)


# ---- faults ------------------------------------------------------------------------------------------------------


class Broken(RuntimeError):
    pass


def failing(kernel, only=lambda config: True):
    def hook(name, config):
        if name == kernel and only(config):
            raise Broken("out of resource: shared memory, Required: 200000, Hardware limit: 101376")

    return hook


def test_a_plan_that_fails_gives_way_to_a_smaller_one(monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, "direct")
    x, init = tokens(1, 40, 20), starts(1, 40, 5)
    want = run("kmeans", x, init)
    largest = heuristics.assign_configs(heuristics.device_of(x), 20, 4)[0]
    calls = []
    with launch.inject_fault(
        lambda name, config: (
            calls.append((name, config)) or failing("assign_kernel", lambda c: c == largest)(name, config)
        )
    ):
        agrees(run("kmeans", x, init), want, torch.float32)
    assert [c for n, c in calls if n == "assign_kernel"].count(largest) == 1  # tried once, not every iteration


@pytest.mark.parametrize("kernel", ("prepare_kernel", "gram_kernel", "iterate_kernel", "finish_kernel"))
def test_a_kernel_that_cannot_run_says_so(kernel):
    x, init = tokens(1, 10, 4), starts(1, 10, 3)
    with launch.inject_fault(failing(kernel)), pytest.raises(backend.KernelUnavailable, match=kernel) as caught:
        run("kmeans", x, init)
    assert caught.value.kernel == kernel and "out of resource" in caught.value.tried[0]
    agrees(run("kmeans", x, init), run("kmeans", x, init, where=reference), torch.float32)  # and nothing is left behind


def test_the_registry_falls_back_with_one_warning():
    from tokenpool_ext.backends import REGISTRY, _warned
    from tokenpool_ext.backends import run as run_on

    both, only = (REGISTRY["triton"], REGISTRY["reference"]), (REGISTRY["triton"],)

    x, init = tokens(1, 10, 4), starts(1, 10, 3)
    args = (x, None, None, None, init, 3, 1, False)
    _warned.clear()
    with launch.inject_fault(failing("prepare_kernel")):
        with pytest.warns(RuntimeWarning, match="prepare_kernel.*'reference'") as warned:
            got = run_on(both, "kmeans", *args)
            same(run_on(both, "kmeans", *args), got)
        assert len(warned) == 1
        with pytest.raises(backend.KernelUnavailable):
            run_on(only, "kmeans", *args)
        with pytest.raises(RuntimeError, match="prepare_kernel"):
            tokenpool_ext.kmeans(x, 3, init=init, backend="triton")
    _warned.clear()
    same(got, reference.kmeans(*args))


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ),
    ids=("oom", "fault"),
)
def test_errors_of_the_device_are_not_hidden(error):
    def hook(name, config):
        raise error

    with launch.inject_fault(hook), pytest.raises(type(error)) as caught:
        run("kmeans", tokens(1, 10, 4), starts(1, 10, 3))
    assert caught.value is error


@pytest.mark.parametrize(
    "error, attempts",
    ((Broken("out of resource: shared memory"), 1), (OSError("disk full"), 2)),
    ids=("permanent", "passing"),
)
def test_a_kernel_that_cannot_run_is_not_tried_again(error, attempts):
    """At the second call its failure is known, unless it may pass; other dtypes and flags are tried by themselves."""
    tried = []

    def hook(name, config):
        if name == "prepare_kernel":
            tried.append(config)
            raise error

    x, init, mask = tokens(1, 10, 4), starts(1, 10, 3), torch.ones(1, 10, dtype=torch.bool, device=DEVICE)
    with launch.inject_fault(hook):
        for _ in range(2):
            with pytest.raises(backend.KernelUnavailable, match=str(error)):
                run("kmeans", x, init)
        assert len(tried) == attempts
        for changed in (dict(x=x.half()), dict(mask=mask)):
            with pytest.raises(backend.KernelUnavailable):
                run("kmeans", **(dict(x=x, init=init) | changed))
        assert len(tried) == attempts + 2
    run("kmeans", x, init)  # and nothing is left behind


def test_one_variant_that_gives_way_does_not_demote_others(monkeypatch):
    monkeypatch.setenv(heuristics.PATH_VARIABLE, "direct")
    x, init = tokens(1, 40, 20), starts(1, 40, 5)
    first = heuristics.assign_configs(heuristics.device_of(x), 20, 4)[0]
    calls, broken = [], [True]

    def hook(name, config):
        if name == "assign_kernel":
            calls.append(config)
            if config == first and broken[0]:
                raise Broken("out of resource: shared memory")

    with launch.inject_fault(hook):
        run("kmeans", x, init, 1)
        broken[0] = False
        run("kmeans", x, init, 1)
        run("kmedoids", x, init, 1)
    # Two assignments a call, one of them for what products cannot resolve.
    assert [config == first for config in calls] == [True, *[False] * 4, True, True]


def test_the_other_operators_fall_back_too():
    """Forward and inside backward(): the registry's next backend, with one warning each; by name the error comes."""
    from tokenpool_ext import autograd
    from tokenpool_ext.backends import REGISTRY, _warned
    from tokenpool_ext.backends import run as run_on

    x, a, weights = tokens(2, 12, 5), labels(2, 12, 4), torch.rand(2, 12, device=DEVICE)
    q = tokens(4, 6, 4).view(2, 2, 6, 4)
    chain = (REGISTRY["triton"], REGISTRY["reference"])
    args = {
        "pool": (x, a, weights, 4),
        "unpool": (x[:, :4], a),
        "unpool_backward": (x, a, 4),
        "attention_received": (q, q, 0.5, None),
    }
    kernels = {
        "pool": "segment_kernel",
        "unpool": "unpool_kernel",
        "unpool_backward": "labels_kernel",
        "attention_received": "received_kernel",
    }
    _warned.clear()
    for op, given in args.items():
        with launch.inject_fault(failing(kernels[op])):
            with pytest.warns(RuntimeWarning, match=f"{op} cannot run.*{kernels[op]}.*'reference'") as warned:
                got = [run_on(chain, op, *given) for _ in range(2)][1]
            assert len(warned) == 1
            with pytest.raises(backend.KernelUnavailable, match=kernels[op]):
                run_on(chain[:1], op, *given)
        want = getattr(reference, op)(*given)
        same(*([t] if isinstance(t, torch.Tensor) else t for t in (got, want)))
    x.requires_grad_()
    weights.requires_grad_()
    for function, given in (
        (autograd.Pool, (x, a, weights, 4)),
        (autograd.KMeans, (x, weights, None, None, starts(2, 12, 4), 4, 1, False)),
    ):
        found = {}
        for names in (chain, chain[1:]):
            out = function.apply(names, *given)
            out = out[0] if isinstance(out, tuple) else out
            with launch.inject_fault(failing("pool_backward_kernel")):
                if names == chain and function is autograd.Pool:
                    with pytest.warns(RuntimeWarning, match="pool_backward cannot run"):
                        found[names] = torch.autograd.grad(out.square().sum(), (x, weights))
                else:
                    found[names] = torch.autograd.grad(out.square().sum(), (x, weights))
        torch.testing.assert_close(*found.values(), rtol=1e-4, atol=1e-5)
    refused = pytest.raises(backend.KernelUnavailable, match="pool_backward_kernel")
    with launch.inject_fault(failing("pool_backward_kernel")), refused:
        autograd.Pool.apply(chain[:1], x, a, weights, 4)[0].sum().backward()
    _warned.clear()


def compiled_kernels(function):
    """What must be compiled for what `function` launches: kernels, tiles, flags, dtypes and alignments.  Nothing
    runs."""
    with launch.record() as launches:
        function()
    found = set()
    for one in launches:
        kinds = (
            (name, value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor) else (name, value)
            for name, value in one.arguments.items()
            if isinstance(value, (torch.Tensor, bool, str))
        )
        found.add((one.kernel.fn.__name__, str(one.config), *kinds))
    return found


@pytest.mark.parametrize("shape", ((24, 9, 16), (40, 2, 16)), ids=("gram", "direct"))
@pytest.mark.parametrize("weighted", (False, True))
def test_warmup_compiles_what_the_layers_call(shape, weighted):
    N, K, D = shape
    x, start = tokens(2, N + 1, D), torch.zeros(2, K, D, device=DEVICE)
    scores = torch.rand(2, N, device=DEVICE) if weighted else None
    mask = torch.ones(2, N, dtype=torch.bool, device=DEVICE)
    mask[0, N - 3 :] = False

    def layers(algorithms=("kmeans", "kmedoids"), **given):
        for algorithm in algorithms:
            for options in (dict(), dict(sort=False)):
                pooling = tokenpool_ext.TokenPooling(K, algorithm=algorithm, backend="triton", **options)
                tracked = x.clone().requires_grad_(algorithm == "kmeans")  # nothing runs, and medoids index in backward
                out = pooling(tracked, scores, **given)
                if algorithm == "kmeans":
                    out.sum().backward()

    def clusters(**given):
        tokenpool_ext.kmeans(x[:, 1:], backend="triton", weights=scores, num_iters=5, **given)

    options = dict(dtypes=(torch.float32,), num_iters=5, device=DEVICE, weighted=weighted)
    plain = compiled_kernels(lambda: backend.warmup([shape], **options))
    assert compiled_kernels(layers) - plain == set()
    assert not {
        key
        for key in compiled_kernels(lambda: backend.warmup([shape], backward=False, **options))
        if key[0] == "pool_backward_kernel"
    }
    masked = compiled_kernels(lambda: backend.warmup([shape], masked=True, **options))
    assert compiled_kernels(lambda: layers(mask=mask)) - masked == set() and plain < masked
    more = compiled_kernels(lambda: backend.warmup([shape], counts=True, centers=True, **options))
    given = (
        dict(num_clusters=torch.tensor([K, K - 1], device=DEVICE)),
        dict(num_clusters=K, init=start),
        dict(num_clusters=torch.tensor([K, K - 1], device=DEVICE), init=start),
    )
    for one in given:
        assert compiled_kernels(lambda: clusters(**one)) - more == set(), one


def test_warmup_runs_every_kernel():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.warmup([(9, 3, 4), (1, 20, 2, 4)], dtypes=(torch.float32,), num_iters=1, device=DEVICE)


def test_means_of_many_members():
    """Constants come back to the bit, the error does not grow with the members, and a weight of zero hides a NaN."""
    labels = torch.zeros(1, 400, dtype=torch.int64, device=DEVICE)
    x = torch.full((1, 400, 3), 1000001.0, device=DEVICE)
    assert torch.equal(backend.pool(x, labels, None, 1)[0], x[:, :1])
    weights = torch.rand(1, 400, device=DEVICE)
    weights[0, ::7] = 0.0
    x = torch.rand(1, 400, 3, device=DEVICE) * 0.01 + 1
    kept = weights[0] > 0
    want = (weights[0, kept, None].double() * x[0, kept].double()).sum(0) / weights.double().sum()
    x[0, ::7] = float("nan")
    assert float((backend.pool(x, labels, weights, 1)[0][0, 0].double() - want).abs().max()) < 1e-6
