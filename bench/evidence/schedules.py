"""``python -m bench.evidence schedules``: counts per block that were searched for, against fixed ones at equal MACs.

A real DINOv2 ViT-S/14. The search sees 8 crops of the demo's photographs (or 8 training pictures of Fashion-MNIST) and
the class token, no labels. Tested on crops of pictures that nothing was chosen with (cosine of the class token to the
unpooled one), and on Fashion-MNIST as in ``images`` (k-NN of pooled queries, k = 10, in a gallery that is not pooled).
Every method may use the same share of the unpooled model's MACs, clustering and scores counted, and comes as near as
its steps allow. Features are kept in bench/.cache: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch

from tokenpool_ext import patch, search_schedule, unpatch
from tokenpool_ext.cost import cost
from tokenpool_ext.demo.pretrained import load_dinov2_small
from tokenpool_ext.vit.search import _Search

from . import data
from .images import Task, features, vote

BUDGETS = (0.8, 0.6, 0.5)
SEARCHED = "search_schedule"
OWN = "search_schedule, Fashion-MNIST"


def counts_of_r(total: int, depth: int = 12) -> dict[int, int]:
    """``total`` tokens fewer, about as many in every block."""
    return {i: -(total // depth + (i < total % depth)) for i in range(min(depth, total))}


def loss(search, counts: dict[int, int], known: dict, measure=_Search.loss) -> float:
    """Measured once for all budgets."""
    key = tuple(counts.items())
    if key not in known:
        known[key] = measure(search, counts)
    return known[key]


def searched(budget: float, seen: torch.Tensor, model, losses: dict, say) -> dict:
    """Arguments of ``patch`` that a search on some pictures found."""

    def search() -> dict:
        start = time.process_time()
        with mock.patch.object(_Search, "loss", lambda search, counts: loss(search, counts, losses)):
            found = search_schedule(model, [seen[:1], seen[1:]], budget=budget)  # MACs are counted on one
        return {"found": found, "seconds": time.process_time() - start}

    found = data.cached(f"schedule-{data.digest(seen.numpy().tobytes())}-{budget:g}", search)
    say(f"{budget:g}: {found['found']} in {found['seconds']:.0f} s of the processor")
    return {"num_tokens": found["found"]}


def fixed(budget: float, model) -> dict[str, dict]:
    """Schedule -> arguments of ``patch`` for a share of the MACs."""
    whole = cost(model).total

    def constant_r(**options) -> dict:
        low, high = 1, 12 * 32
        while low < high:
            middle = (low + high) // 2
            patch(model, num_tokens=counts_of_r(middle), **options)
            low, high = (low, middle) if cost(model).total <= budget * whole else (middle + 1, high)
        unpatch(model)
        return {"num_tokens": counts_of_r(low), **options}

    return {
        "one ratio after blocks 3, 6, 9": {"budget": budget},
        "one ratio after every block": {"budget": budget, "layers": range(12)},
        "r tokens fewer in every block": constant_r(),
        "r, ToMe's matching and place": constant_r(pooling="bipartite", position="attention"),
    }


def tested(name: str, count: int, gallery: int):
    """(pixels of one part at a time, truth, task) of the pictures a schedule is tested on."""
    if name == "photographs":
        pixels = data.crops(count, held_out=True, seed=2026)
        return pixels.split(16), None
    task = Task("fashion", gallery, count)
    return [task.pixels(index) for index in task.order.split(50)], task


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crops", type=int, default=32, help="of photographs, for the test")
    parser.add_argument("--gallery", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    def say(line: str) -> None:
        print(line, flush=True)

    model = load_dinov2_small()
    pictures, _ = data.fashion("train")
    some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(5))[:8].numpy()
    seen = {SEARCHED: data.crops(8, held_out=False, seed=5), OWN: data.fashion_pixels(pictures[some])}
    whole, records = cost(model).total, []
    methods: dict[float, dict] = {budget: {} for budget in BUDGETS}
    for name, pixels in seen.items():
        losses: dict = {}
        for budget in BUDGETS:
            methods[budget][name] = searched(budget, pixels, model, losses, say)
    for budget in BUDGETS:
        methods[budget] |= fixed(budget, model)
    for name, count in (("photographs", args.crops), ("Fashion-MNIST", args.queries)):
        parts, task = tested(name, count, args.gallery)

        def run(arguments: dict, name=name, parts=parts) -> torch.Tensor:
            def make():
                if arguments:
                    patch(model, **arguments)
                try:
                    return torch.cat([features(model, part) for part in parts])
                finally:
                    unpatch(model)

            return data.cached(f"schedules-{data.digest(repr((name, sum(map(len, parts)), arguments)))}", make)

        gallery, base = task and task.gallery(model), run({})

        def measures(queries: torch.Tensor, base=base, gallery=gallery, task=task) -> tuple[torch.Tensor, ...]:
            """(n,) cosines, and whether the label is right."""
            cosines = (queries * base).sum(1).double()
            if task is None:
                return (cosines,)
            guesses = vote(queries, gallery, task.gallery_labels, task.k)
            return cosines, (guesses == task.labels[task.order]).double()

        records.append({"pictures": name, "queries": len(base), "budget": 1.0, "method": "all tokens"})
        records[-1] |= {} if task is None else {"accuracy": measures(base)[1].mean().item()}
        for budget, variants in methods.items():
            results = {
                method: measures(run(arguments)) for method, arguments in variants.items() if task or method != OWN
            }
            for method, result in results.items():
                patch(model, **variants[method])
                share = cost(model).total / whole
                unpatch(model)
                row = {"pictures": name, "queries": len(base), "budget": budget, "method": method}
                row |= {"macs": round(share, 4), "cosine": result[0].mean().item(), "worst": result[0].min().item()}
                for label, own, reference in zip(("cosine", "accuracy"), result, results[SEARCHED]):
                    row[label] = own.mean().item()
                    if method != SEARCHED:
                        row[f"{label}_minus_searched"] = (own - reference).mean().item()
                        row[f"{label}_minus_searched_95"] = data.interval(own - reference)
                if method in seen:
                    row["num_tokens"] = variants[method]["num_tokens"]
                records.append(row)
                say(str(row))
    about = {
        "seed": 2026,
        "seed_searched": 5,
        "searched_on": len(next(iter(seen.values()))),
        "threads": args.threads,
        "gallery": args.gallery,
    }
    print(data.save("schedules", about, {"records": records}))
    return 0
