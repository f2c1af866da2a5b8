"""TokenPooling and the baselines: counts, prefix, scores, sizes, masks, gradients, copies, compile, errors."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch._dynamo.testing

import tokenpool_ext
from tokenpool_ext.baselines import (
    BipartiteMatching,
    GridPooling,
    ImportanceSampling,
    RandomSelection,
    ScorePruning,
    grid_cells,
)
from tokenpool_ext.matching import match
from tokenpool_ext.modules import TokenPooling

P, N, D, K = 2, 36, 8, 12

LAYERS = {
    "kmeans": lambda **kw: TokenPooling(K, num_prefix_tokens=P, **kw),
    "kmeans-unweighted": lambda **kw: TokenPooling(K, weighted=False, num_prefix_tokens=P, **kw),
    "kmedoids": lambda **kw: TokenPooling(K, algorithm="kmedoids", num_prefix_tokens=P, **kw),
    "kmedoids-mean": lambda **kw: TokenPooling(K, algorithm="kmedoids", emit="mean", num_prefix_tokens=P, **kw),
    "score": lambda **kw: ScorePruning(K, num_prefix_tokens=P, **kw),
    "importance": lambda **kw: ImportanceSampling(K, seed=3, num_prefix_tokens=P, **kw),
    "random": lambda **kw: RandomSelection(K, seed=3, num_prefix_tokens=P, **kw),
    "grid": lambda **kw: GridPooling(K, num_prefix_tokens=P, **kw),
    "bipartite": lambda **kw: BipartiteMatching(K, num_prefix_tokens=P, **kw),
}
SELECTIONS = ("score", "importance", "random")


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, P + N, D, generator=generator), torch.rand(3, P + N, generator=generator)


def test_counts_prefix_and_determinism(name, tokens):
    x, scores = tokens
    layer = LAYERS[name]()
    y = layer(x, scores)
    assert y.shape == (3, P + K, D) and y.dtype == x.dtype
    assert torch.equal(y[:, :P], x[:, :P])
    assert torch.isfinite(y).all()
    assert torch.equal(y, layer(x, scores))
    assert torch.equal(y, layer(x, scores[:, P:])), "scores of the patch tokens alone must mean the same"
    if name not in ("importance", "random"):  # a draw depends on the slot in the batch
        assert torch.equal(y[1:2], layer(x[1:2], scores[1:2]))


def test_identity_returns_the_same_object(name, tokens):
    x, scores = tokens
    short = x[:, : P + K]
    layer = LAYERS[name]()
    assert layer(short, scores[:, : P + K]) is short
    assert LAYERS[name](return_clusters=True)(short)[0] is short
    assert layer(x[:, :P]).shape == (3, P, D), "a sequence of prefix tokens only"


def test_clusters_and_sizes(name, tokens):
    x, scores = tokens
    sizes = torch.ones(3, P + N)
    y, clusters, new = LAYERS[name](return_clusters=True)(x, scores, sizes=sizes)
    assert clusters.assignment.shape == (3, N) and new.shape == (3, P + K)
    kept = clusters.assignment >= 0
    assert torch.equal(kept.sum(1), torch.full((3,), K if name in SELECTIONS else N))
    for image in range(3):
        count = torch.bincount(clusters.assignment[image][kept[image]], minlength=K)
        assert torch.equal(new[image, P:], count.float()) and count.min() >= 1
    assert torch.equal(new[:, :P], sizes[:, :P])
    first = torch.stack([(clusters.assignment == j).float().argmax(1) for j in range(K)], 1)
    assert (first.diff(dim=1) > 0).all(), "clusters ordered by their first token"
    w = scores[:, P:] if name in ("kmeans", "kmedoids", "kmedoids-mean") else torch.ones(3, N)
    rows = tokenpool_ext.unpool(clusters.centers, clusters.assignment)
    error = (w * kept * (x[:, P:] - rows).square().sum(2)).sum(1)
    torch.testing.assert_close(clusters.inertia, error, msg=name)


def test_selection_and_medoids_are_rows(tokens):
    x, scores = tokens
    for name in (*SELECTIONS, "kmedoids"):
        y, clusters = LAYERS[name](return_clusters=True)(x, scores)
        picked = x[:, P:].gather(1, clusters.medoids[:, :, None].expand(-1, -1, D))
        assert torch.equal(y[:, P:], picked), name
    top = scores[:, P:].topk(K).indices.sort(1).values
    assert torch.equal(LAYERS["score"](return_clusters=True)(x, scores)[1].medoids, top)


def test_weighted_pooling_is_the_functional_one(tokens):
    x, scores = tokens
    expected = tokenpool_ext.kmeans(x[:, P:], K, weights=scores[:, P:], sort=True)
    assert torch.equal(LAYERS["kmeans"]()(x, scores)[:, P:], expected.centers)
    plain = tokenpool_ext.kmeans(x[:, P:], K, sort=True)
    assert torch.equal(LAYERS["kmeans"]()(x)[:, P:], plain.centers), "no scores: unweighted"
    assert torch.equal(LAYERS["kmeans-unweighted"]()(x, scores)[:, P:], plain.centers), "scores ignored"
    mean = LAYERS["kmedoids-mean"](return_clusters=True)
    y, clusters = mean(x, scores)
    assert torch.equal(y[:, P:], tokenpool_ext.pool(x[:, P:], clusters.assignment, K, weights=scores[:, P:]))


def test_cluster_on_one_tensor_pool_another(tokens):
    x, scores = tokens
    features = torch.randn(3, P + N, 5, generator=torch.Generator().manual_seed(1))
    for name in ("kmeans", "kmedoids", "bipartite"):
        y, clusters = LAYERS[name](return_clusters=True)(x, scores, features=features)
        own = LAYERS[name](return_clusters=True)(features, scores)[1]
        assert torch.equal(clusters.assignment, own.assignment), name
        assert y.shape == (3, P + K, D)
        assert torch.equal(y, LAYERS[name]()(x, scores, features=features[:, P:])), name


def test_mask(name, tokens):
    x, scores = tokens
    mask = torch.ones(3, P + N, dtype=torch.bool)
    mask[1, 30:] = False
    mask[2, P + 5 :] = False  # fewer real tokens than K
    x = torch.where(mask[:, :, None], x, torch.nan)
    layer = LAYERS[name](return_clusters=True)
    if name == "bipartite":
        with pytest.raises(ValueError, match="mask"):
            layer(x, scores, mask=mask)
        return
    y, clusters = layer(x, scores, mask=mask)
    assert torch.isfinite(y).all()
    assert (clusters.assignment[~mask[:, P:]] == -1).all()
    bad = torch.where(mask, scores, -1.0)
    for more in ({}, {"sizes": torch.where(mask, 2.0, -1.0)}, {"features": x} if name[:4] == "kmed" else {}):
        first, *_ = layer(x, scores, mask=mask, **more)
        assert torch.equal(layer(x, bad, mask=mask, **more)[0], first), "scores and sizes of padding do not count"
    if name != "grid":
        assert torch.equal((clusters.mass > 0).sum(1), torch.tensor([K, K, 5]))
        assert (y[2, P + 5 :] == 0).all()


@pytest.mark.parametrize("kept", [{"keep_ratio": 0.5}, {"keep_ratio": 0.77}, {"num_tokens": -13}], ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    "make",
    [TokenPooling, partial(TokenPooling, algorithm="kmedoids"), partial(TokenPooling, init="strided"), ScorePruning],
    ids=["kmeans", "kmedoids", "strided", "score"],
)
def test_each_padded_image_is_as_alone(make, prefix, kept):
    """How many tokens are left of an image depends on its own real tokens, not on the longest image beside it."""
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(4, 41, 8, generator=generator), torch.rand(4, 41, generator=generator) + 0.1
    lengths = [41, 30, 7, 1]
    mask = torch.arange(41) < torch.tensor(lengths)[:, None]
    layer = make(num_prefix_tokens=prefix, return_clusters=True, **kept)
    y, clusters, sizes = layer(x.where(mask[:, :, None], torch.nan), scores, mask=mask, sizes=torch.ones(4, 41))
    for i, n in enumerate(lengths):
        own, own_clusters, own_sizes = layer(x[i : i + 1, :n], scores[i : i + 1, :n], sizes=torch.ones(1, n))
        k = own.shape[1]
        assert torch.equal(y[i, :k], own[0]) and not y[i, k:].any()
        assert torch.equal(sizes[i, :k], own_sizes[0]) and not sizes[i, k:].any()
        assert torch.equal(clusters.assignment[i, : n - prefix], own_clusters.assignment[0])
        assert torch.equal(clusters.medoids[i, : k - prefix], own_clusters.medoids[0])


def test_a_rule_of_one_s_own_counts_real_tokens_too():
    class Thirds(TokenPooling):
        def tokens_kept(self, num_patches: int) -> int:
            return -(-num_patches // 3)

    mask = torch.arange(12) < torch.tensor([[12], [7]])
    layer = Thirds(keep_ratio=1.0, num_prefix_tokens=0, return_clusters=True)
    assert (layer(torch.randn(2, 12, 4), mask=mask)[1].mass > 0).sum(1).tolist() == [4, 3]


def test_gradients(name, tokens):
    x, scores = tokens
    x = x.clone().requires_grad_()
    LAYERS[name]()(x, scores).square().sum().backward()
    grad = x.grad.abs().sum(2)
    assert torch.isfinite(x.grad).all() and (grad[:, :P] > 0).all()
    reached = (grad[:, P:] > 0).sum(1)
    expected = K if name in SELECTIONS or name == "kmedoids" else N
    assert torch.equal(reached, torch.full((3,), expected))


def test_gradcheck_of_kmeans_and_features():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    scores = torch.rand(2, 9, dtype=torch.float64, generator=generator) + 0.1
    features = torch.randn(2, 9, 2, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(TokenPooling(4), (x, scores.requires_grad_()))
    medoids = TokenPooling(4, algorithm="kmedoids")
    assert torch.autograd.gradcheck(lambda t: medoids(t, scores.detach(), features=features), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(name, dtype, tokens):
    x, scores = tokens
    y = LAYERS[name]()(x.to(dtype), scores)
    assert y.dtype == dtype and y.shape == (3, P + K, D)


def test_autocast(name, tokens):
    x, scores = tokens
    layer = LAYERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, scores)
        mixed = layer(x.bfloat16(), scores, features=x)
    assert y.dtype == torch.float32 and mixed.dtype == torch.bfloat16
    if name != "bipartite":  # its similarities are a matrix product
        assert torch.equal(y, layer(x, scores))


def test_no_state(name, tokens):
    x, scores = tokens
    layer = LAYERS[name]()
    before = pickle.dumps(layer)
    y = layer(x, scores)
    assert pickle.dumps(layer) == before, "a forward must leave nothing behind"
    assert not layer.state_dict() and not list(layer.parameters()) and not list(layer.buffers())
    for twin in (copy.deepcopy(layer), pickle.loads(before)):
        assert torch.equal(twin(x, scores), y) and repr(twin) == repr(layer)
    assert f"num_tokens={K}" in repr(layer) and f"num_prefix_tokens={P}" in repr(layer)


def test_two_threads(tokens):
    x, scores = tokens
    layer = LAYERS["kmeans"]()
    inputs = [(x, scores), (x.flip(1), scores.flip(1))]
    expected = [layer(*pair) for pair in inputs]
    wrong = []

    def work(which):
        for _ in range(5):
            if not torch.equal(layer(*inputs[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_compile_fullgraph(name, tokens):
    x, scores = tokens
    layer = LAYERS[name]()
    if name in ("importance", "random"):
        layer.seed = None  # a torch.Generator does not enter a graph; count only
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x, scores)
    assert y.shape == (3, P + K, D)
    if name not in ("importance", "random"):
        torch.testing.assert_close(y, layer(x, scores))


@pytest.mark.parametrize("options", [dict(num_tokens=10), dict(keep_ratio=0.5)])
@pytest.mark.parametrize("kind", [TokenPooling, GridPooling, BipartiteMatching, ScorePruning])
def test_compile_dynamic(kind, options):
    layer = kind(**options)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for n in (17, 20, 37):  # to 10: one round of matching, then two; each round more takes seconds to compile
        for batch in (2, 3):
            x, scores = torch.randn(batch, n, 4), torch.rand(batch, n)
            torch.testing.assert_close(compiled(x, scores), layer(x, scores))
    # One graph serves every length when K is given; the number of clusters itself is part of a graph.
    assert counter.frame_count <= (1 if "num_tokens" in options and kind in (TokenPooling, ScorePruning) else 3)


def test_keep_ratio_is_the_published_schedule():
    for ratio, counts in {0.9: [176, 158, 142], 0.7: [137, 96, 67], 0.5: [98, 49, 24], 0.25: [49, 12, 3]}.items():
        layer, n, seen = TokenPooling(keep_ratio=ratio), 196, []
        for _ in counts:
            n = layer.tokens_kept(n)
            seen.append(n)
        assert seen == counts
    assert TokenPooling(keep_ratio=0.01).tokens_kept(5) == 1
    assert TokenPooling(keep_ratio=1).tokens_kept(7) == 7


def test_grid_cells():
    assert grid_cells(16, 4, 1, 1) == (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3)
    assert grid_cells(8, 2, 2, 4) == (0, 0, 1, 1, 0, 0, 1, 1)
    for n in (1, 7, 36, 49, 196, 256):
        for k in range(1, n + 1, 3):
            assert set(grid_cells(n, k, 1, 1)) == set(range(k)), (n, k)
    x = torch.arange(16.0).reshape(1, 4, 4)[None]
    pooled = GridPooling(4, num_prefix_tokens=0)(x.reshape(1, 16, 1))
    assert torch.equal(pooled.reshape(1, 1, 2, 2), torch.nn.functional.avg_pool2d(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [BipartiteMatching, GridPooling])
def test_representative_and_inertia_of_a_merger_are_those_before_rounding(layer, dtype):
    x = (torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    sizes = torch.ones(4, 16)
    sizes[3, 1::2] = 2
    clusters = layer(8, num_prefix_tokens=0).reduced(x, sizes=sizes).clusters
    for image, labels, weights, medoids, inertia in zip(x.double(), clusters.assignment, sizes, *clusters[3:]):
        loss = 0.0
        for j in range(8):
            members = (labels == j).nonzero()[:, 0]
            rows, w = image[members], weights[members].double()
            distances = (rows - (w @ rows) / w.sum()).square().sum(1)
            loss += float(w @ distances)
            least = distances <= distances.min() * (1 + 1e-9) + 1e-12  # a tie to the lowest index
            assert medoids[j] == members[least][0]
        assert float(inertia) == pytest.approx(loss, rel=1e-5, abs=1e-5)


def test_bipartite_matching_by_hand():
    # A = tokens 0, 2, 4; B = tokens 1, 3, 5. Token 4 is most like 5, then 2 like 1; 0 like 3 least.
    angle = torch.tensor([0.0, 0.9, 1.1, 0.3, 2.0, 2.05])
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    for k, labels, targets in (
        (5, [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 5]),
        (4, [0, 1, 1, 2, 3, 3], [0, 1, 3, 5]),
        (3, [1, 0, 0, 1, 2, 2], [1, 3, 5]),
    ):
        assert [t.tolist() for t in match(x, k)] == [[labels], [targets]]
    near = torch.tensor([0.0, 0.1, 0.2, 1.0, 2.0, 3.0])  # 0 and 2 may both go to 1, which no matching from B does
    assert match(torch.stack([near.cos(), near.sin()], 1)[None], 4)[0].tolist() == [[0, 0, 0, 1, 2, 3]]
    sizes = torch.tensor([[1.0, 1, 1, 1, 1, 3]])
    y, new = BipartiteMatching(5, num_prefix_tokens=0)(x, sizes=sizes)
    assert torch.equal(new, torch.tensor([[1.0, 1, 1, 1, 4]]))
    torch.testing.assert_close(y[0, 4], (x[0, 4] + 3 * x[0, 5]) / 4)


ATTRIBUTES = [  # layer, attribute, a new value, the layer made with that value
    (TokenPooling(keep_ratio=0.9), "keep_ratio", 0.5, TokenPooling(keep_ratio=0.5)),
    (TokenPooling(20), "num_tokens", 7, TokenPooling(7)),
    (TokenPooling(keep_ratio=0.9), "num_tokens", 7, TokenPooling(7)),
    (TokenPooling(7), "keep_ratio", 0.25, TokenPooling(keep_ratio=0.25)),
    (TokenPooling(7), "algorithm", "kmedoids", TokenPooling(7, algorithm="kmedoids")),
    (TokenPooling(7), "weighted", False, TokenPooling(7, weighted=False)),
    (TokenPooling(7), "num_iters", 1, TokenPooling(7, num_iters=1)),
    (TokenPooling(7), "init", "strided", TokenPooling(7, init="strided")),
    (TokenPooling(7), "sort", False, TokenPooling(7, sort=False)),
    (TokenPooling(7), "num_prefix_tokens", 3, TokenPooling(7, num_prefix_tokens=3)),
    (TokenPooling(7, algorithm="kmedoids"), "emit", "mean", TokenPooling(7, algorithm="kmedoids", emit="mean")),
    (RandomSelection(7, seed=1), "seed", 2, RandomSelection(7, seed=2)),
    (GridPooling(6), "grid_size", (4, 9), GridPooling(6, grid_size=(4, 9))),
    (BipartiteMatching(18), "sort", False, BipartiteMatching(18, sort=False)),
]


@pytest.mark.parametrize("layer, attribute, value, made", ATTRIBUTES, ids=lambda v: v if isinstance(v, str) else "")
def test_an_attribute_set_later_is_the_attribute_given_at_first(layer, attribute, value, made):
    generator = torch.Generator().manual_seed(4)
    x, scores = torch.randn(2, 37, 5, generator=generator), torch.rand(2, 37, generator=generator)
    layer, before = copy.deepcopy(layer), layer(x, scores)
    setattr(layer, attribute, value)
    assert torch.equal(layer(x, scores), made(x, scores)) and repr(layer) == repr(made)
    assert layer(x, scores).shape != before.shape or not torch.equal(layer(x, scores), before)


@pytest.mark.parametrize(
    "layer, attribute, value, error",
    [
        (TokenPooling(7), "num_tokens", 0, ValueError),
        (TokenPooling(7), "num_tokens", None, ValueError),
        (TokenPooling(7), "keep_ratio", 1.5, ValueError),
        (TokenPooling(7), "keep_ratio", "half", TypeError),
        (TokenPooling(7), "algorithm", "mean", ValueError),
        (TokenPooling(7), "num_iters", 2.0, TypeError),
        (TokenPooling(7), "init", "best", ValueError),
        (TokenPooling(7), "emit", "medoid", ValueError),
        (TokenPooling(7, algorithm="kmedoids", emit="medoid"), "algorithm", "kmeans", ValueError),
        (TokenPooling(keep_ratio=0.5, init="bipartite"), "keep_ratio", 0.4, ValueError),
        (TokenPooling(keep_ratio=0.4), "init", "bipartite", ValueError),
        (TokenPooling(7), "weighted", 1, TypeError),
        (TokenPooling(7), "backend", "gpu", ValueError),
        (TokenPooling(7), "num_prefix_tokens", -1, ValueError),
        (TokenPooling(7), "return_clusters", None, TypeError),
        (ImportanceSampling(7), "seed", -1, ValueError),
        (GridPooling(7), "grid_size", (0, 4), ValueError),
        (BipartiteMatching(7), "sort", 0, TypeError),
        (BipartiteMatching(7), "position_weight", "a", TypeError),
        (GridPooling(7), "position_weight", -1.0, ValueError),
    ],
)
def test_a_wrong_value_set_later_is_refused_and_changes_nothing(layer, attribute, value, error):
    before = dict(layer.__dict__)
    with pytest.raises(error, match=attribute.split("_")[0]):
        setattr(layer, attribute, value)
    assert layer.__dict__ == before


def test_an_annealed_keep_ratio_while_compiled():
    layer = TokenPooling(keep_ratio=0.9, weighted=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for ratio, left in ((0.9, 91), (0.5, 51), (0.7, 71)):
        layer.keep_ratio = ratio
        assert compiled(torch.randn(1, 101, 8)).shape[1] == left


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(), ValueError, ("num_tokens", "keep_ratio")),
        (dict(num_tokens=3, keep_ratio=0.5), ValueError, ("exactly one",)),
        (dict(num_tokens=0), ValueError, ("num_tokens", "0")),
        (dict(num_tokens=1.5), TypeError, ("num_tokens", "float")),
        (dict(keep_ratio=0.0), ValueError, ("keep_ratio",)),
        (dict(keep_ratio="half"), TypeError, ("keep_ratio", "str")),
        (dict(num_tokens=3, algorithm="mean"), ValueError, ("algorithm", "kmedoids", "mean")),
        (dict(num_tokens=3, weighted=1), TypeError, ("weighted", "int")),
        (dict(num_tokens=3, num_iters=0), ValueError, ("num_iters",)),
        (dict(num_tokens=3, num_prefix_tokens=-1), ValueError, ("num_prefix_tokens",)),
        (dict(num_tokens=3, emit="medoid"), ValueError, ("emit", "kmedoids")),
        (dict(num_tokens=3, init=torch.zeros(2)), TypeError, ("init", "Tensor")),
        (dict(num_tokens=3, init="kmean++"), ValueError, ("init", "kmean++", "kmeans++")),
        (dict(keep_ratio=0.25, init="bipartite"), ValueError, ("bipartite", "0.25")),
        (dict(num_tokens=3, backend=7), TypeError, ("backend", "int")),
        (dict(num_tokens=3, backend="gpu"), ValueError, ("backend", "gpu", "cuda")),
        (dict(num_tokens=3, colour="red"), TypeError, ("colour",)),
    ],
)
def test_constructor_errors(arguments, error, words):
    with pytest.raises(error) as caught:
        TokenPooling(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_forward_errors(tokens):
    x, scores = tokens
    layer = LAYERS["kmeans"]()
    cases = [
        (lambda: layer("x"), TypeError, "x must be"),
        (lambda: layer(x[0]), ValueError, "(B, N, D)"),
        (lambda: layer(x[:, :3].int()), TypeError, "x must be float32"),
        (lambda: layer(x, scores[:, 1:]), ValueError, "scores must have shape (3, 38)"),
        (lambda: layer(x, scores[:2]), ValueError, "scores"),
        (lambda: layer(x, x), ValueError, "scores"),
        (lambda: layer(x, [1.0]), TypeError, "scores"),
        (lambda: layer(x, features=x[:, 1:]), ValueError, "features"),
        (lambda: layer(x, mask=scores), TypeError, "mask must be bool"),
        (lambda: layer(x, sizes=scores[:, 3:]), ValueError, "sizes"),
        (lambda: layer(x[:, :1]), ValueError, "num_prefix_tokens"),
        (lambda: layer(x, -scores), ValueError, "TokenPooling: scores must be >= 0"),
        (lambda: layer(x, sizes=-scores), ValueError, "TokenPooling: sizes must be >= 0"),
        (lambda: LAYERS["score"]()(x), ValueError, "scores"),
        (lambda: TokenPooling(4, init="best")(x), ValueError, "init"),
    ]
    for call, error, words in cases:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value), caught.value


def test_mass_is_what_tokens_count_also_where_nothing_is_pooled(name, tokens):
    x, scores = tokens
    sizes = torch.arange(3.0 * (P + N)).view(3, P + N)
    layer = LAYERS[name](return_clusters=True)
    for given in (scores, None):
        if given is None and name in ("score", "importance"):
            continue
        counted = given if given is not None and name in (*SELECTIONS, "kmeans", "kmedoids", "kmedoids-mean") else sizes
        for kept in (K, N):
            layer.num_tokens = kept
            clusters = layer(x, given, sizes=sizes)[1]
            member = clusters.assignment >= 0
            want = torch.zeros(3, kept).scatter_add(1, clusters.assignment.clamp(min=0), counted[:, P:] * member)
            torch.testing.assert_close(clusters.mass, want)


@pytest.mark.parametrize("kept", [K, N])
def test_changing_one_statistic_in_place_changes_no_other_and_no_input(name, tokens, kept):
    """Labels made global by adding an offset, masses normalised: the medoids and scores are as they were."""
    x, scores = tokens
    layer = LAYERS[name](return_clusters=True)
    layer.num_tokens = kept
    clusters, given = layer(x, scores)[1], scores.clone()
    medoids = clusters.medoids.clone()
    clusters.assignment.add_(1000)
    clusters.mass.div_(7)
    assert torch.equal(clusters.medoids, medoids) and torch.equal(scores, given)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bfloat16, torch.float64, torch.bool])
def test_sizes_of_any_dtype_merge_as_those_of_float32(dtype):
    x = torch.randn(2, 1200, 4, generator=torch.Generator().manual_seed(5))
    sizes = torch.full((2, 1200), 7).to(dtype)
    layer = BipartiteMatching(2, num_prefix_tokens=0, return_clusters=True)  # ten rounds: sums above 255
    y, clusters, _ = layer(x, sizes=sizes)
    expected = layer(x, sizes=sizes.float())
    assert torch.equal(clusters.assignment, expected[1].assignment) and torch.equal(y, expected[0])


@pytest.mark.parametrize("layer", [ScorePruning(3, num_prefix_tokens=0), ImportanceSampling(3, num_prefix_tokens=0)])
def test_a_selection_keeps_real_tokens_before_padding_and_before_those_below_zero(layer):
    x, mask = torch.randn(1, 8, 2), torch.tensor([[False] * 4 + [True] * 4])
    layer.return_clusters = True
    for scores in ([0.0, 0, 0, 0, 0, 0, 1, 0], [9.0, 9, 9, 9, 1, 0, 1, 0], [9.0, 9, 9, 9, -1, 1, 1, 1]):
        kept = layer(x, torch.tensor([scores]), mask=mask)[1].medoids[0].tolist()
        assert len(set(kept)) == 3 and min(kept) >= 4, kept
        assert all(i in kept for i in range(4, 8) if scores[i] > 0), kept


def test_scores_of_float64_are_compared_as_such():
    x, steps = torch.randn(1, 5, 2, dtype=torch.float64), torch.arange(5, dtype=torch.float64)
    layer = ScorePruning(2, num_prefix_tokens=0, return_clusters=True)
    assert layer(x, 1 + 1e-12 * steps[None])[1].medoids.tolist() == [[3, 4]]
    tiny = torch.tensor([[1e-200, 1e-200, 1e-100, 1e-200, 1e-200]], dtype=torch.float64)
    for seed in range(20):
        sampled = ImportanceSampling(1, seed=seed, num_prefix_tokens=0, return_clusters=True)(x, tiny)
        assert sampled[1].medoids.tolist() == [[2]]


@pytest.mark.parametrize("ratio, n, kept", [(4e-5, 1000, 1), (4e-5, 10**5, 4), (6e-5, 10**5, 6), (1e-300, 50, 1)])
def test_a_tiny_keep_ratio_keeps_few(ratio, n, kept):
    assert TokenPooling(keep_ratio=ratio).tokens_kept(n) == kept


def test_negative_sizes_are_refused_by_the_layer(name, tokens):
    x, scores = tokens
    layer, sizes = LAYERS[name](), torch.ones(3, P + N)
    sizes[1, P + 2] = -2
    for kept in (K, N):
        layer.num_tokens = kept
        with pytest.raises(ValueError, match=f"^{type(layer).__name__}: sizes must be >= 0, got -2"):
            layer(x, scores, sizes=sizes)
    sizes[1, P + 2], sizes[1, 0] = 1, -2
    layer(x, scores, sizes=sizes)  # of the prefix they count nothing


@pytest.mark.parametrize(
    "layer",
    [TokenPooling, ScorePruning, ImportanceSampling, RandomSelection, GridPooling, BipartiteMatching],
    ids=lambda layer: layer.__name__,
)
@pytest.mark.parametrize("ratio", [1e-9, 0.3, 0.5, 0.9])
def test_one_token_is_kept_as_it_is(layer, ratio):
    x = torch.randn(2, 2, 4)
    out, sizes = layer(keep_ratio=ratio)(x, torch.rand(2, 2), sizes=torch.tensor([[1.0, 3.0]] * 2))
    assert torch.equal(out, x) and sizes.tolist() == [[1, 3]] * 2
