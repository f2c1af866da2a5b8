"""Position-aware clustering: `position_weight` of TokenPooling, patch and compress."""

from __future__ import annotations

import pytest
import torch

import tokenpool_ext as tp
from tokenpool_ext.positions import grid_positions, with_positions
from tokenpool_ext.ragged import stacked


def spread(x):
    return (x - x.mean(-2, keepdim=True)).square().sum(-1).mean(-1).sqrt()


def grid(n: int, batch: int = 1):
    return grid_positions(n, torch.device("cpu")).expand(batch, -1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_coordinates_spread_as_far_as_asked(dtype, size):
    torch.manual_seed(0)
    x = torch.randn(2, 36, 5, dtype=dtype) * size + size
    for positions in (grid(36, 2), 1000 * grid(36, 2) - 7):  # the unit does not matter
        out = with_positions(x, positions, 0.5)
        assert out.dtype == dtype and torch.equal(out[..., :5], x)
        error = 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(spread(out[..., 5:].double()), 0.5 * spread(x.double()), rtol=error, atol=0)
    same = with_positions(x, torch.ones(2, 36, 2), 3.0)
    assert (same[..., 5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [50.0, 1e6, 1e30, 1e38, 1e300])
def test_a_weight_of_any_size_clusters_by_place(dtype, weight):
    """Three groups of places, whatever the tokens say; the spread of these times 50 is more than float16 holds."""
    torch.manual_seed(0)
    x = (60 * torch.randn(2, 48, 256)).to(dtype)
    group = torch.arange(48) % 3
    places = (100.0 * group[:, None] + torch.rand(48, 2)).expand(2, 48, 2)
    assert with_positions(x, places, weight).isfinite().all()
    merged = tp.compress(x, 3, positions=places, position_weight=weight, scores=torch.rand(2, 48))
    layer = tp.TokenPooling(3, num_prefix_tokens=0, position_weight=weight, return_clusters=True)
    for labels in (merged.assignment, layer(x, positions=places)[1].assignment):
        assert all(len(labels[b][group == j].unique()) == 1 for b in range(2) for j in range(3))
    assert merged.tokens.dtype == dtype and merged.tokens.isfinite().all()


@pytest.mark.parametrize("features, coordinates", [(0, 2), (3, 0), (0, 0)])
def test_tokens_without_features_and_places_without_coordinates(features, coordinates):
    x, positions = torch.ones(2, 16, features), torch.ones(2, 16, coordinates)
    assert torch.equal(with_positions(x, positions, 1.0)[..., :features], x)
    assert tp.compress(x, 4, positions=positions, position_weight=1.0).tokens.shape == (2, 4, features)
    layer = tp.TokenPooling(4, num_prefix_tokens=0, position_weight=1.0)
    assert layer(x, positions=positions).shape == (2, 4, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_image_has_the_same_bits_alone_and_padded(dtype):
    """Sums over padded rows were split otherwise: the last bits of the spread, and so of the coordinates, differed."""
    torch.manual_seed(0)
    for features in (3, 48, 384):
        images = [torch.randn(n, features).add(2).to(dtype) for n in (555, 180, 67, 301)]
        places = [20 * torch.rand(len(x), 2) for x in images]
        mask = torch.arange(555) < torch.tensor([len(x) for x in images])[:, None]
        padded = with_positions(stacked(images), stacked(places), 0.7, mask)
        for out, x, p in zip(padded, images, places):
            assert torch.equal(out[: len(x)], with_positions(x[None], p[None], 0.7)[0])


def test_padding_has_no_part_in_the_spreads():
    torch.manual_seed(0)
    x, positions = torch.randn(1, 16, 4), grid(16)
    mask = torch.arange(20)[None] < 16
    padded = torch.cat([x, torch.full((1, 4, 4), torch.nan)], 1)
    places = torch.cat([positions, torch.full((1, 4, 2), 1e9)], 1)
    out = with_positions(padded, places, 2.0, mask)
    torch.testing.assert_close(out[:, :16], with_positions(x, positions, 2.0))
    assert out[:, 16:, 4:].isfinite().all()


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_token_pooling_finds_neighbours(algorithm):
    torch.manual_seed(0)
    x = torch.randn(2, 65, 8, requires_grad=True)
    positions = torch.cat([torch.zeros(2, 1, 2), grid(64, 2)], 1)
    scores = torch.rand(2, 65)

    def layer(weight):
        return tp.TokenPooling(16, algorithm=algorithm, position_weight=weight, return_clusters=True)

    def width(clusters):  # how far a token is from the middle of its cluster
        places = grid(64, 2)
        return (places - tp.unpool(tp.pool(places, clusters.assignment, 16), clusters.assignment)).norm(dim=2).mean()

    plain, far = layer(0.0)(x, scores)[1], layer(50.0)(x, scores, positions=positions)[1]
    assert width(far) < 0.4 * width(plain)
    tokens, clusters = layer(1.0)(x, scores, positions=positions[:, 1:])
    if algorithm == "kmeans":  # means of the tokens alone
        expected = tp.pool(x[:, 1:], clusters.assignment, 16, weights=scores[:, 1:].contiguous())
        torch.testing.assert_close(tokens[:, 1:], expected)
    tokens.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(layer(0.0)(x, scores, positions=positions)[0], layer(0.0)(x, scores)[0])


def test_what_is_wrong_is_named():
    x = torch.randn(1, 17, 4)
    with pytest.raises(ValueError, match="position_weight=1 needs positions, got None"):
        tp.TokenPooling(4, position_weight=1.0)(x)
    for wrong, error in ((-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="position_weight must be"):
            tp.TokenPooling(4, position_weight=wrong)
    with pytest.raises(ValueError, match="needs positions or grid"):
        tp.compress(x, 4, position_weight=1.0)
    with pytest.raises(ValueError, match="no square grid"):
        grid_positions(17, torch.device("cpu"))
    assert "position_weight=0.5" in repr(tp.TokenPooling(4, position_weight=0.5))


def test_compress():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 8)
    plain = tp.compress(x, 16, grid=(8, 8), position_weight=0.0)
    found = tp.compress(x, 16, grid=(8, 8), position_weight=50.0)
    assert found.tokens.shape == (2, 16, 8)
    torch.testing.assert_close(found.tokens, tp.pool(x, found.assignment, 16))

    def width(result):
        return (grid(64, 2) - tp.unpool(result.positions, result.assignment)).norm(dim=2).mean()

    assert width(found) < 0.4 * width(plain)
    again = tp.compress(x, 16, positions=3 * grid(64, 2), position_weight=50.0)
    assert torch.equal(again.assignment, found.assignment)


@pytest.mark.parametrize("protect", [None, [-1]])
def test_patch(protect):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    side = 6
    config = transformers.ViTConfig(
        image_size=8 * side, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.ViTModel(config).eval()
    pixels = torch.randn(2, 3, 8 * side, 8 * side)
    free = side * side - (protect is not None)
    places = grid(side * side)[0][:free]

    def width(**options):
        tp.patch(model, num_tokens={0: 20, 1: 9}, protect=protect, **options)
        with torch.no_grad(), tp.vit.record(model) as r:
            assert model(pixels).last_hidden_state.isfinite().all()
        labels = r.assignment
        return (places - tp.unpool(tp.pool(places.expand(2, -1, -1), labels, 9), labels)).norm(dim=2).mean()

    near = width(position_weight=50.0, positions=places)
    assert near < 0.6 * width()
    if protect is None:
        assert width(position_weight=50.0) == near  # a square grid is the default
    with pytest.raises(ValueError, match=f"positions must be of the {free} tokens that may be pooled, got 3"):
        width(position_weight=1.0, positions=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="positions must be finite"):
        tp.patch(model, position_weight=1.0, positions=torch.full((free, 2), torch.nan))
