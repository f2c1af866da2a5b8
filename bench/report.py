"""Records as a table a person can read."""

from __future__ import annotations

import math


def milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _bytes(value) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _loss(record: dict) -> str:
    if "loss_relative" in record:
        word = "" if record["objective"] == "other" else " ok" if record["same_loss"] else " DIFFERS"
        return f"{record['loss_relative']:+.1e}{word}"
    if "same_result" in record:
        return "same" if record["same_result"] else f"DIFFERS {record['relative_difference']:.1e}"
    return f"{record['loss']:.4g}" if "loss" in record else "-"


COLUMNS = ("provider", "version", "ms/image p50", "[p20, p80]", "/ ours", "/ floor", "images", "extra MiB", "loss")


def row(record: dict) -> list[str]:
    time, ratio, over = (record.get(k) for k in ("ms_per_image", "time_over_ours", "time_over_floor"))
    return [
        record["provider"] + ("*" if record["objective"] == "other" else ""),
        str(record["versions"].get("provider") or "-"),
        milliseconds(time["p50"]),
        f"[{milliseconds(time['p20'])}, {milliseconds(time['p80'])}]",
        f"{ratio['p50']:.2f}" if ratio else "-",
        f"{over['p50']:.2f}" if over else "-",
        str(record["images_timed"]),
        _bytes(record.get("peak_extra_bytes")),
        _loss(record),
    ]


def table(records: list[dict]) -> str:
    """One problem's records, fastest first; those that did not run follow with their reasons."""
    done = sorted((r for r in records if r["status"] == "ok"), key=lambda r: r["ms_per_image"]["p50"])
    rows = [list(COLUMNS), *map(row, done)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    lines = (
        [
            "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
            for r in rows
        ]
        if done
        else []
    )
    if any(r["objective"] == "other" for r in done):
        lines.append("  * another objective or algorithm: its loss need not agree")
    converted = [r["provider"] for r in done if r.get("input_dtype", r["dtype"]) != r["dtype"]]
    if converted:
        lines.append(f"  fed float32 copies of the {done[0]['dtype']} tokens: {', '.join(converted)}")
    for r in done:
        if r["images_timed"] < r["B"]:
            lines.append(f"  {r['provider']}: slow, so timed on {r['images_timed']} of {r['B']} images")
    for r in records:
        if r["status"] != "ok":
            lines.append(f"  {r['provider']}: {r['status']}, {r['reason']}")
    chosen = [f"  {r['provider']}: {r['variant'].split(' Not chosen:')[0]}" for r in done if r.get("variant")]
    return "\n".join(lines + chosen)


def best_peer(records: list[dict]) -> dict | None:
    """Fastest record of the same objective that is not ours and whose loss was not found to differ."""
    fit = [
        r
        for r in records
        if r["status"] == "ok"
        and not r["ours"]
        and r["objective"] == "same"
        and r.get("same_loss", True)
        and r.get("same_result", True)
    ]
    return min(fit, key=lambda r: r["ms_per_image"]["p50"], default=None)


def problem_key(record: dict) -> tuple:
    return tuple(record[k] for k in ("op", "shape", "B", "iters", "dtype", "mode", "device", "tokens"))


def by_problem(records: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(problem_key(record), []).append(record)
    return groups


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def summary(records: list[dict]) -> str:
    """Best exact peer over ours, problem by problem, and the geometric mean for each op, batch, T and dtype."""
    lines, groups = [], {}
    for key, group in by_problem(records).items():
        us = next((r for r in group if r["ours"] and r["status"] == "ok"), None)
        peer = best_peer(group)
        if not us or not peer or "time_over_ours" not in peer:
            continue
        ratio = peer["time_over_ours"]
        op, shape, B, iters, dtype, mode, device, _ = key
        lines.append(
            f"  {op} {shape} batch {B} T={iters} {dtype} {mode} {device}: "
            f"{ratio['p50']:.2f}x [{ratio['p20']:.2f}, {ratio['p80']:.2f}] over {peer['provider']}"
        )
        groups.setdefault((op, B, iters, dtype, mode, device), []).append(ratio["p50"])
    if not lines:
        return "\n".join(
            [
                "Speed over the best peer: nothing to compare (no peer and ours on the same problem)",
                *within_ours(records),
            ]
        )
    means = [
        f"  geometric mean of {len(v)} shapes, {op} batch {B} T={T} {dtype} {mode} {device}: "
        f"{geometric_mean(v):.2f}x (lowest {min(v):.2f}x)"
        for (op, B, T, dtype, mode, device), v in groups.items()
    ]
    return "\n".join(
        ["Speed over the best peer that does the same job [p20, p80]:", *lines, *means, *within_ours(records)]
    )


def within_ours(records: list[dict]) -> list[str]:
    """Our own time against itself: more iterations over the fewest, other dtypes over float32 (medians, one run)."""
    times = {}
    for r in records:
        if r["ours"] and r["status"] == "ok":
            times[r["provider"], r["op"], r["shape"], r["B"], r["mode"], r["dtype"], r["iters"]] = r
    lines = []
    for (provider, op, shape, B, mode, dtype, T), r in times.items():
        fewest = min(k[6] for k in times if k[:6] == (provider, op, shape, B, mode, dtype))
        for other, word in (
            ((dtype, fewest), f"T={T} over T={fewest}, {dtype}"),
            (("float32", T), f"{dtype} over float32, T={T}"),
        ):
            base = times.get((provider, op, shape, B, mode, *other))
            if base and base is not r:
                ratio = r["ms_per_image"]["p50"] / base["ms_per_image"]["p50"]
                lines.append(f"  {provider} {op} {shape} batch {B}: {word}: {ratio:.2f} of the time")
    return lines
