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


def test_weighted_farthest():
    from bench.evidence.methods import weighted_farthest

    x = torch.tensor([[[0.0], [1.0], [5.0], [9.0]]])
    # heaviest first; then w d^2 = 100 at 1.0 against 25 and 8.1
    assert weighted_farthest(x, 3, torch.tensor([[101.0, 100.0, 1.0, 0.1]])).tolist() == [[0, 1, 2]]
    assert weighted_farthest(x, 2, torch.tensor([[2.0, 1.0, 1.0, 1.0]])).tolist() == [[0, 3]]
