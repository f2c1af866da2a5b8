"""``python -m bench.evidence positions``: does clustering on places too keep more of DINOv2 ViT-S/14's features?

The strength is chosen on crops of the demo's photographs: the largest mean cosine to the unpooled features, of the
class token and of every patch (each patch has its cluster's final token), over all keep ratios. Then it is tested,
against clustering without places, on crops of pictures that nothing was chosen with. Three blocks pool, the rest is
default. Intervals take crops as independent, which those of one picture are not: they are too narrow.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from tokenpool_ext import patch, unpatch
from tokenpool_ext.demo.pretrained import load_dinov2_small

from . import data

WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
RATIOS = (0.7, 0.5, 0.3)


def features(model, pixels) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(pixels[part]).last_hidden_state for part in data.batches(len(pixels), 8)])


def cosines(model, pixels, whole, ratio: float, weight: float) -> torch.Tensor:
    """(2, crops): of the class token, and mean of the patches."""
    patch(model, keep_ratio=ratio, position_weight=weight)
    cosine = F.cosine_similarity(features(model, pixels), whole, dim=2)
    unpatch(model)
    return torch.stack([cosine[:, 0], cosine[:, 1:].mean(1)])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence positions", description=__doc__)
    parser.add_argument("--crops", type=int, default=24)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, rows, best = load_dinov2_small(), [], None
    for pictures in ("demo", "held back"):
        pixels = data.crops(args.crops, held_out=pictures == "held back", seed=1)
        whole = features(model, pixels)
        plain, means = {}, {}
        for weight in WEIGHTS if best is None else (0.0, best):
            for ratio in RATIOS:
                found = cosines(model, pixels, whole, ratio, weight)
                plain.setdefault(ratio, found)
                means[weight] = means.get(weight, 0) + found.mean().item()
                row = {"pictures": pictures, "position_weight": weight, "ratio": ratio}
                for name, now, before in zip(("class", "patches"), found, plain[ratio]):
                    row[name] = round(now.mean().item(), 4)
                    row |= data.difference(f"{name}_gain", now - before)
                rows.append(row)
                print(row, flush=True)
        best = best or max((w for w in means if w), key=means.get)
    print(data.save("positions", {"crops": args.crops, "chosen": best}, {"records": rows}))
    return 0
