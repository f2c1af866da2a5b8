"""What rounding must not do: sums over many members, far groups and long tokens, tokens of weight zero, ties of
integers, labels that never settle. Right values come from float64 or from reasoning."""

import time

import pytest
import torch

import tokenpool_ext as tp

CLUSTERINGS = ("kmeans", "kmedoids")


@pytest.fixture
def exact(backend):
    if backend.name in ("cuda", "triton"):
        pytest.skip("promised of the CPU and the reference")
    return backend


def run(algorithm, backend, x, k, **given):
    return getattr(tp, algorithm)(x, k, backend=backend.name, **given)


def loss_of(x, clusters, weights=None):
    """(B,) weighted reconstruction error in float64, from the assignment alone (means as centers)."""
    x = x.double()
    w = torch.ones(x.shape[:2], dtype=torch.float64) if weights is None else weights.double()
    total = torch.zeros(len(x), dtype=torch.float64)
    for b in range(len(x)):
        for j in clusters.assignment[b].unique():
            member = clusters.assignment[b] == j
            share = w[b, member] / w[b, member].sum()
            mean = (share[:, None] * x[b, member]).sum(0)
            total[b] += (w[b, member] * (x[b, member] - mean).square().sum(1)).sum()
    return total


# ---------------------------------------------------------------------------------------------------- many members


@pytest.mark.large
@pytest.mark.one_path
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_mean_of_a_million_ones_is_one(backend, weighted):
    n = 1_000_000
    x = torch.ones(n, 1, device=backend.device)
    w = torch.rand(n, device=backend.device) + 0.1 if weighted else None
    label = torch.zeros(n, dtype=torch.int64, device=backend.device)
    assert tp.pool(x, label, 1, weights=w, backend=backend.name).item() == 1.0


@pytest.mark.large
@pytest.mark.one_path
def test_sums_of_many_gradients(backend):
    n = 20_000_000
    centers = torch.ones(1, 1, device=backend.device, requires_grad=True)
    label = torch.zeros(n, dtype=torch.int64, device=backend.device)
    tp.unpool(centers, label, backend=backend.name).sum().backward()
    assert centers.grad.item() == n, "a float32 sum one by one stops at 16777216"


@pytest.mark.parametrize("value", [1000001.0, 0.1, -3e-7])
@pytest.mark.parametrize("count", [3, 128, 300])
def test_equal_tokens_come_back_to_the_bit(backend, value, count):
    x = torch.full((1, count, 2), value, device=backend.device)
    for weights in (None, torch.linspace(0.1, 3, count, device=backend.device)[None]):
        clusters = run("kmeans", backend, x, 1, weights=weights)
        assert (clusters.centers == x[:, :1]).all() and clusters.inertia.item() == 0
        assert (tp.pool(x, clusters.assignment, 1, weights=weights, backend=backend.name) == x[:, :1]).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [4, 5, 13])
def test_repeated_tokens_come_back_to_the_bit(backend, k, weighted):
    """Also where the image has several distinct tokens, so that something is taken off all of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 30, generator=generator).repeat(1, 5, 1).to(backend.device)
    weights = torch.rand(2, 20, generator=generator).to(backend.device) if weighted else None
    if weighted:
        x, weights = torch.cat([x, x[:, :1] + 0.01], 1), torch.cat([weights, weights[:, :1] * 0], 1)  # moves nothing
    clusters = run("kmeans", backend, x, k, weights=weights)
    assert (tp.unpool(clusters.centers, clusters.assignment)[:, :20] == x[:, :20]).all()
    assert clusters.inertia.tolist() == [0, 0]


@pytest.mark.large
@pytest.mark.one_path
def test_centers_of_large_clusters(backend):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(1, 400_000, 2, generator=generator) * 0.01 + 1).to(backend.device)
    clusters = run("kmeans", backend, x, 2, init="strided")
    for j in range(2):
        mean = x[clusters.assignment == j].double().mean(0)
        assert ((clusters.centers[0, j].double() - mean) / mean).abs().max() < 1e-6
    exact = loss_of(x.cpu(), tp.Clusters(*(None if v is None else v.cpu() for v in clusters))).item()
    assert clusters.inertia.item() == pytest.approx(exact, rel=1e-5)
    medoids = run("kmedoids", backend, x, 2, init="strided")
    for j in range(2):
        members = x[medoids.assignment == j].double()
        nearest = (members - members.mean(0)).square().sum(1).min()
        chosen = (medoids.centers[0, j].double() - members.mean(0)).square().sum()
        assert chosen <= nearest + (2e-7) ** 2, "the member nearest to the mean, within the rounding of a mean"


@pytest.mark.parametrize("n", [257, 10_007])
def test_sums_of_one_sign_do_not_drift(exact, n):
    """Equal numbers are rounded in the same direction each time they are added."""
    x = torch.linspace(0.1, 0.9, 16).repeat(1, n, 1)
    x[:, 0] = 0
    label = torch.zeros(1, n, dtype=torch.int64)
    mean = x.double().mean(1)
    for got in (run("kmeans", exact, x, 1, num_iters=1).centers, tp.pool(x, label, 1, backend=exact.name)):
        torch.testing.assert_close(got[:, 0].double(), mean, rtol=1e-6, atol=0)
    centers = torch.zeros(1, 1, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(tp.unpool(centers, label, backend=exact.name), centers, x)
    torch.testing.assert_close(grad[:, 0].double(), mean * n, rtol=1e-6, atol=0)


@pytest.mark.parametrize("queries, keys", [(4096, 16), (16, 4096)])
def test_scores_of_many(exact, queries, keys):
    """The same query, or the same key, again and again."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 1, 4, generator=generator).expand(2, 3, queries, 4)
    k = torch.randn(2, 3, keys, 4, generator=generator)
    if keys > queries:
        k[:, :, 1:] = k[:, :, 1:2]
    want = (q.double() @ k.double().transpose(2, 3) / 2).softmax(3).mean((1, 2))
    for lse in (None, (q.double() @ k.double().transpose(2, 3) / 2).logsumexp(3).float()):
        got = tp.attention_received(q, k, lse=lse, backend=exact.name)
        torch.testing.assert_close(got.double(), want, rtol=1e-6 if lse is None else 3e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- weight zero


@pytest.mark.parametrize("algorithm", CLUSTERINGS)
@pytest.mark.parametrize("far", [1e6, -3e9, 1e30])
def test_a_token_of_weight_zero_moves_nothing(backend, algorithm, far):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 41, 8, generator=generator)
    x[:, 17] = far
    keep = torch.arange(41) != 17
    w = torch.rand(2, 41, generator=generator) + 0.1  # all different: two equal members of a medoid's cluster would tie
    w[:, 17] = 0
    start = torch.arange(10).expand(2, 10)
    x, w, start = (t.to(backend.device) for t in (x, w, start))
    got = run(algorithm, backend, x, 10, weights=w, init=start)
    want = run(algorithm, backend, x[:, keep].contiguous(), 10, weights=w[:, keep].contiguous(), init=start)
    torch.testing.assert_close(got.inertia, want.inertia, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.centers, want.centers, rtol=1e-5, atol=1e-6)
    assert (got.assignment[:, keep] == want.assignment).all()


@pytest.mark.parametrize("algorithm", CLUSTERINGS)
def test_a_start_listens_to_weights(backend, algorithm):
    """A featherweight token far away is no place to begin: what it costs is its weight times its distance."""
    x = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(0)).to(backend.device)
    x[0, 31] = 1e3
    w = torch.full((1, 60), 1e8, device=backend.device)
    w[0, 31] = 1e-8
    for init in ("farthest", "random"):
        generator = torch.Generator(backend.device).manual_seed(0) if init == "random" else None
        clusters = run(algorithm, backend, x, 5, weights=w, init=init, generator=generator, num_iters=1)
        alone = (clusters.assignment == clusters.assignment[0, 31]).sum().item() == 1
        assert not alone, init


# -------------------------------------------------------------------------------------------------- far and long


@pytest.mark.parametrize("shape", [(196, 64, 98), (50, 7, 20)], ids=str)
@pytest.mark.parametrize("far", [1e4, 3e5])
def test_far_groups_are_assigned_exactly(backend, shape, far):
    n, d, k = shape
    images = 1 if backend.interpreted else 4
    x = torch.randn(images, n, d, generator=torch.Generator().manual_seed(1))
    x[:, n // 2 :] += far
    start = torch.arange(k).expand(images, k) * n // k
    exact = torch.cdist(x.double(), x.double().gather(1, start[:, :, None].expand(-1, -1, d)))
    got = run("kmeans", backend, x.to(backend.device), k, init=start.to(backend.device), num_iters=1)
    chosen = exact.gather(2, got.assignment.cpu()[:, :, None])[:, :, 0]
    # Tokens near `far` are themselves rounded to 2^-24 of it; differences of two of them are exact.
    assert (chosen <= exact.amin(2) * (1 + 1e-5) + far * 2.0**-22).all()


@pytest.mark.parametrize("far", [1e3, 1e5])
@pytest.mark.parametrize("kind", ["wide beside narrow", "every length", "halves"])
def test_groups_of_different_width_are_assigned_exactly(exact, kind, far):
    """Where some tokens are far apart, others near each other are told apart no less."""
    n, d, k = 64, 16, 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, n, d, generator=generator)
    if kind == "wide beside narrow":
        x[:, ::2] *= far / 10
        x[:, ::2, 0] += far
    elif kind == "every length":
        x *= torch.logspace(0, torch.tensor(far).log10(), n)[:, None]
    else:
        x[:, ::2, 0] += far
    start = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(16)])
    apart = torch.cdist(x.double(), x.double().gather(1, start[:, :, None].expand(-1, -1, d)))
    for init in (start, x.gather(1, start[:, :, None].expand(-1, -1, d))):
        got = run("kmeans", exact, x, k, init=init, num_iters=1)
        chosen = apart.gather(2, got.assignment[:, :, None])[:, :, 0]
        assert (chosen <= apart.amin(2) * (1 + 1e-3)).all()


@pytest.mark.parametrize("long", [1e4, 1e5, 1e6])
def test_one_long_token_does_not_hide_the_others(backend, long):
    images, lengths = (2, (1, 4)) if backend.interpreted else (40, (1, 2, 3, 5, 8))
    generator = torch.Generator().manual_seed(int(long))
    x = torch.randn(images, 17, 3, generator=generator)
    x[:, 5] *= long
    start = torch.arange(13).expand(images, 13)
    before = None
    for iterations in lengths:
        got = run("kmeans", backend, x.to(backend.device), 13, init=start.to(backend.device), num_iters=iterations)
        loss = got.inertia.cpu().double()
        if before is not None:
            assert (loss <= before * (1 + 1e-5) + 1e-9).all(), "inertia never rises with iterations"
        before = loss
        own = loss_of(x, tp.Clusters(*(None if v is None else v.cpu() for v in got)))
        torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- settling


@pytest.mark.parametrize("algorithm", CLUSTERINGS)
@pytest.mark.parametrize("distinct", [1, 60], ids=lambda n: f"distinct{n}")
def test_repeated_tokens_settle(backend, algorithm, distinct):
    """Fewer distinct tokens than clusters (a white page): assignment and repair must not undo each other for ever."""
    images, n, k = (1, 60, 40) if backend.interpreted else (4, 100, 70)
    x = torch.randn(images, n, 12, generator=torch.Generator().manual_seed(5))
    x[:, min(distinct, n // 2) :] = x[:, :1]
    x = x.to(backend.device)
    lengths = (60, 61) if backend.interpreted else (60, 61, 64)
    many = [run(algorithm, backend, x, k, num_iters=t) for t in lengths]
    for other in many[1:]:
        assert (other.assignment == many[0].assignment).all(), "labels rest on the parity of num_iters"
        assert (other.inertia <= many[0].inertia + 1e-9).all()
    if backend.name in ("cpu", "reference"):
        begun = time.monotonic()
        run(algorithm, backend, x, 70, num_iters=2**31 - 1)
        assert time.monotonic() - begun < 30


# ----------------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("highest, features", [(4, 32), (20, 4)])
def test_ties_of_integers_go_to_the_lowest_index(backend, dtype, highest, features):
    images = 3 if backend.interpreted else 8
    generator = torch.Generator().manual_seed(highest)
    x = torch.randint(-highest, highest + 1, (images, 97, features), generator=generator)
    x[:, :24, 0] = x[:, :24, 0].abs() + 1
    x[:, 24:48] = x[:, :24]
    x[:, 24:48, 0] *= -1  # 24 starts and their mirror images
    x[:, 48:60, 0] = 0  # in the mirror: as far from a start as from its image
    order = torch.randperm(97, generator=generator)
    x = x[:, order]
    start = order.argsort()[:48][torch.randperm(48, generator=generator)].expand(images, -1)
    chosen = x.gather(1, start[:, :, None].expand(-1, -1, features))
    exact = (x[:, :, None] - chosen[:, None]).square().sum(-1)
    lowest = (exact == exact.amin(2, keepdim=True)).long().argmax(2)
    assert ((exact == exact.amin(2, keepdim=True)).sum(2) > 1).sum() >= 12 * images, "there are ties"
    got = run("kmeans", backend, x.to(dtype).to(backend.device), 48, init=start.to(backend.device), num_iters=1)
    # The one iteration ends in a repair of clusters that got no token: duplicates of a start. Leave those images out.
    clean = torch.tensor([len(set(row.tolist())) == 48 for row in lowest])
    assert clean.any() and (got.assignment.cpu()[clean] == lowest[clean]).all()


# ------------------------------------------------------------------------------------------------------- largest


@pytest.mark.one_path
def test_means_of_the_largest_numbers_are_finite(backend):
    most = torch.finfo(torch.float32).max
    x = torch.tensor([most, most * 0.999, -most, most * 0.97, most, most])[:, None].repeat(1, 3).to(backend.device)
    assert tp.kmeans(x, 2, backend=backend.name).centers.isfinite().all()
    pooled = tp.pool(x, torch.zeros(6, dtype=torch.int64, device=backend.device), 1, backend=backend.name)
    torch.testing.assert_close(pooled.double(), x.double().mean(0, keepdim=True), rtol=1e-6, atol=0)
