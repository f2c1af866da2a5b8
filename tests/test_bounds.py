"""CPU paths without a Gram matrix: bounds decide which distances are computed, and never what the result is."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_identical

import tokenpool_ext as tp

pytestmark = pytest.mark.skipif(tp.backends()["cpu"] != "ok", reason=f"no cpu backend: {tp.backends()['cpu']}")
PATHS = ["gram", "direct", "grouped"]


@pytest.fixture(params=["best", "baseline"], autouse=True)
def instruction_set(request, monkeypatch):  # other vector lengths are other panels and other orders of summation
    if request.param == "baseline":
        monkeypatch.setenv("TOKENPOOL_EXT_CPU_ISA", "baseline")


def normal(B, N, D, generator):
    return torch.randn(B, N, D, generator=generator, dtype=torch.float64)


def blobs(B, N, D, generator):  # bounds rule out nearly everything
    return normal(B, N, D, generator) + 30 * normal(B, 8, D, generator)[:, torch.arange(N) % 8]


def line(B, N, D, generator):  # centers travel far
    return torch.rand(B, N, 1, generator=generator, dtype=torch.float64).expand(B, N, D).contiguous() ** 3


def far_away(B, N, D, generator):
    return normal(B, N, D, generator) + 1e5


def twice_each(B, N, D, generator):  # ties and empty clusters
    return normal(B, (N + 1) // 2, D, generator).repeat_interleave(2, 1)[:, :N].contiguous()


def one_outlier(B, N, D, generator):
    x = normal(B, N, D, generator)
    x[:, N // 2] *= 1e4
    return x


KINDS = [normal, blobs, line, far_away, twice_each, one_outlier]
SHAPES = [(40, 3, 9), (200, 20, 10), (150, 65, 60), (98, 130, 3), (120, 8, 120)]


def run(monkeypatch, path, algorithm, x, K, **options):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
    return getattr(tp, algorithm)(x, K, backend="cpu", **options)


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("N,D,K", SHAPES)
def test_same_as_comparing_with_all_centers(monkeypatch, kind, algorithm, N, D, K):
    """Float64, many iterations, weights, padding and fewer clusters in some images: not a label differs."""
    generator = torch.Generator().manual_seed(N)
    x, w = kind(3, N, D, generator), 0.1 + torch.rand(3, N, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, N, generator=generator) < 0.9
    counts = torch.tensor([K, max(1, K // 2), K])
    if kind is twice_each and algorithm == "kmedoids":
        w[:, 1::2] = w[:, ::2] * 0.5  # of two equal tokens the heavier one, or rounding would choose the medoid
    want = getattr(tp, algorithm)(x, counts, weights=w, mask=mask, num_iters=30, backend="reference")
    for path in PATHS:
        got = run(monkeypatch, path, algorithm, x, counts, weights=w, mask=mask, num_iters=30)
        torch.testing.assert_close(got.inertia, want.inertia, rtol=1e-6, atol=1e-9)
        if kind is not twice_each:
            assert torch.equal(got.assignment, want.assignment), path
            torch.testing.assert_close(got.centers, want.centers, rtol=1e-9, atol=1e-6 if kind is far_away else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [normal, blobs, line, one_outlier], ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", PATHS[1:])
def test_every_token_ends_at_its_nearest_center(monkeypatch, path, kind, dtype):
    """Converged, no other center is nearer than a token's own, rounding aside."""
    x = kind(2, 300, 48, torch.Generator().manual_seed(7)).to(dtype)
    found = run(monkeypatch, path, "kmeans", x, 40, num_iters=200)
    again = run(monkeypatch, path, "kmeans", x, 40, num_iters=201)
    assert_identical(found.assignment, again.assignment)
    x64 = x.double()
    members = torch.nn.functional.one_hot(found.assignment, 40).double()
    centers = (members.transpose(1, 2) @ x64) / members.sum(1)[:, :, None]
    distances = torch.cdist(x64, centers)
    own = distances.gather(2, found.assignment[:, :, None])[:, :, 0]
    assert (own <= distances.amin(2) * (1 + 1e-3) + 1e-5).all()


def excess(x, centers, assignment):
    """How much farther than its nearest center a token's own is: the most of any token, as a share of that distance."""
    distances = torch.cdist(x.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    own = distances.gather(2, assignment[:, :, None])[:, :, 0]
    return float((own / distances.amin(2).clamp(min=1e-30)).max()) - 1


def nested(B, N, D, generator):  # clusters of clusters: neighbours far closer to each other than to the mean
    coarse, fine = 100 * normal(B, 3, D, generator), 0.1 * normal(B, 9, D, generator)
    return coarse[:, torch.arange(N) % 3] + fine[:, torch.arange(N) % 9] + 1e-3 * normal(B, N, D, generator)


@pytest.mark.parametrize("starts", ["tokens", "indices", "near tokens", "anywhere"])
@pytest.mark.parametrize("kind", [*KINDS, nested], ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", PATHS[1:])
def test_the_first_assignment_is_that_of_differences(monkeypatch, path, kind, starts):
    """Rough products come first, yet a token gets its nearest center, but for the rounding of (token - center)^2."""
    problems = [
        (9, 1, 3, 1),
        (60, 3, 9, 1e-20),
        (100, 15, 30, 1),
        (200, 16, 9, 1e18),
        (150, 33, 100, 1),
        (70, 530, 20, 1),
    ]
    for N, D, K, scale in problems:
        generator = torch.Generator().manual_seed(D)
        x = (kind(2, N, D, generator) * scale).float()
        chosen = torch.randperm(N, generator=generator)[:K]
        centers = x[:, chosen].clone()
        if starts == "near tokens":
            centers += 1e-3 * x.abs().mean() * torch.randn(2, K, D, generator=generator)
        elif starts == "anywhere":
            centers = x.abs().amax() * torch.randn(2, K, D, generator=generator)
        assignment = run(
            monkeypatch, path, "kmeans", x, K, num_iters=1, init=chosen.expand(2, K) if starts == "indices" else centers
        ).assignment
        distances = torch.cdist(x.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
        own = distances.gather(2, assignment[..., None])[..., 0]
        alone = (
            torch.stack([row.bincount(minlength=K)[row] for row in assignment]) == 1
        )  # may have been moved to an empty cluster
        rounding = 1e-6 * D**0.5 * x.abs().amax()
        assert bool((own <= distances.amin(2) * (1 + 1e-6) + rounding)[~alone].all()), (N, D, K)


@pytest.mark.parametrize("kind", [normal, blobs, twice_each, one_outlier], ids=lambda f: f.__name__)
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bringing_starting_tokens_forward_changes_nothing(monkeypatch, algorithm, dtype, kind):
    """One image a thread, they stand first and meet each other once; all threads in one image, nothing is moved."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(5)
    B, N, D = 3, 170, 21
    x = kind(B, N, D, generator).to(dtype)
    weights = torch.rand(B, N, generator=generator) * (torch.rand(B, N, generator=generator) > 0.2)
    mask = torch.rand(B, N, generator=generator) > 0.1
    shuffled = torch.stack([torch.randperm(N, generator=generator) for _ in range(B)])
    infinite = torch.ones(B, N)
    infinite[:, ::9] = float("inf")
    try:
        for K in (48, 73, 130):
            for i, options in enumerate(
                (
                    dict(),
                    dict(init=shuffled[:, :K]),
                    dict(init=shuffled[:, :K], weights=weights),
                    dict(mask=mask),
                    dict(weights=weights, mask=mask, init="farthest", sort=True),
                    dict(weights=infinite),
                    dict(init=shuffled[:, :K] // 2 * 2),
                    dict(mask=mask, init=shuffled[:, :K], num_iters=1),
                )
            ):
                torch.set_num_threads(1)
                together = run(monkeypatch, "direct", algorithm, x, K, **options)
                torch.set_num_threads(4)
                for b in range(B):
                    mine = {
                        name: value[b : b + 1] if isinstance(value, torch.Tensor) else value
                        for name, value in options.items()
                    }
                    alone = run(monkeypatch, "direct", algorithm, x[b : b + 1], K, **mine)
                    assert_identical(
                        tuple(None if t is None else t[b : b + 1] for t in together),
                        tuple(alone),
                        what=f"{K} clusters, options {i}",
                    )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6, 1e25])
@pytest.mark.parametrize("path", PATHS)
def test_given_centers_anywhere(monkeypatch, path, scale):
    """A center may come from afar: what is known about its distances must not survive that."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 200, 24, generator=generator)
    centers = torch.randn(2, 30, 24, generator=generator) * scale
    before = run(monkeypatch, path, "kmeans", x, 30, init=centers, num_iters=199).centers
    found = run(monkeypatch, path, "kmeans", x, 30, init=centers, num_iters=200)
    assert excess(x, before, found.assignment) < 1e-4


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("where", ["token", "center"])
def test_nothing_is_ruled_out_by_a_nan(monkeypatch, path, where):
    """What is not a number is no bound: the same clusters as by comparing with all centers."""
    for at in range(12):
        generator = torch.Generator().manual_seed(at)
        x = blobs(1, 120, 16, generator)
        init = x[:, :12].clone()
        (x if where == "token" else init)[0, at] = float("nan")
        want = run(monkeypatch, "gram", "kmeans", x, 12, init=init, num_iters=20)
        got = run(monkeypatch, path, "kmeans", x, 12, init=init, num_iters=20)
        assert torch.equal(got.assignment, want.assignment), at
        assert torch.equal(got.centers.isnan(), want.centers.isnan()), at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_tie_where_all_lengths_are_zero(monkeypatch, path, dtype):
    """All tokens alike: both centers end on them, and the lower has the token that need not fill the other."""
    for N, K in [(2, 2), (30, 3), (60, 20)]:
        x = torch.zeros(1, N, 4, dtype=dtype)
        centers = torch.linspace(2, 0.5, K, dtype=torch.float32).to(dtype)[None, :, None].expand(1, K, 4).contiguous()
        want = tp.kmeans(x, K, init=centers, num_iters=4, backend="reference").assignment
        assert torch.equal(run(monkeypatch, path, "kmeans", x, K, init=centers, num_iters=4).assignment, want), (N, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_of_two_identical_medoids_the_lower_is_chosen(monkeypatch, path, dtype):
    K = 20
    for seed, D in enumerate([3, 17, 24, 40, 100, 384]):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 60, D, generator=generator).to(dtype).repeat_interleave(2, 1)
        pairs = torch.randperm(60, generator=generator)[:10].mul(2).repeat_interleave(2)
        pairs[1::2] += 1
        init = pairs[torch.randperm(K, generator=generator)][None]
        for iters in (1, 2, 3, 4):
            medoids = run(monkeypatch, path, "kmedoids", x, K, init=init, num_iters=iters).medoids[0]
            assignment = run(monkeypatch, path, "kmedoids", x, K, init=init, num_iters=iters + 1).assignment[0]
            lowest = (x[0, medoids][:, None] == x[0, medoids][None]).all(-1).float().argmax(1)
            others = torch.ones(120, dtype=torch.bool)
            others[medoids] = False  # a medoid belongs to its own cluster
            assert torch.equal(lowest[assignment[others]], assignment[others]), (D, iters)


def test_a_bound_for_many_centers(monkeypatch):
    """So many tokens and centers that several share a bound without being told to."""
    monkeypatch.delenv("TOKENPOOL_EXT_CPU_PATH", raising=False)
    assert tp.explain(1, 20000, 1300, 8, dtype=torch.float32, device="cpu").path == "grouped"
    x = normal(1, 20000, 8, torch.Generator().manual_seed(2)).float()
    before = tp.kmeans(x, 1300, num_iters=5, backend="cpu").centers
    found = tp.kmeans(x, 1300, num_iters=6, backend="cpu")
    assert excess(x, before, found.assignment) < 1e-4


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_threads_share_an_image_without_changing_it(monkeypatch, path, algorithm):
    x = normal(1, 3000, 40, torch.Generator().manual_seed(5)).float()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(monkeypatch, path, algorithm, x, 200, num_iters=8))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_identical([t for t in results[0] if t is not None], [t for t in other if t is not None])
