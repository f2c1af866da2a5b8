"""``python -m bench.evidence schedules``: counts per block that were searched for or learned, against fixed ones.

A real DINOv2 ViT-S/14. ``search_schedule`` and ``learn_schedule`` see the same 8 pictures (crops of the demo's
photographs, or training pictures of Fashion-MNIST) and the class token, no labels. Learning starts anew for every
penalty, ``STEPS`` updates on 4 pictures each; the penalty is the one that comes to the budget. Tested on crops of
pictures that nothing was chosen with (cosine of the class token to the unpooled one), and on Fashion-MNIST as in
``images`` (k-NN of pooled queries, k = 10, in a gallery that is not pooled). All pictures have ``SIZE`` pixels a side.
Every method may use the same share of the unpooled model's MACs, clustering and scores counted, and comes as near as
its steps allow (learning: to a hundredth). Features are kept in bench/.cache: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch
from torch.nn.functional import interpolate

from tokenpool_ext import learn_schedule, patch, search_schedule, unpatch
from tokenpool_ext.cost import cost
from tokenpool_ext.demo.pretrained import load_dinov2_small
from tokenpool_ext.vit.search import _Search

from . import data
from .images import Task, features, vote

BUDGETS = (0.8, 0.6, 0.5)
SEARCHED, LEARNED = "search_schedule", "learn_schedule"
ELSEWHERE = "search_schedule, seen photographs"
SIZE, STEPS, LR = 112, 25, 0.1


def counts_of_r(total: int, depth: int = 12) -> dict[int, int]:
    """``total`` tokens fewer, about as many in every block."""
    return {i: -(total // depth + (i < total % depth)) for i in range(min(depth, total))}


def loss(search, counts: dict[int, int], known: dict, measure=_Search.loss) -> float:
    """Measured once for all budgets."""
    key = tuple(counts.items())
    if key not in known:
        known[key] = measure(search, counts)
    return known[key]


def macs(model, arguments: dict) -> float:
    """Share of the unpooled model's."""
    whole = cost(model).total
    patch(model, **arguments)
    share = cost(model).total / whole
    unpatch(model)
    return share


def searched(budget: float, seen: torch.Tensor, model, losses: dict, say) -> dict:
    """Counts that a search on some pictures found."""

    def search() -> dict:
        start = time.process_time()
        with mock.patch.object(_Search, "loss", lambda search, counts: loss(search, counts, losses)):
            found = search_schedule(model, [seen[:1], seen[1:]], budget=budget)  # MACs are counted on one
        return {"num_tokens": found, "seconds": time.process_time() - start}

    found = data.cached(f"schedule-{data.digest(seen.numpy().tobytes())}-{budget:g}", search)
    say(f"{budget:g}: {found}")
    return found


def learned(budget: float, seen: torch.Tensor, model, known: dict, say) -> dict:
    """Counts learned with the penalty that comes to at most ``budget``, and no more than a hundredth below.

    known: logarithm of a penalty -> what was learned with it, for all budgets. The MACs jump with the penalty: where a
    hundredth of its logarithm is not enough, the nearest below.
    """
    key = data.digest(seen.numpy().tobytes())

    def at(penalty: float) -> dict:
        def learn() -> dict:
            start = time.process_time()
            found = learn_schedule(model, list(seen.split(4)), penalty=10**penalty, steps=STEPS, lr=LR)
            found = {"num_tokens": found, "penalty": 10**penalty, "seconds": time.process_time() - start}
            return found | {"macs": macs(model, {"num_tokens": found["num_tokens"]})}

        if penalty not in known:
            known[penalty] = data.cached(f"learned-{key}-{penalty:g}-{STEPS}-{LR:g}", learn)
            say(f"{budget:g}: {known[penalty]}")
        return known[penalty]

    low, high = -5.0, -3.0  # of the penalty, above the budget and below
    for end in (low, high):
        at(end)
    while True:
        low = max(p for p, found in known.items() if found["macs"] > budget)
        high = min(p for p, found in known.items() if found["macs"] <= budget and p > low)
        over, under = at(low)["macs"] - budget, budget - at(high)["macs"]
        if under <= 0.01 or high - low < 0.01:
            return at(high) | {"tried": len(known)}
        aim = (over + 0.005) / (over + under)  # half a hundredth below the budget
        at(round(low + (high - low) * min(max(aim, 0.1), 0.9), 3))


def fixed(budget: float, model) -> dict[str, dict]:
    """Schedule -> arguments of ``patch`` for a share of the MACs."""

    def constant_r(**options) -> dict:
        low, high = 1, 12 * 32
        while low < high:
            middle = (low + high) // 2
            fits = macs(model, {"num_tokens": counts_of_r(middle), **options}) <= budget
            low, high = (low, middle) if fits else (middle + 1, high)
        return {"num_tokens": counts_of_r(low), **options}

    return {
        "one ratio after blocks 3, 6, 9": {"budget": budget},
        "one ratio after every block": {"budget": budget, "layers": range(12)},
        "r tokens fewer in every block": constant_r(),
        "r, ToMe's matching and place": constant_r(pooling="bipartite", position="attention"),
    }


def crops(count: int, **options) -> torch.Tensor:
    return interpolate(data.crops(count, **options), size=SIZE, mode="bicubic", antialias=True)


def tested(name: str, count: int, gallery: int):
    """(pixels of one part at a time, task) of the pictures a schedule is tested on."""
    if name == "photographs":
        return crops(count, held_out=True, seed=2026).split(16), None
    task = Task("fashion", gallery, count, SIZE)
    task.key = f"schedules-{task.key}"  # the model of SIZE has other positions than that of ``images``
    return [task.pixels(index) for index in task.order.split(50)], task


def seen_pictures(name: str) -> dict[str, torch.Tensor]:
    """Method -> the pictures it chooses counts with."""
    photographs = crops(8, held_out=False, seed=5)
    if name == "photographs":
        return {SEARCHED: photographs, LEARNED: photographs}
    pictures, _ = data.fashion("train")
    some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(5))[:8].numpy()
    own = data.fashion_pixels(pictures[some], SIZE)
    return {SEARCHED: own, LEARNED: own, ELSEWHERE: photographs}


def methods_of(name: str, model, say) -> dict[float, dict[str, dict]]:
    """Budget -> method -> {"patch": arguments, ...what is worth recording}."""
    methods: dict[float, dict] = {budget: {} for budget in BUDGETS}
    for method, pixels in seen_pictures(name).items():
        known: dict = {}
        choose = learned if method == LEARNED else searched
        for budget in BUDGETS:
            found = choose(budget, pixels, model, known, say)
            methods[budget][method] = {"patch": {"num_tokens": found["num_tokens"]}, **found}
    for budget, found in methods.items():
        found |= {method: {"patch": arguments} for method, arguments in fixed(budget, model).items()}
    return methods


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crops", type=int, default=64, help="of photographs, for the test")
    parser.add_argument("--gallery", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    def say(line: str) -> None:
        print(line, flush=True)

    model, records = load_dinov2_small(image_size=SIZE), []
    for name, count in (("photographs", args.crops), ("Fashion-MNIST", args.queries)):
        methods = methods_of(name, model, say)
        parts, task = tested(name, count, args.gallery)

        def run(arguments: dict, name=name, parts=parts) -> torch.Tensor:
            def make():
                if arguments:
                    patch(model, **arguments)
                try:
                    return torch.cat([features(model, part) for part in parts])
                finally:
                    unpatch(model)

            key = repr((name, SIZE, sum(map(len, parts)), arguments))
            return data.cached(f"schedules-{data.digest(key)}", make)

        gallery, base = task and task.gallery(model), run({})

        def measures(queries: torch.Tensor, base=base, gallery=gallery, task=task) -> tuple[torch.Tensor, ...]:
            """(n,) cosines, and whether the label is right."""
            cosines = (queries * base).sum(1).double()
            if task is None:
                return (cosines,)
            guesses = vote(queries, gallery, task.gallery_labels, task.k)
            return cosines, (guesses == task.labels[task.order]).double()

        common = {"pictures": name, "queries": len(base)}
        records.append(common | {"budget": 1.0, "method": "all tokens"})
        records[-1] |= {} if task is None else {"accuracy": measures(base)[1].mean().item()}
        for budget, variants in methods.items():
            results = {method: measures(run(found["patch"])) for method, found in variants.items()}
            for method, result in results.items():
                found = variants[method]
                row = common | {"budget": budget, "method": method, "macs": round(macs(model, found["patch"]), 4)}
                row["worst"] = result[0].min().item()
                for label, own, reference in zip(("cosine", "accuracy"), result, results[SEARCHED]):
                    row[label] = own.mean().item()
                    if method != SEARCHED:
                        row |= data.difference(f"{label}_minus_searched", own - reference)
                row |= {key: found[key] for key in ("num_tokens", "penalty", "tried") if key in found}
                row |= {"seconds": round(found["seconds"])} if "seconds" in found else {}
                records.append(row)
                say(str(row))
    about = {"size": SIZE, "seed": 2026, "seed_seen": 5, "seen": 8, "steps": STEPS, "lr": LR}
    about |= {"threads": args.threads, "gallery": args.gallery}
    print(data.save("schedules", about, {"records": records}))
    return 0
