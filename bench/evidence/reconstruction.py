"""``python -m bench.evidence reconstruction``: how well K tokens stand for the 256 of every layer of DINOv2 ViT-S/14.

Relative reconstruction error ``sum_i min_j |x_i - c_j|^2 / sum_i |x_i - mean|^2`` of the tokens that come out, on crops
of pictures that nothing was chosen with; also weighted by attention received. Every block's output, five keep rates,
and every start x iterations x weighted or not x what is emitted x what is clustered (keys: 0 and 5 iterations). No
iteration: the start itself. Time is CPU time of one thread for the call, its start included.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch

import tokenpool_ext as tp
from tokenpool_ext.demo.pretrained import load_dinov2_small
from tokenpool_ext.matching import match
from tokenpool_ext.starts import initial

from . import capture, data

RATES = (0.9, 0.7, 0.5, 0.3, 0.1)
DRAWN = ("random", "kmeans++")  # drawn once for all rates, iterations and emits
NESTED = ("topk", "farthest", *DRAWN)  # the first picks for a larger K are those for a smaller one
STARTS = ("strided", "topk", "random", "kmeans++", "farthest", "bipartite")
ITERATIONS = (0, 1, 2, 5, 20)
EMITS = {"mean": (tp.kmeans, None), "medoid": (tp.kmedoids, None), "medoid's mean": (tp.kmedoids, "mean")}
OTHERS = {
    "bipartite (ToMe)": lambda k: tp.BipartiteMatching(k, num_prefix_tokens=0),
    "grid": lambda k: tp.GridPooling(k, num_prefix_tokens=0),
}


def begin(on, k: int, weights, start: str):
    """(B, K) token indices that the library starts from; "bipartite" has the tokens that others are merged into."""
    return initial(start, on, k, weights, None, None, torch.Generator().manual_seed(0), True)


def cluster(emit: str, x, on, k: int, weights, start: str, picks, iterations: int):
    """(B, K, D) tokens that come out; `on` is clustered, tokens `x` are emitted. `picks`: the start's tokens."""
    algorithm, rule = EMITS[emit]
    if iterations:
        init = picks if start in DRAWN else start
        found = algorithm(on, k, weights=weights, init=init, num_iters=iterations)
        if rule is None and on is x:
            return found.centers
        if emit == "medoid":
            return rows(x, found.medoids)
        return tp.pool(x, found.assignment, k, weights=weights)
    if start == "bipartite" and emit == "mean":
        return tp.pool(x, match(on, k)[0], k, weights=weights)
    if emit == "medoid's mean":
        return tp.pool(x, tp.assign(on, rows(on, picks)), k, weights=weights)
    return rows(x, picks)


def rows(x, index):
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def timed(call):
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


class Sums:
    """Sums over layers of what is recorded of one way: errors and seconds by iterations (rows) and rate (columns)."""

    def __init__(self, rows_: int):
        self.error, self.weighted, self.seconds = (torch.zeros(rows_, len(RATES), dtype=torch.float64) for _ in "123")

    def add(self, row: int, column: int, x, scores, centers, seconds: float):
        """Also returns the errors (B,), plain and weighted."""
        errors = capture.relative_errors(x, centers, (None, scores))
        self.error[row, column] += errors[0].mean()
        self.weighted[row, column] += errors[1].mean()
        self.seconds[row, column] += seconds / len(x)
        return errors

    def record(self, layers: int, **about) -> dict:
        def mean(table, scale, digits):
            return [[round(v / layers * scale, digits) for v in row] for row in table.tolist()]

        half = [row[RATES.index(0.5)] for row in mean(self.seconds, 1e3, 3)]
        return {
            **about,
            "error": mean(self.error, 1, 3),
            "weighted_error": mean(self.weighted, 1, 3),
            "ms_at_half": half,
        }


def study(layers: list[capture.Layer], say) -> tuple[list[dict], list[dict], list[dict]]:
    """Records of the ways (mean over layers and images), of a few by layer, and of the default against ToMe."""
    sums, by_layer = {}, []
    compared = {rate: {} for rate in RATES if rate >= 0.5}
    for number, layer in enumerate(layers):
        x = layer.after[:, 1:].contiguous()
        scores = layer.attention().mean((1, 2))[:, 1:].contiguous()
        keys = layer.k.mean(1)[:, 1:].contiguous()
        shown = {}
        chosen = {}
        for column, rate in enumerate(RATES):
            k = round(rate * x.shape[1])
            tome = ()
            for name, make in OTHERS.items():
                centers, seconds = timed(lambda: make(k)(x, features=keys))
                table = sums.setdefault(("keys", False, name, ""), Sums(1))
                errors = table.add(0, column, x, scores, centers, seconds)
                shown.setdefault(name, []).append(errors[0].mean().item())
                tome = tome or errors
            for clustered, weighted, start in product(("tokens", "keys"), (False, True), STARTS):
                if start == "bipartite" and 2 * k < x.shape[1]:
                    continue
                on, weights = x if clustered == "tokens" else keys, scores if weighted else None
                if start not in NESTED or not column:
                    chosen[clustered, weighted, start] = *timed(lambda: begin(on, k, weights, start)), k
                picks, drawing, most = chosen[clustered, weighted, start]
                picks, drawing = picks[:, :k], drawing * k / most if start in DRAWN else 0.0
                for emit, (row, count) in product(EMITS, enumerate(ITERATIONS)):
                    if clustered == "keys" and count not in (0, 5):
                        continue
                    table = sums.setdefault((clustered, weighted, start, emit), Sums(len(ITERATIONS)))
                    centers, seconds = timed(lambda: cluster(emit, x, on, k, weights, start, picks, count))
                    errors = table.add(row, column, x, scores, centers, drawing + seconds)
                    if (clustered, emit, count) != ("tokens", "mean", 5):
                        continue
                    if start == "farthest":
                        shown.setdefault("WK-Means" if weighted else "K-Means", []).append(errors[0].mean().item())
                    if start in ("farthest", "bipartite") and rate in compared:
                        compared[rate].setdefault((start, weighted), []).append(errors[weighted] / tome[weighted])
        by_layer += [{"layer": number, "way": way, "error": [round(e, 4) for e in line]} for way, line in shown.items()]
        say(f"layer {number} of {len(layers)} done")
    names = ("clustered", "weighted", "start", "emit")
    ways = [table.record(len(layers), **dict(zip(names, way))) for way, table in sums.items()]
    against = []
    for rate, found in compared.items():
        for (start, weighted), ratios in found.items():
            ratios = torch.cat(ratios)
            line = {"rate": rate, "start": start, "weighted": weighted, "pairs": len(ratios)}
            above = int((ratios > 1 + 1e-5).sum())
            against.append(
                {**line, "above": above, "mean": round(ratios.mean().item(), 3), "worst": round(ratios.max().item(), 3)}
            )
    return ways, by_layer, against


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence reconstruction", description=__doc__)
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pixels = data.crops(args.crops, held_out=True)
    layers = capture.layers(load_dinov2_small(), pixels)[: args.layers]
    ways, by_layer, against = study(layers, lambda line: print(line, flush=True))
    about = {"crops": len(pixels), "tokens": 256, "rates": RATES, "iterations": ITERATIONS}
    print(data.save("reconstruction", about, {"ways": ways, "layers": by_layer, "against ToMe": against}))
    return 0
