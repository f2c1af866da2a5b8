"""``python -m bench.evidence trained_schedules``: how many tokens to keep after which block, on the model of ``train``.

The ViT that ``bench.evidence train base`` trained from scratch, without any fine-tuning. Its counts are searched for
(``search_schedule``, on 64 training images, no labels) or fixed, all at no more than the same share of its MACs,
clustering counted. All cluster by WK-Means, but for "ToMe's". Accuracy on the test images; intervals: 95%, paired
bootstrap over images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from tokenpool_ext import patch, search_schedule, unpatch
from tokenpool_ext.cost import cost

from . import data
from .schedules import constant_r
from .train import ViT, pictures

BUDGETS = (0.8, 0.58, 0.45)
SEARCHED = "search_schedule"
ONE = torch.zeros(1, 1, 28, 28)


@torch.no_grad()
def correct(model: ViT, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(x).argmax(1) for x in images.split(250)]) == labels


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence trained_schedules", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", default=str(data.CACHE / "train" / "base-4-0.pt"), help="checkpoint of `train base`")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = ViT()
    model.load_state_dict(torch.load(Path(args.base))["model"])
    model.eval()
    images, labels = (t[: args.test] for t in pictures("t10k"))
    seen = pictures("train")[0][torch.randperm(60000, generator=torch.Generator().manual_seed(5))[:64]]
    whole, base = cost(model, ONE).total, correct(model, images, labels)
    records = [{"budget": 1.0, "method": "all tokens", "accuracy": base.double().mean().item()}]
    for budget in BUDGETS:
        ways: dict[str, dict] = {}
        start = time.process_time()
        found = search_schedule(model, [seen[:1], seen[1:]], budget=budget)  # MACs are counted on one
        ways[SEARCHED], seconds = {"num_tokens": found}, time.process_time() - start
        ways["one ratio after blocks 1, 3, 4"] = {"budget": budget}
        ways["one ratio after every block"] = {"budget": budget, "layers": range(5)}
        ways["r tokens fewer in every block"] = constant_r(model, budget, ONE, depth=model.depth - 1, example=ONE)
        tome = constant_r(model, budget, ONE, depth=model.depth - 1, example=ONE, pooling="bipartite")
        ways["r, ToMe's matching"] = tome
        results, rows = {}, {}
        for method, arguments in ways.items():
            patch(model, **{"example": ONE, **arguments})
            results[method] = correct(model, images, labels).double()
            rows[method] = {"budget": budget, "method": method, "macs": round(cost(model, ONE).total / whole, 4)}
            unpatch(model)
            rows[method] |= {"accuracy": results[method].mean().item()}
            if method == SEARCHED:
                rows[method] |= {"num_tokens": found, "seconds": round(seconds)}
            for name, other in (("all", base.double()), ("searched", results[SEARCHED])):
                if other is not results[method]:
                    difference = results[method] - other
                    rows[method][f"minus_{name}"] = round(difference.mean().item(), 4)
                    rows[method][f"minus_{name}_95"] = [round(v, 4) for v in data.interval(difference)]
            print(rows[method], flush=True)
        records += rows.values()
    about = {"seed": 5, "searched_on": len(seen), "images": len(images)}
    print(data.save("trained-schedules", about, {"records": records}))
    return 0
