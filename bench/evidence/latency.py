"""``python -m bench.evidence latency``: counts searched for seconds instead of MACs, on the device that runs this.

A real DINOv2 ViT-S/14, one picture a forward. ``search_schedule(target="latency")`` sees 8 crops of the demo's
photographs. Its counts and one ratio after blocks 3, 6, 9 (at the same budget, of MACs) then run in turns with the
whole model: milliseconds are medians, speedups medians of the ratios within a turn. Cosine: of the class token to the
unpooled one, on crops of 8 pictures that nothing was chosen with: too few to rank schedules by.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from tokenpool_ext import patch, search_schedule
from tokenpool_ext.cost import cost
from tokenpool_ext.demo.pretrained import load_dinov2_small

from . import data
from .images import features

BUDGETS = (0.8, 0.6)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence latency", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--crops", type=int, default=32)
    args = parser.parse_args(argv)
    whole = load_dinov2_small()
    seen = data.crops(8, held_out=False, seed=5)
    models, seconds = {"all tokens": whole}, {}
    for budget in BUDGETS:
        start = time.perf_counter()
        found = search_schedule(whole, [seen[:1], seen[1:]], budget=budget, target="latency")
        seconds[f"search_schedule, {budget:g} of the time"] = time.perf_counter() - start
        models[f"search_schedule, {budget:g} of the time"] = patch(copy.deepcopy(whole), num_tokens=found)
        models[f"one ratio, {budget:g} of the MACs"] = patch(copy.deepcopy(whole), budget=budget)
        print(found, seconds, flush=True)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(args.rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(seen[:1])
                if turn:
                    times[name].append(time.perf_counter() - start)
        pixels = data.crops(args.crops, held_out=True, seed=2026)
        base, records = features(whole, pixels), []
        for name, model in models.items():
            row = {"schedule": name, "ms": round(1e3 * statistics.median(times[name]), 1)}
            row["speedup"] = round(statistics.median(a / b for a, b in zip(times["all tokens"], times[name])), 3)
            row["macs"] = round(cost(model).total / cost(whole).total, 4)
            row["cosine"] = round((features(model, pixels) * base).sum(1).mean().item(), 4)
            records.append(row | ({"search_seconds": round(seconds[name])} if name in seconds else {}))
            print(records[-1], flush=True)
    about = {"threads": torch.get_num_threads(), "rounds": args.rounds, "crops": args.crops, "seed": 5}
    print(data.save("latency", about, {"records": records}))
    return 0
