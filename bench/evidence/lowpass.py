"""``python -m bench.evidence lowpass``: is attention a low-pass filter in the layers of a real DINOv2 ViT-S/14?

Means over crops of pictures that nothing was chosen with, by layer; A is a head's attention matrix, V its values. The
paper (arXiv 2110.03860) says that softmax attention is a Gaussian low-pass filter if keys and queries are normalised.

key_norm_cv       deviation of |k_i| over its mean, in a head: 0 where the assumption holds
gap, gap_max      half the sum of |A - G| over a row, its mean; the largest entry of |A - G|: G is the Gaussian kernel
                  exp(-|q - k|^2 / (2 sqrt(d))), rows summing to 1
error             relative K-Means error at 64 of 256 tokens (farthest-first, 5 iterations)
energy            mean |f_i - f_j|^2 over neighbours on the grid, over that of any two tokens: 1 is no smoothness
neighbours        mean distance to the 5 nearest tokens over the root of the mean squared distance of any two
high              share of the grid's Fourier energy, without the mean, above a quarter of a cycle a token
top, rank         largest singular value of A; its effective rank, exp(entropy of the squared singular values)

Signals: v; av; av_shuffled (A times the values of patches in random order: what mixing does to any values);
before, middle, after (the residual stream that enters, with attention added, that leaves). Control: the same network
with random weights. A uniform A makes all tokens equal (every error 0), an identity A changes nothing (AV = V).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import tokenpool_ext as tp
from tokenpool_ext.demo.pretrained import build_dinov2, load_dinov2_small

from . import capture, data

SIDE, KEPT = 16, 64


def kmeans_error(x: Tensor) -> Tensor:
    """(B,) relative error of x (B, N, D) at KEPT centers."""
    return capture.relative_errors(x, tp.kmeans(x.contiguous(), KEPT).centers, (None,))[0]


def spread(x: Tensor) -> Tensor:
    """(B,) mean |x_i - x_j|^2 of two tokens drawn at random."""
    return 2 * (x - x.mean(1, keepdim=True)).square().sum(2).mean(1)


def dirichlet(x: Tensor) -> Tensor:
    grid = x.unflatten(1, (SIDE, SIDE))
    steps = [grid.diff(dim=axis).square().sum(3).flatten(1) for axis in (1, 2)]
    return torch.cat(steps, 1).mean(1) / spread(x)


def neighbours(x: Tensor) -> Tensor:
    distance = torch.cdist(x, x).diagonal_scatter(x.new_full(x.shape[:2], torch.inf), dim1=1, dim2=2)
    return distance.topk(5, dim=2, largest=False).values.mean((1, 2)) / spread(x).sqrt()


def high(x: Tensor) -> Tensor:
    power = torch.fft.fft2(x.unflatten(1, (SIDE, SIDE)), dim=(1, 2)).abs().square().sum(3)
    cycles = torch.fft.fftfreq(SIDE).square()
    radius = (cycles[:, None] + cycles).sqrt()
    power = torch.where(radius > 0, power, 0)
    return (power * (radius > 0.25)).sum((1, 2)) / power.sum((1, 2))


MEASURES = {"error": kmeans_error, "energy": dirichlet, "neighbours": neighbours, "high": high}


def measures(layer: capture.Layer) -> dict:
    """Everything said of one layer, means over images (and heads)."""
    q, k, v, attention = layer.q, layer.k, layer.v, layer.attention()
    norm = k.norm(dim=3)
    gaussian = (-torch.cdist(q, k).square() / (2 * q.shape[3] ** 0.5)).softmax(3)
    gap = (attention - gaussian).abs()
    order = 1 + torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([v[:, :, :1], v[:, :, order]], 2)
    signals = {"v": v, "av": attention @ v, "av_shuffled": attention @ shuffled}
    signals = {name: s.transpose(1, 2).flatten(2) for name, s in signals.items()}
    signals |= {"before": layer.before, "middle": layer.middle, "after": layer.after}
    values = torch.linalg.svdvals(attention)
    share = values.square() / values.square().sum(2, keepdim=True)
    by_head = [kmeans_error(s[:, :, 1:].flatten(0, 1)) for s in (v, attention @ v)]
    found = {
        "key_norm_cv": norm.std(2, correction=0) / norm.mean(2),
        "gap": gap.sum(3) / 2,
        "gap_max": gap.amax((2, 3)),
        "top": values[:, :, 0],
        "rank": torch.special.entr(share).sum(2).exp(),
        "heads_smoother": (by_head[1] < by_head[0]).float(),
    }
    found = {name: round(value.mean().item(), 4) for name, value in found.items()}
    for measure, function in MEASURES.items():
        found[measure] = {name: round(function(s[:, 1:]).mean().item(), 4) for name, s in signals.items()}
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence lowpass", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--crops", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = data.crops(args.crops, held_out=True)
    rows = []
    for name, model in (("DINOv2", load_dinov2_small()), ("random weights", build_dinov2())):
        for number, layer in enumerate(capture.layers(model, pixels)):
            rows.append({"model": name, "layer": number, **measures(layer)})
            print(rows[-1], flush=True)
    print(data.save("lowpass", {"crops": len(pixels), "kept": KEPT}, {"records": rows}))
    return 0
