"""What the studies of bench/evidence stand on: intervals, budgets, and attention as a Gaussian filter."""

from __future__ import annotations

import pytest
import torch


def test_attention_is_a_gaussian_filter_of_the_values_for_keys_of_one_norm():
    """softmax(q.k / sqrt(d)) v = normalised sum of exp(-|q - k|^2 / (2 sqrt(d))) v when |k| is constant; for other
    keys after adding |k|^2 / (2 sqrt(d)) to the logits."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(50, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    root = 16**0.5

    def errors(k):
        gaussian = torch.exp(-torch.cdist(q, k).square() / (2 * root))
        gaussian = gaussian / gaussian.sum(1, keepdim=True)
        logits = q @ k.T / root
        plain, mended = logits.softmax(1), (logits - k.square().sum(1) / (2 * root)).softmax(1)
        assert (mended @ v - gaussian @ v).abs().max() < 1e-13
        return (plain - gaussian).abs().max()

    unit = 4 * torch.nn.functional.normalize(k, dim=1)
    assert errors(unit) < 1e-14
    assert errors(unit * torch.linspace(0.5, 1.5, 50, dtype=torch.float64)[:, None]) > 0.01


def test_keep_ratios_meet_the_budget():
    from bench.evidence import methods

    for position in ("attention", "block"):
        whole = methods.macs(1.0, 256, 384, position)
        for budget in methods.BUDGETS:
            ratio = methods.ratio_for(budget, 256, 384, position)
            assert methods.macs(ratio, 256, 384, position) / whole == pytest.approx(budget, abs=0.01)
    # 12 blocks of 257 tokens of 384 features: 12 N M^2 + 2 N^2 M each
    assert methods.macs(1.0, 256, 384) == 12 * (12 * 257 * 384**2 + 2 * 257**2 * 384)


def test_bootstrap_interval():
    data = pytest.importorskip("bench.evidence.data")
    n = 400
    differences = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    low, high = data.interval(differences)
    mean, half = differences.mean().item(), 1.96 * differences.std().item() / n**0.5
    assert low == pytest.approx(mean - half, abs=0.01) and high == pytest.approx(mean + half, abs=0.01)
    assert data.interval(torch.zeros(5)) == (0.0, 0.0)


def test_every_table_and_figure_is_what_the_records_make():
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    from bench.evidence import report

    text = report.DOCUMENT.read_text()
    assert report.stale(text) == []
    assert report.stale(text.replace("| deit-ti | 1.254 |", "| deit-ti | 1.255 |")) == ["table cost"]


def test_relative_errors():
    from bench.evidence import capture

    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    w = torch.rand(2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centers = x[:, :7] + 0.1
    nearest = torch.cdist(x, centers).square().amin(2)
    for weights, found in zip((torch.ones_like(w), w), capture.relative_errors(x, centers, (None, w))):
        mean = (weights[:, :, None] * x).sum(1, keepdim=True) / weights.sum(1)[:, None, None]
        expected = (weights * nearest).sum(1) / (weights * (x - mean).square().sum(2)).sum(1)
        torch.testing.assert_close(found, expected)
    means = x.mean(1, keepdim=True)
    torch.testing.assert_close(capture.relative_errors(x, means, (None,))[0], torch.ones(2, dtype=torch.float64))


def test_first_picks_for_many_clusters_are_those_for_few():
    pytest.importorskip("skimage")
    from bench.evidence import reconstruction

    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    w = torch.rand(2, 40, generator=torch.Generator().manual_seed(1))
    for start in reconstruction.NESTED:
        for weights in (None, w):
            many = reconstruction.begin(x, 30, weights, start)
            assert torch.equal(many[:, :7], reconstruction.begin(x, 7, weights, start)), start


def test_reciprocal_ranks():
    pytest.importorskip("skimage")
    from bench.evidence.text import reciprocal_ranks

    gallery = torch.eye(4)
    queries = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.5, 0.6, 0.0]])
    assert reciprocal_ranks(queries, gallery, gallery[:2]).tolist() == [1.0, 0.5]
    # the document itself in its unpooled form is no rival
    assert reciprocal_ranks(queries, gallery, 0.5 * gallery[:2]).tolist() == [1.0, 0.5]
    assert reciprocal_ranks(queries, gallery, 0.0 * gallery[:2]).tolist()[0] == 0.5
