"""`assign`: labels for fixed centers. Right values from float64; where two centers are equally near, by reasoning."""

import pytest
import torch
from helpers import DTYPES, assert_identical, integer_tokens, tokens

import tokenpool_ext as tp
from tokenpool_ext import loader
from tokenpool_ext.backends import REGISTRY


def expected(x, centers):
    """argmin in float64, ties to the lowest index: differences, so nothing cancels."""
    x, centers = x.double().cpu(), centers.double().cpu()
    apart = torch.stack([(x - centers[:, j : j + 1]).square().sum(-1) for j in range(centers.shape[1])], -1)
    return apart.argmin(-1)


def labels(x, centers, backend, **given):
    reason = REGISTRY[backend.name].why_not("assign", x)
    if reason:
        pytest.skip(reason)
    return tp.assign(x, centers, backend=backend.name, **given)


@pytest.mark.one_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,d,k", [(1, 1, 1), (37, 7, 5), (50, 3, 120), (130, 200, 40), (70, 33, 65)])
def test_is_the_nearest_center(backend, n, d, k, dtype):
    x = tokens(2, n, d, dtype, backend.device, seed=n)
    centers = tokens(2, k, d, dtype, backend.device, seed=k)
    assert_identical(labels(x, centers, backend).cpu(), expected(x, centers))


@pytest.mark.one_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(backend, dtype):
    x = integer_tokens(3, 64, 5, dtype, backend.device, low=-1, high=2)
    centers = integer_tokens(3, 40, 5, dtype, backend.device, seed=1, low=-1, high=2)  # many equal and equally near
    assert_identical(labels(x, centers, backend).cpu(), expected(x, centers))
    rounded = tokens(3, 64, 17, dtype, backend.device), tokens(3, 41, 17, dtype, backend.device, seed=1)
    for y, given in ((x, centers), rounded):
        doubled = torch.cat([given, given], 1)
        assert_identical(labels(y, doubled, backend), labels(y, given, backend))


@pytest.mark.one_path
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_far_from_zero_and_one_center_far_from_all(backend, offset):
    if backend.device != "cpu":
        pytest.skip("composed of float32 products there")
    x = tokens(2, 90, 24, offset=offset, groups=6, device=backend.device)
    centers = torch.cat([x[:, ::7] + 0.01, x[:, :1] * 1e5, x[:, :3]], 1)
    assert_identical(labels(x, centers, backend), expected(x, centers))


@pytest.mark.one_path
@pytest.mark.parametrize("far", [1e200, 1.7e308, float("inf"), float("nan")])
def test_a_center_whose_square_overflows_hides_no_other(backend, far):
    if backend.device != "cpu" or backend.name == "triton":
        pytest.skip("no float64 there")
    x, centers = tokens(2, 41, 9, torch.float64), tokens(2, 12, 9, torch.float64, seed=1)
    want = expected(x, centers)
    for place in (0, 5, 12):
        beside = torch.cat([centers[:, :place], torch.full((2, 1, 9), far, dtype=torch.float64), centers[:, place:]], 1)
        assert_identical(labels(x, beside, backend), want + (want >= place))


@pytest.mark.one_path
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 2e37])
def test_tiny_and_huge_numbers(backend, size):
    if backend.device != "cpu":
        pytest.skip("squares in float32 vanish or overflow there")
    x, centers = tokens(2, 41, 9) * size, tokens(2, 12, 9, seed=1) * size
    assert_identical(labels(x, centers, backend), expected(x, centers))
    mixed = torch.cat([centers, centers * 1e-6], 1)
    assert_identical(labels(x, mixed, backend), expected(x, mixed))


@pytest.mark.one_path
def test_what_is_not_a_number_is_never_nearest(backend):
    x, centers = tokens(1, 20, 4, device=backend.device), tokens(1, 6, 4, device=backend.device, seed=1)
    bad = centers.clone()
    bad[0, 1, 2], bad[0, 4] = torch.nan, torch.inf
    rest = torch.tensor([0, 2, 3, 5])
    assert_identical(labels(x, bad, backend).cpu(), rest[expected(x, centers[:, rest.to(x.device)])])
    x[0, 3, 1] = torch.nan
    found = labels(x, bad, backend)
    assert 0 <= found[0, 3] < 6
    assert (labels(x, torch.full_like(centers, torch.nan), backend) == 0).all()


@pytest.mark.one_path
def test_padding_and_strides_and_no_batch(backend):
    x, centers = tokens(2, 30, 8, device=backend.device), tokens(2, 5, 8, device=backend.device, seed=1)
    mask = torch.arange(30, device=backend.device) < torch.tensor([[30], [11]], device=backend.device)
    whole = labels(x, centers, backend)
    spoiled = torch.where(mask[:, :, None], x, torch.nan)
    assert_identical(labels(spoiled, centers, backend, mask=mask), torch.where(mask, whole, -1))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_identical(labels(turned, centers, backend), whole)
    assert_identical(labels(x[1], centers[1], backend), whole[1])
    assert labels(x[:, :0], centers, backend).shape == (2, 0)
    assert (labels(x[:, :, :0], centers[:, :, :0], backend) == 0).all()


@pytest.mark.one_path
@pytest.mark.large
def test_new_points_of_known_clusters(backend):
    """The labels of k-means' own points, and of others, by its centers."""
    x = tokens(1, 3000, 16, groups=20, device=backend.device)[0]
    found = tp.kmeans(x[:2000], 20, num_iters=100, backend=backend.name)
    assert (labels(x[:2000], found.centers, backend) == found.assignment).all()
    assert_identical(labels(x, found.centers, backend).cpu(), expected(x[None], found.centers[None])[0])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.skipif(loader.extension is None, reason=str(loader.ops_reason))
def test_every_instruction_set_and_number_of_threads(isa, monkeypatch, threads):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_ISA", isa)
    try:
        loader.extension.build_info()
    except RuntimeError as error:
        pytest.skip(str(error))
    for dtype in DTYPES:
        x, centers = tokens(3, 700, 37, dtype), tokens(3, 131, 37, dtype, seed=1)
        right = expected(x, centers)
        for count in (1, 2, 3):
            threads(count)
            assert_identical(tp.assign(x, centers, backend="cpu"), right)
            assert_identical(tp.assign(x[:1], centers[:1], backend="cpu"), right[:1])


@pytest.mark.parametrize(
    "changed,error,texts",
    [
        ({"centers": [1.0]}, TypeError, ["centers", "list"]),
        ({"centers": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, ["centers", "int64"]),
        ({"centers": torch.ones(3, 4)}, ValueError, ["centers", "(B, K, D)", "(3, 4)"]),
        ({"centers": torch.ones(2, 3, 5)}, ValueError, ["centers", "K, 4", "(2, 3, 5)"]),
        ({"centers": torch.ones(3, 3, 4)}, ValueError, ["centers", "(3, 3, 4)"]),
        ({"centers": torch.ones(2, 0, 4)}, ValueError, ["centers", "at least one"]),
        ({"mask": torch.ones(2, 7)}, TypeError, ["mask"]),
        ({"x": torch.ones(4)}, ValueError, ["x", "(4,)"]),
    ],
)
def test_wrong_arguments(changed, error, texts):
    with pytest.raises(error) as caught:
        tp.assign(**{"x": torch.ones(2, 7, 4), "centers": torch.ones(2, 3, 4), **changed})
    assert all(text in str(caught.value) for text in ["assign", *texts])


def test_compiled_exported_and_mapped():
    x, centers = tokens(2, 20, 4), tokens(2, 5, 4, seed=1)
    right = expected(x, centers)
    assert_identical(torch.compile(tp.assign, fullgraph=True, backend="aot_eager")(x, centers), right)

    class Module(torch.nn.Module):
        def forward(self, x, centers):
            return tp.assign(x, centers)

    assert_identical(torch.export.export(Module(), (x, centers)).module()(x, centers), right)
    assert_identical(torch.vmap(tp.assign)(x[:, None], centers[:, None])[:, 0], right)
