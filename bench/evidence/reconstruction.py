"""``python -m bench.evidence reconstruction``: how well K tokens stand for the 256 of every layer of DINOv2 ViT-S/14.

Relative reconstruction error ``sum_i min_j |x_i - c_j|^2 / sum_i |x_i - mean|^2`` of the tokens that come out, on crops
of pictures that nothing was chosen with; also weighted by attention received. Every block's output, five keep rates,
and every start x iterations x weighted or not x what is emitted x what is clustered (the keys, and means around
medoids: 5 iterations). No iteration: the start itself. Time is CPU time of one thread for the call, its start included.
A layer that is done is kept in bench/.cache, and an interrupted run goes on with the next.
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
COMPARED = ("farthest", "bipartite")  # starts, with ToMe
TOME = "bipartite (ToMe)"
# way -> row of ITERATIONS
SHOWN = {TOME: 0, "grid": 0, "tokens/weighted/farthest/mean": 3, "tokens/plain/farthest/mean": 3}
OTHERS = {
    TOME: lambda k: tp.BipartiteMatching(k, num_prefix_tokens=0),
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


def study(layer: capture.Layer) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of one layer, by way: (3, iterations, rates) mean error, mean weighted error, seconds an image; NaN where none.

    And errors over ToMe's of the same weights: (starts, weights, rates, images) for farthest and bipartite starts.
    """
    x = layer.after[:, 1:].contiguous()
    scores = layer.attention().mean((1, 2))[:, 1:].contiguous()
    keys = layer.k.mean(1)[:, 1:].contiguous()
    found: dict[str, torch.Tensor] = {}
    ratios = torch.full((2, 2, len(RATES), len(x)), torch.nan)
    chosen = {}

    def note(way: tuple, row: int, column: int, call, before: float = 0.0):
        centers, seconds = timed(call)
        errors = capture.relative_errors(x, centers, (None, scores))
        table = found.setdefault("/".join(way), torch.full((3, len(ITERATIONS), len(RATES)), torch.nan))
        table[:, row, column] = torch.stack([*(e.mean() for e in errors), torch.tensor((before + seconds) / len(x))])
        return errors

    for column, rate in enumerate(RATES):
        k = round(rate * x.shape[1])
        others = {n: note((n,), 0, column, lambda: make(k)(x, features=keys)) for n, make in OTHERS.items()}
        for clustered, weighted, start in product(("tokens", "keys"), (False, True), STARTS):
            if start == "bipartite" and 2 * k < x.shape[1]:
                continue
            on, weights = x if clustered == "tokens" else keys, scores if weighted else None
            if start not in NESTED or not column:
                chosen[clustered, weighted, start] = *timed(lambda: begin(on, k, weights, start)), k
            picks, drawing, most = chosen[clustered, weighted, start]
            picks, drawing = picks[:, :k], drawing * k / most if start in DRAWN else 0.0
            for emit, (row, count) in product(EMITS, enumerate(ITERATIONS)):
                if (clustered == "keys" or emit == "medoid's mean") and count != 5:
                    continue
                way = (clustered, "weighted" if weighted else "plain", start, emit)
                errors = note(way, row, column, lambda: cluster(emit, x, on, k, weights, start, picks, count), drawing)
                if (clustered, emit, count) == ("tokens", "mean", 5) and start in COMPARED:
                    ratios[COMPARED.index(start), int(weighted), column] = errors[weighted] / others[TOME][weighted]
    return found, ratios


def numbers(table: torch.Tensor, digits: int) -> list:
    return [[None if v != v else round(v, digits) for v in row] for row in table.tolist()]


def records(layers: list[tuple[dict, torch.Tensor]]) -> dict[str, list[dict]]:
    """The ways (mean over layers and images), a few of them by layer, and the library's against ToMe's."""
    ways = []
    for way in layers[0][0]:
        error, weighted, seconds = torch.stack([found[way] for found, _ in layers]).double().mean(0)
        half = numbers(seconds * 1e3, 3)
        half = [row[RATES.index(0.5)] for row in half]
        ways.append(
            {"way": way, "error": numbers(error, 3), "weighted_error": numbers(weighted, 3), "ms_at_half": half}
        )
    by_layer = []
    for number, (found, _) in enumerate(layers):
        for way, row in SHOWN.items():
            by_layer.append({"layer": number, "way": way, "error": numbers(found[way][0], 4)[row]})
    ratios, against = torch.cat([r for _, r in layers], 3), []
    for (i, start), weighted, (column, rate) in product(enumerate(COMPARED), (False, True), enumerate(RATES)):
        pairs = ratios[i, int(weighted), column]
        if not pairs.isnan().any():
            line = {"start": start, "weighted": weighted, "rate": rate, "pairs": len(pairs)}
            line |= {"above": int((pairs > 1 + 1e-5).sum()), "mean": round(pairs.mean().item(), 3)}
            against.append({**line, "worst": round(pairs.max().item(), 3)})
    return {"ways": ways, "layers": by_layer, "against ToMe": against}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence reconstruction", description=__doc__)
    parser.add_argument("--crops", type=int, default=6)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pixels = data.crops(args.crops, held_out=True)
    done = []
    for number, layer in enumerate(capture.layers(load_dinov2_small(), pixels)):
        done.append(data.cached(f"reconstruction-{args.crops}-{number}", lambda: study(layer)))
        print(f"layer {number} of 12 done", flush=True)
    about = {"crops": len(pixels), "tokens": 256, "rates": RATES, "iterations": ITERATIONS}
    print(data.save("reconstruction", about, records(done)))
    return 0
