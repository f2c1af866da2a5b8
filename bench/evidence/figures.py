"""``python -m bench.evidence.figures``: the cost record, and the figures of docs/evidence.md from the records."""

from __future__ import annotations

import sys
from dataclasses import asdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tokenpool_ext.cost import cost
from tokenpool_ext.models import PLAIN_VITS, build

from . import data

PARTS = ("mlp", "projections", "attention", "embedding", "head")


def cost_record() -> None:
    rows = []
    for name in PLAIN_VITS:
        found = cost(build(name, "meta"))
        rows.append(
            {
                "model": name,
                "gmacs": found.gmacs,
                "fully_connected": found.fully_connected / found.total,
                **{part: count / found.total for part, count in asdict(found).items()},
            }
        )
    data.save("cost", {}, {"records": rows})


def cost_figure() -> None:
    rows = data.load("cost")["records"]
    names = [f"{row['model']}\n{row['gmacs']:.1f} GMAC" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    below = [0.0] * len(rows)
    for part in PARTS:
        share = [100 * row[part] for row in rows]
        axes.bar(names, share, bottom=below, label=part)
        below = [b + s for b, s in zip(below, share)]
    axes.axhline(80, color="black", linewidth=1, linestyle="--")
    axes.set(ylabel="% of MACs", title="Fully connected layers (mlp + projections) against the paper's 80 % (dashed)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.tick_params(axis="x", labelsize=8)
    figure.savefig(data.IMAGES / "evidence-cost.png", dpi=110)


def images_figure(name: str) -> None:
    content = data.load(f"images-{name}")
    rows = content["records"]
    whole = rows[0]
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    methods = dict.fromkeys(row["name"] for row in rows if row["group"] == "method")
    for number, method in enumerate(methods):
        line = [row for row in rows if row["group"] == "method" and row["name"] == method]
        style = "-" if "K-" in method else "--"
        axes.plot(
            [100 * r["budget"] for r in line],
            [100 * r["accuracy"] for r in line],
            style,
            marker="o",
            markersize=3,
            label=method,
            color=f"C{number}",
        )
    low, high = (
        100 * (whole["accuracy"] + s * (whole["accuracy"] * (1 - whole["accuracy"]) / whole["queries"]) ** 0.5)
        for s in (-1, 1)
    )
    axes.axhspan(low, high, color="0.9", label="all tokens, +- 1 standard error")
    axes.invert_xaxis()
    axes.set(
        xlabel="% of the blocks' MACs (clustering and scores not counted)",
        ylabel=f"{content['k']}-NN accuracy, %",
        title=f"DINOv2 ViT-S/14 as it is, {whole['queries']} pooled queries, gallery not pooled: {name}",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(data.IMAGES / f"evidence-images-{name}.png", dpi=110)


def main() -> int:
    if "--cost" in sys.argv:
        cost_record()
    cost_figure()
    for name in ("stamps", "fashion"):
        if (data.RESULTS / f"evidence-images-{name}.json").is_file():
            images_figure(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
