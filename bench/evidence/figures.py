"""The figures of docs/evidence.md and docs/evidence/, each of one record of bench/results."""

from __future__ import annotations

import hashlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import data

PARTS = ("mlp", "projections", "attention", "embedding", "head")


def digest(record: str) -> str:
    """What a figure's file says of the record it shows."""
    return hashlib.sha256((data.RESULTS / f"evidence-{record}.json").read_bytes()).hexdigest()


def save(record: str) -> None:
    """Draw docs/images/evidence-<record>.png."""
    figure = FIGURES[record](data.load(record))
    figure.savefig(data.IMAGES / f"evidence-{record}.png", dpi=110, metadata={"Source": digest(record)})
    plt.close(figure)


def cost(content: dict):
    rows = content["records"]
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
    return figure


def images(content: dict):
    rows = content["records"]
    whole = rows[0]
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    methods = dict.fromkeys(row["name"] for row in rows if row["group"] == "method")
    for number, method in enumerate(methods):
        line = [row for row in rows if row["group"] == "method" and row["name"] == method]
        at, accuracy = [100 * r["budget"] for r in line], [100 * r["accuracy"] for r in line]
        style = "-" if "K-" in method else "--"
        axes.plot(at, accuracy, style, marker="o", markersize=3, label=method, color=f"C{number}")
    error = (whole["accuracy"] * (1 - whole["accuracy"]) / whole["queries"]) ** 0.5
    low, high = (100 * (whole["accuracy"] + s * error) for s in (-1, 1))
    axes.axhspan(low, high, color="0.9", label="all tokens, +- 1 standard error")
    axes.invert_xaxis()
    axes.set(
        xlabel="% of the blocks' MACs (clustering and scores not counted)",
        ylabel=f"{content['k']}-NN accuracy, %",
        title=f"DINOv2 ViT-S/14 as it is, {whole['queries']} pooled queries, gallery not pooled: {content['data']}",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def lowpass(content: dict):
    models: dict[str, list[dict]] = {}
    for row in content["records"]:
        models.setdefault(row["model"], []).append(row)
    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    single = {
        "(a) deviation of |k| over its mean": "key_norm_cv",
        "(b) attention against the Gaussian kernel\n(half the summed gap of a row)": "gap",
        "(f) effective rank of 257": "rank",
    }
    pairs = {
        "(c) K-Means error at 64 of 256": "error",
        "(d) energy between neighbours": "energy",
        "(e) energy of high frequencies": "high",
    }
    lines = {"v": "C0", "av": "C1", "av_shuffled": "C2", "before": "C3", "middle": "C4"}
    words = {
        "v": "V",
        "av": "A V",
        "av_shuffled": "A V, V shuffled",
        "before": "tokens",
        "middle": "tokens + attention",
    }
    for axes, (title, name) in zip(panels[0], single.items()):
        for style, (model, rows) in zip("-:", models.items()):
            axes.plot([row[name] for row in rows], style, marker=".", color="C0", label=model)
        axes.set(title=title, ylim=(0, None))
    panels[0][0].legend()
    for axes, (title, name) in zip(panels[1], pairs.items()):
        for signal, color in lines.items():
            axes.plot([row[name][signal] for row in models["DINOv2"]], marker=".", color=color, label=words[signal])
        for signal in ("v", "av"):
            control = [row[name][signal] for row in models["random weights"]]
            axes.plot(control, ":", color=lines[signal], label=f"{words[signal]}, random weights")
        axes.set(title=title, ylim=(0, None), xlabel="layer")
    for axes in panels.flat:
        axes.set_xticks(range(0, 12, 2))
    panels[1][2].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def reconstruction(content: dict):
    from .tables import RECONSTRUCTION

    ways = {way["way"]: way for way in content["ways"]}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axes, kind, title in zip(panels, ("error", "weighted_error"), ("all tokens alike", "weighted by significance")):
        for number, (name, (way, iterations)) in enumerate(RECONSTRUCTION.items()):
            errors = ways[way][kind][content["iterations"].index(iterations)]
            line = [(100 * rate, error) for rate, error in zip(content["rates"], errors) if error is not None]
            style = "-" if "K-" in name else "--"
            axes.plot(*zip(*line), style, marker="o", markersize=3, label=name, color=f"C{number % 10}")
        axes.axhline(1, color="black", linewidth=0.5)
        axes.invert_xaxis()
        axes.set(xlabel="% of the tokens kept", title=f"Error, {title}", ylim=(0, 1.2))
    panels[0].set_ylabel("reconstruction error (1: one token for all)")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES = {
    "cost": cost,
    "images-stamps": images,
    "images-fashion": images,
    "lowpass": lowpass,
    "reconstruction": reconstruction,
}
