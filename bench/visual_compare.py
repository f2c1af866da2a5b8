"""``python -m bench.visual_compare``: K tokens instead of N, by every method, on real DINOv2 tokens of photographs.

DINOv2 ViT-S/14 on crops of the demo's photographs at 336 (576 tokens) and 448 pixels (1024), after the last block, as a
language model would get them. Error: sum_i ||x_i - nearest kept vector||^2 over sum_i ||x_i - mean||^2, mean over the
crops. Time: CPU ms an image on one thread, the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import tokenpool_ext as tp

from . import machine


def methods(k: int, grid: tuple[int, int]) -> dict:
    layers = {
        "bipartite": tp.BipartiteMatching(k, num_prefix_tokens=0),
        "top score": tp.ScorePruning(k, num_prefix_tokens=0),
        "grid": tp.GridPooling(k, num_prefix_tokens=0, grid_size=grid),
        "random": tp.RandomSelection(k, num_prefix_tokens=0, seed=0),
    }

    def selected(x, scores):
        return x.gather(1, tp.select(x, k)[0][..., None].expand(-1, -1, x.shape[2]))

    found = {"K-Means (compress)": lambda x, scores: tp.compress(x, k, grid=grid).tokens}
    found["K-Medoids (select)"] = selected
    for name, layer in layers.items():
        found[name] = lambda x, scores, layer=layer: layer(x, scores) if layer.needs_scores else layer(x)
    return found


def error(x: torch.Tensor, vectors: torch.Tensor) -> float:
    x, vectors = x.double(), vectors.double()
    nearest = torch.cdist(x, vectors).amin(2).square().sum(1)
    return float((nearest / (x - x.mean(1, keepdim=True)).square().sum((1, 2))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    from tokenpool_ext.demo.tokens import real_tokens

    torch.set_num_threads(1)
    rows = []
    for size in (336, 448):
        x, scores = real_tokens(options.images, 12, with_scores=True, image_size=size)
        side = size // 14
        for k in (64, 128, 192):
            calls = methods(k, (side, side))
            seconds: dict = {name: [] for name in calls}
            vectors = {}
            for _ in range(options.rounds):
                for name, call in calls.items():
                    start = time.process_time()
                    vectors[name] = call(x, scores)
                    seconds[name].append((time.process_time() - start) / len(x))
            for name in calls:
                row = {"tokens": side * side, "kept": k, "method": name, "error": round(error(x, vectors[name]), 4)}
                row["cpu_ms_image"] = round(median(seconds[name]) * 1e3, 3)
                rows.append(row)
                print(row, flush=True)
    if options.json:
        facts = machine.stamp("bench.visual_compare") | {"images": options.images, "records": rows}
        machine.write(options.json, facts)


if __name__ == "__main__":
    main()
