"""``python -m bench.plot RESULT.json [RESULT.json ...] [--out FIGURE.png]``: docs/benchmarks.md's figure from records.

Left: how many times longer each other system takes than tokenpool_ext, a row per shape, with the spread
(20th to 80th percentile of round-by-round ratios). Right: our time over the floor of that machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .report import by_problem

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000", "#8C564B")
MARKERS = "osD^vP*Xhd<>p"


def read(paths) -> list[dict]:
    """Records of one or more result files; of two with the same problem and provider the later file wins."""
    found: dict = {}
    for path in paths:
        content = json.loads(Path(path).read_text())
        if content.get("schema") != 1:
            raise ValueError(f"{path}: schema must be 1, got {content.get('schema')!r}")
        for record in content["records"]:
            key = tuple(record[k] for k in ("op", "shape", "B", "iters", "dtype", "mode", "device", "provider"))
            found[key] = record
    return list(found.values())


def choose(records, *, op="kmeans", batch=None, iters=None, dtype="float32", mode="forward") -> list[list[dict]]:
    """Groups of records (one per shape) that match, small problems first. batch None: the largest there is."""
    fit = [r for r in records if r["op"] == op and r["dtype"] == dtype and r["mode"] == mode]
    if not fit:
        raise ValueError(f"no record of {op}, {dtype}, {mode} in the files given")
    batch = batch or max(r["B"] for r in fit)
    iters = iters or min(r["iters"] for r in fit)
    groups = by_problem([r for r in fit if r["B"] == batch and r["iters"] == iters]).values()
    groups = [g for g in groups if any(r["ours"] and r["status"] == "ok" for r in g)]
    if not groups:
        raise ValueError(f"no shape with a time of tokenpool_ext at batch {batch}, T={iters}")
    return sorted(groups, key=lambda g: g[0]["N"] * g[0]["D"])


def figure(groups: list[list[dict]], out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({r["provider"] for g in groups for r in g if not r["ours"] and r["status"] == "ok"})
    first = groups[0][0]
    with_floor = any("time_over_floor" in r for g in groups for r in g)
    height = 1.6 + 0.62 * len(groups)
    canvas, axes = pyplot.subplots(
        1,
        2 if with_floor else 1,
        figsize=(11 if with_floor else 8, height),
        sharey=True,
        squeeze=False,
        width_ratios=[2.6, 1] if with_floor else None,
    )
    speed = axes[0][0]
    for index, name in enumerate(names):
        shown = name + next(("*" for g in groups for r in g if r["provider"] == name and r["objective"] == "other"), "")
        points = [
            (row, r["time_over_ours"])
            for row, g in enumerate(groups)
            for r in g
            if r["provider"] == name and r["status"] == "ok" and "time_over_ours" in r
        ]
        if not points:
            continue
        middle = [p["p50"] for _, p in points]
        shift = (index - (len(names) - 1) / 2) * 0.6 / max(1, len(names))
        speed.errorbar(
            middle,
            [row + shift for row, _ in points],
            xerr=[
                [m - p["p20"] for m, (_, p) in zip(middle, points)],
                [p["p80"] - m for m, (_, p) in zip(middle, points)],
            ],
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            ms=5,
            lw=1,
            capsize=2,
            label=shown,
        )
    speed.axvline(1, color="black", lw=0.8)
    speed.set_xscale("log")
    speed.set_xlabel("time over tokenpool_ext's (right of 1: slower than ours; *: does another job)")
    speed.set_yticks(
        range(len(groups)),
        [
            f"{g[0]['shape'].replace(':', ' → ').replace('x', ' × ')}" + (f"\n{g[0]['label']}" if g[0]["label"] else "")
            for g in groups
        ],
    )
    speed.invert_yaxis()
    speed.grid(axis="x", which="both", alpha=0.25)
    speed.legend(fontsize=7, ncols=5, loc="upper left", bbox_to_anchor=(-0.15, -0.75 / height), frameon=False)
    if with_floor:
        bars = axes[0][1]
        for row, group in enumerate(groups):
            ours = next(r for r in group if r["ours"] and r["status"] == "ok")
            over = ours.get("time_over_floor")
            if over:
                bars.barh(
                    row,
                    over["p50"],
                    height=0.5,
                    color="#0072B2",
                    xerr=[[over["p50"] - over["p20"]], [over["p80"] - over["p50"]]],
                    ecolor="black",
                    capsize=2,
                )
                bars.text(over["p80"], row, f"  {over['p50']:.1f}", va="center", fontsize=8)
        bars.axvline(1, color="black", lw=0.8)
        bars.set_xlim(0, 1.15 * bars.get_xlim()[1])  # room for the figures
        bars.set_xlabel("our time over the floor (1: peak rate)")
    where = first["machine"].get("gpu") or f"{first['machine']['cpu']}, threads: {first['threads']}"
    if any(r.get("clock") == "cpu" for g in groups for r in g):
        where += ", CPU time"
    speed.set_title(
        f"{first['op']}, batch {first['B']}, {first['dtype']}, T = {first['iters']}, {first['tokens']} "
        f"tokens; {where}; commit {first['commit']}",
        fontsize=8,
        loc="left",
    )
    canvas.savefig(out, dpi=150, bbox_inches="tight")
    pyplot.close(canvas)
    return out


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+")
    parser.add_argument("--out", help="PNG to write (default: the first result's name with .png)")
    parser.add_argument("--op", default="kmeans")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--iters", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", default="forward")
    args = parser.parse_args(argv)
    try:
        groups = choose(
            read(args.results), op=args.op, batch=args.batch, iters=args.iters, dtype=args.dtype, mode=args.mode
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    out = Path(args.out) if args.out else Path(args.results[0]).with_suffix(".png")
    print(figure(groups, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
