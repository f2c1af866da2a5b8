"""Where the iteration starts (contract 5)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_consistent, assert_identical, f64, integer_tokens, positive_weights, tokens

import tokenpool_ext as tp
from tokenpool_ext import loader
from tokenpool_ext.starts import SORTED_HERE, STRATEGIES, initial

pytestmark = pytest.mark.one_path

TOKEN_STRATEGIES = ["topk", "strided", "random", "kmeans++", "farthest"]


def start(name, x, K, weights=None, mask=None, counts=None, seed=0, as_indices=True):
    generator = torch.Generator(x.device).manual_seed(seed)
    return initial(name, x, K, weights, mask, counts, generator, as_indices)


def test_the_contract_names_every_strategy():
    assert set(STRATEGIES) == {*TOKEN_STRATEGIES, "bipartite"}


# Through the public functions, on every backend --------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("name", [*TOKEN_STRATEGIES, "bipartite"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_every_strategy_runs_everywhere(backend, algorithm, name, weighted):
    B, N, D, K = 2, 20, 4, 12
    x = tokens(B, N, D, torch.bfloat16, backend.device)
    w = positive_weights(B, N, device=backend.device) if weighted else None
    mask = torch.arange(N, device=backend.device) < torch.tensor([[20], [15]], device=backend.device)
    for m, k in ((None, K), (mask, K), (mask, torch.tensor([12, 10], device=backend.device))):
        got = getattr(tp, algorithm)(x, k, weights=w, init=name, mask=m, backend=backend.name)
        counts = None if isinstance(k, int) else k.tolist()
        assert_consistent(got, x, K, weights=w, mask=m, counts=counts, algorithm=algorithm)


def test_defaults(backend):
    """Farthest-first, with and without weights, in functions and layers."""
    x, w = tokens(2, 20, 4, device=backend.device), positive_weights(2, 20, device=backend.device)
    for algorithm in (tp.kmeans, tp.kmedoids):
        for weights in (None, w):
            assert_identical(
                algorithm(x, 5, weights=weights, backend=backend.name),
                algorithm(x, 5, weights=weights, init="farthest", backend=backend.name),
            )
    for algorithm in ("kmeans", "kmedoids"):
        layers = [
            tp.TokenPooling(5, algorithm=algorithm, init=init, backend=backend.name) for init in (None, "farthest")
        ]
        for scores in (None, w):
            assert_identical(layers[0](x, scores), layers[1](x, scores))


def test_a_strategy_equals_its_indices(backend):
    x, w = tokens(2, 20, 4, device=backend.device), positive_weights(2, 20, device=backend.device)
    for name in ("topk", "strided", "farthest"):
        index = start(name, x, 5, w)
        for kind in (torch.int64, torch.int32):
            assert_identical(
                tp.kmeans(x, 5, weights=w, init=name, backend=backend.name),
                tp.kmeans(x, 5, weights=w, init=index.to(kind), backend=backend.name),
            )


@pytest.mark.parametrize("name", ["random", "kmeans++"])
def test_the_generator_decides(backend, name):
    x = tokens(2, 24, 4, device=backend.device)

    def run(seed):
        return tp.kmeans(
            x,
            5,
            init=name,
            num_iters=1,
            backend=backend.name,
            generator=torch.Generator(backend.device).manual_seed(seed),
        )

    assert_identical(run(0), run(0))
    assert any(not run(0).assignment.equal(run(seed).assignment) for seed in (1, 2, 3))


# The indices themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKEN_STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_distinct_valid_tokens(name, dtype):
    """Also with duplicates, masks and per-image K: K_b different real tokens."""
    for x in (
        tokens(4, 30, 3, dtype),
        integer_tokens(4, 30, 1, dtype, low=0, high=2),
        torch.zeros(4, 30, 3, dtype=dtype),
    ):
        mask = torch.from_numpy(np.random.default_rng(0).random((4, 30)) < 0.7)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for w in (None, positive_weights(4, 30, acc), torch.zeros(4, 30, dtype=acc)):
            counts = torch.tensor([8, 1, 5, 8])
            for m, c in ((None, None), (mask, None), (mask, counts), (None, counts)):
                index = start(name, x, 8, w, m, c)
                assert index.shape == (4, 8) and index.dtype == torch.int64
                for b in range(4):
                    picks = index[b, : 8 if c is None else int(c[b])].tolist()
                    assert len(set(picks)) == len(picks), f"repeated tokens {picks}"
                    assert m is None or m[b, picks].all(), "padding chosen"


@pytest.mark.parametrize("name", TOKEN_STRATEGIES)
def test_padding_may_hold_nan(name):
    x, w = tokens(3, 20, 3), positive_weights(3, 20)
    mask = torch.from_numpy(np.random.default_rng(1).random((3, 20)) < 0.6)
    spoiled = torch.where(mask[:, :, None], x, float("nan"))
    spoiled_w = torch.where(mask, w, float("nan"))
    assert_identical(start(name, x, 6, w, mask), start(name, spoiled, 6, spoiled_w, mask))


@pytest.mark.parametrize("name", TOKEN_STRATEGIES)
def test_an_image_of_nan_gives_indices_in_range(name):
    x, w = tokens(3, 20, 3), positive_weights(3, 20)
    clean = start(name, x, 6, w)
    x[1] = float("nan")
    w[1, 3] = float("nan")
    got = start(name, x, 6, w)
    assert_identical(clean[[0, 2]], got[[0, 2]])
    assert ((got >= 0) & (got < 20)).all()


@pytest.mark.parametrize("name", ["topk", "random", "kmeans++", "farthest"])
def test_zero_weight_tokens_are_never_preferred(name):
    x = tokens(4, 30, 3)
    x[:, ::2] *= 100  # far away, so attractive to the spreading strategies
    w = positive_weights(4, 30)
    w[:, ::2] = 0
    for seed in range(5):
        index = start(name, x, 15, w, seed=seed)
        assert (w.gather(1, index) > 0).all(), "15 tokens have weight: only those may start"
    index = start(name, x, 18, w)
    assert (w.gather(1, index) > 0).sum(1).tolist() == [15] * 4, "then all weighted tokens come first"


@pytest.mark.parametrize("name", ["topk", "strided", "farthest", "kmeans++", "random"])
def test_scaling_weights_changes_no_start(name):
    x, w = tokens(3, 30, 3), positive_weights(3, 30)
    for factor in (2.0**-60, 2.0**60):
        assert_identical(start(name, x, 7, w), start(name, x, 7, w * factor))


@pytest.mark.parametrize("name", ["strided", "farthest", "kmeans++"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_tokens_changes_no_start(name, scale):
    x = tokens(3, 30, 3, torch.float64)
    assert_identical(start(name, (x / 8).float(), 7), start(name, (x / 8 * scale).float(), 7))


def test_topk():
    w = torch.tensor([[1.0, 5, 3, 5, 0, 5, 2]])
    assert start("topk", torch.zeros(1, 7, 2), 4, w).tolist() == [[1, 3, 5, 2]]
    assert start("topk", torch.zeros(1, 7, 2), 3).tolist() == [[0, 1, 2]], "without weights all tie"
    mask = torch.tensor([[True, False, True, True, True, True, False]])
    assert start("topk", torch.zeros(1, 7, 2), 3, w, mask).tolist() == [[3, 5, 2]]


@pytest.mark.parametrize("N,K", [(10, 3), (196, 98), (197, 49), (7, 7), (5, 1), (256, 100)])
def test_strided_is_even(N, K):
    index = start("strided", torch.zeros(1, N, 1), K)[0].tolist()
    gaps = np.diff(index)
    assert index == sorted(set(index)) and (not len(gaps) or gaps.max() - gaps.min() <= 1)
    assert index[0] <= N / K and index[-1] >= N - 1 - N / K, "spread over the whole image"


@pytest.mark.skipif(loader.extension is None, reason="the extension makes these starts")
def test_starts_made_by_the_extension_are_those_of_torch():
    """One call of the extension instead of several ops; the indices are the same, ties, NaN and all."""
    generator = torch.Generator().manual_seed(0)
    for n, b in ((1, 1), (8, 3), (197, 2), (1030, 2)):
        scores = torch.rand(b, n, generator=generator)
        unusual = scores.clone()
        unusual[:, ::3], unusual[:, 1::5], unusual[:, 2::7] = float("nan"), float("inf"), -0.0
        zeros = torch.where(torch.rand(b, n, generator=generator) < 0.5, 0.0, -0.0)
        for k in sorted({1, n // 3 + 1, n}):
            into = torch.full((b, k), -7)
            loader.extension.fill_strided(into.data_ptr(), b, n, k)
            assert torch.equal(into, start("strided", torch.zeros(b, n, 1), k))
            for w in (scores, (5 * scores).round(), unusual, zeros, -scores):
                loader.extension.fill_largest(into.data_ptr(), w.data_ptr(), b, n, k)
                assert torch.equal(into, start("topk", torch.zeros(b, n, 1), k, w)), (n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_batch_of_scores_starts_where_its_images_alone_do(dtype):
    """Above a size torch sorts the scores, below it the extension does."""
    n = 64
    b = SORTED_HERE // n + 1
    x, w = (
        tokens(b, n, 3, dtype),
        torch.rand(b, n, generator=torch.Generator().manual_seed(1), dtype=dtype).mul(9).round(),
    )
    whole = tp.kmeans(x, 9, weights=w, num_iters=1)
    for i in (0, b - 1):
        assert torch.equal(tp.kmeans(x[i], 9, weights=w[i], num_iters=1).assignment, whole.assignment[i])


def test_strided_counts_valid_tokens_only():
    x = torch.zeros(2, 20, 1)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 5:15] = True
    mask[1, ::2] = True
    compact = start("strided", torch.zeros(1, 10, 1), 4)[0]
    got = start("strided", x, 4, mask=mask)
    assert got[0].tolist() == (compact + 5).tolist()
    assert got[1].tolist() == (compact * 2).tolist()


def test_farthest_is_the_greedy_maximin():
    for seed in range(5):
        x = tokens(1, 25, 3, torch.float64, seed=seed)
        assert start("farthest", x, 9)[0].tolist() == oracle.farthest(f64(x[0]), 9)
    x = torch.tensor([[[0.0], [1.0], [10.0], [10.0], [5.0]]])
    assert start("farthest", x, 4)[0].tolist() == [0, 2, 4, 1], "ties to the lowest index; duplicates last"
    w = torch.tensor([[1.0, 1, 1, 1, 9]])
    assert start("farthest", x, 2, w)[0, 0].item() == 4, "from the heaviest token"


def test_random_is_uniform():
    x = torch.zeros(4000, 6, 1)
    first = start("random", x, 2).flatten()
    share = torch.bincount(first, minlength=6) / len(first)
    assert (share - 1 / 6).abs().max() < 0.02  # 8000 draws: standard error 0.004


def test_kmeanspp_draws_by_weighted_squared_distance():
    """Arthur and Vassilvitskii: the second center with probability proportional to w d^2."""
    x = torch.tensor([[0.0], [1.0], [3.0]]).expand(20000, 3, 1)
    w = torch.tensor([1e9, 1.0, 1.0]).expand(20000, 3).contiguous()  # the first is token 0, nearly surely
    index = start("kmeans++", x, 2, w)
    assert (index[:, 0] == 0).float().mean() > 0.999
    assert abs((index[:, 1] == 2).float().mean() - 0.9) < 0.01  # 9 / (1 + 9), standard error 0.002
    w = torch.tensor([1e9, 9.0, 1.0]).expand(20000, 3).contiguous()
    assert abs((start("kmeans++", x, 2, w)[:, 1] == 2).float().mean() - 0.5) < 0.015


def test_kmeanspp_spreads_better_than_random():
    x = tokens(32, 60, 4, groups=6, spread=0.05)
    loss = {
        name: tp.kmeans(x, 6, init=start(name, x, 6), num_iters=1, backend="reference").inertia.mean()
        for name in ("random", "kmeans++", "farthest")
    }
    assert loss["kmeans++"] < 0.7 * loss["random"] and loss["farthest"] < 0.7 * loss["random"]


@pytest.mark.parametrize("N,K", [(20, 10), (20, 15), (21, 11), (21, 20), (16, 16), (2, 1), (1, 1)])
def test_bipartite_is_never_worse_than_the_matching(N, K):
    x = tokens(6, N, 5, torch.float64, groups=4)
    got = tp.kmeans(x, K, init="bipartite", backend="reference")
    one = tp.kmeans(x, K, init="bipartite", num_iters=1, backend="reference")
    for b in range(6):
        matching = oracle.partition_loss(f64(x[b]), oracle.bipartite(f64(x[b]), K))
        assert got.inertia[b].item() <= matching * (1 + 1e-12) + 1e-12
        assert one.inertia[b].item() <= matching * (1 + 1e-12) + 1e-12


def kinds_of_images(n: int, generator: torch.Generator) -> torch.Tensor:
    """Images (B, n, 6) of several kinds: normal; groups; a smooth field on a common offset, as features of a ViT are;
    repeated tokens; token lengths over three decades."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    groups = 3 * normal(8, 4, 6)[:, torch.randint(4, (n,), generator=generator)] + normal(8, n, 6)
    smooth = normal(8, n, 6).cumsum(1) / n**0.5 + 0.1 * normal(8, n, 6) + 2 * normal(8, 1, 6)
    repeated = normal(8, n, 6)[:, torch.randint(n, (n,), generator=generator)]
    lengths = normal(8, n, 6) * 10 ** (3 * torch.rand(8, n, 1, generator=generator))
    return torch.cat([normal(8, n, 6), groups, smooth, repeated, lengths])


@pytest.mark.parametrize("N, K", [(2, 1), (5, 3), (16, 8), (16, 15), (49, 25), (49, 37), (64, 32), (64, 64)])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_bipartite_is_never_worse_than_the_layer(backend, N, K, weighted, dtype):
    """Contract 5, against our own BipartiteMatching."""
    generator = torch.Generator().manual_seed(N * K)
    x = kinds_of_images(N, generator)[:: 16 if backend.interpreted else 1].to(dtype).to(backend.device)
    w = torch.rand(len(x), N, generator=generator).to(backend.device) + 0.01
    assert_never_worse_than_the_layer(backend, x, w if weighted else None, K)


def test_bipartite_is_never_worse_than_the_layer_on_photos(backend):
    """Patches of 16 x 16 pixels; 16 parts of a photo, as images of 64 tokens."""
    photo = torch.from_numpy(pytest.importorskip("skimage.data").astronaut() / 255).float()
    x = photo.view(4, 8, 16, 4, 8, 16, 3).permute(0, 3, 1, 4, 2, 5, 6).reshape(16, 64, 768).to(backend.device)
    for kept in (32,) if backend.interpreted else (32, 48, 60):
        assert_never_worse_than_the_layer(backend, x[:1] if backend.interpreted else x, None, kept)


def assert_never_worse_than_the_layer(backend, x, w, K):
    """Losses from float64 and the centers that were returned."""
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if w is None else w

    def loss(centers):
        apart = torch.cdist(x.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        return (sizes.double() * apart.amin(2)).sum(1)

    matched = tp.BipartiteMatching(K, num_prefix_tokens=0, backend=backend.name)(x, sizes=sizes)[0]
    scale = (sizes.double() * x.double().square().sum(2)).sum(1)
    unit = torch.finfo(x.dtype).eps
    for iters in (1, 5):
        found = tp.kmeans(x, K, weights=w, init="bipartite", num_iters=iters, backend=backend.name)
        excess = loss(found.centers) - loss(matched)
        assert (excess <= 4 * unit * unit * scale + 1e-5 * loss(matched)).all(), (iters, excess.max())


def test_bipartite_with_mask_equals_one_call_per_item():
    x = tokens(2, 20, 5, torch.float64)
    mask = torch.arange(20) < torch.tensor([[20], [14]])
    spoiled = torch.where(mask[:, :, None], x, float("nan"))
    got = tp.kmeans(spoiled, torch.tensor([12, 9]), init="bipartite", mask=mask, backend="reference")
    alone = tp.kmeans(x[1:, :14], 9, init="bipartite", backend="reference")
    assert got.assignment[1, :14].tolist() == alone.assignment[0].tolist()


def test_bipartite_needs_half(backend):
    x = tokens(1, 20, 3, device=backend.device)
    with pytest.raises(ValueError, match="num_clusters.*N/2"):
        tp.kmeans(x, 9, init="bipartite", backend=backend.name)
