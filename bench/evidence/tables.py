"""The tables of docs/evidence.md and docs/evidence/, each of the records of bench/results alone."""

from __future__ import annotations

from collections.abc import Callable

from . import data
from .methods import METHODS

ONE_LINE = "patch(model, keep_ratio=...)"


def markdown(head: list[str], rows) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def difference(row: dict, name: str, digits: int) -> str:
    """A difference with its 95% interval, empty if the row has none."""
    if name not in row:
        return ""
    low, high = row[f"{name}_95"]
    return f"{row[name]:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def points(row: dict, name: str) -> str:
    """A difference of accuracies, in percentage points."""
    if name not in row:
        return ""
    return difference({name: 100 * row[name], f"{name}_95": [100 * v for v in row[f"{name}_95"]]}, name, 1)


def by_budget(content: dict) -> dict[tuple[str, str], dict[float, dict]]:
    """(group, name) -> budget -> record."""
    found: dict = {}
    for row in content["records"][1:]:
        found.setdefault((row["group"], row["name"]), {})[row["budget"]] = row
    return found


def cost() -> str:
    def row(r):
        shares = [f"{100 * r[name]:.1f}" for name in ("attention", "projections", "mlp", "fully_connected")]
        return [r["model"], f"{r['gmacs']:.4g}", *shares]

    head = ["model", "GMAC", "attention %", "projections %", "MLP %", "fully connected %"]
    return markdown(head, map(row, data.load("cost")["records"]))


def one_line() -> str:
    rows = []
    for row in data.load("one-line")["cosines"]:
        way = "**the one line**" if row["way"] == ONE_LINE else row["way"]
        rows.append([way, row["ratio"], *(f"{v:.3f}" for v in (*row["cls"], *row["mean"]))])
    return markdown(["way", "kept at each of three blocks", "class token", "worst", "mean token", "worst"], rows)


def accuracy(name: str) -> str:
    content = data.load(f"images-{name}")
    whole = content["records"][0]
    columns = sorted({row["budget"] for row in content["records"][1:]}, reverse=True)
    error = (whole["accuracy"] * (1 - whole["accuracy"]) / whole["queries"]) ** 0.5
    rows = [
        [method, *(f"{100 * found[b]['accuracy']:.1f}" for b in columns)]
        for (group, method), found in by_budget(content).items()
        if group == "method"
    ]
    all_tokens = f"{100 * whole['accuracy']:.1f} (standard error {100 * error:.1f})"
    gallery = f"{whole['queries']} queries, a gallery of {content['gallery']}"
    return f"{content['k']}-NN, {gallery}; all tokens {all_tokens}.\n\n" + markdown(
        ["method", *(f"{b:.0%}" for b in columns)], rows
    )


def against_all(name: str, columns: tuple[float, ...]) -> str:
    content = data.load(f"images-{name}")
    rows = []
    for (group, method), found in by_budget(content).items():
        if group == "method":
            rows.append([method, *(points(found[b], "minus_all") for b in columns)])
            rows[-1] += [points(found[b], "minus_wkmeans") if method != "WK-Means" else "" for b in columns]
    head = [f"{b:.0%}: against {other}" for other in ("all tokens", "WK-Means") for b in columns]
    return markdown(["method", *head], rows)


def settings() -> str:
    content = data.load("images-stamps")
    found = by_budget(content)
    found[("weighted", "False")] = found[("method", "K-Means")]
    found = {key: value for key, value in found.items() if key[0] != "method"}
    columns = sorted(found[("track_size", "False")], reverse=True)
    rows = [[*key, *(points(value[b], "minus_wkmeans") for b in columns)] for key, value in found.items()]
    return markdown(["setting", "value", *(f"{b:.0%}: points against WK-Means, 95%" for b in columns)], rows)


def lowpass() -> str:
    """How often each prediction holds, and means over the layers."""
    models: dict[str, list[dict]] = {}
    for row in data.load("lowpass")["records"]:
        models.setdefault(row["model"], []).append(row)
    predictions = [
        ("(c) attention lowers the K-Means error of values", "error", "v", "av"),
        ("(c) more so than that of shuffled values", "error", "av_shuffled", "av"),
        ("(c) tokens with attention added have less error than before", "error", "before", "middle"),
        ("(c) tokens after the block have less error than before", "error", "before", "after"),
        ("(d) attention lowers the energy between neighbours", "energy", "v", "av"),
        ("(d) and the distance to the nearest 5", "neighbours", "v", "av"),
        ("(d) tokens with attention added have less energy", "energy", "before", "middle"),
        ("(e) attention lowers the high frequencies on the grid", "high", "v", "av"),
        ("(e) those of the tokens it is added to", "high", "before", "middle"),
    ]

    def mean(rows, *names):
        return sum(row[names[0]] if len(names) == 1 else row[names[0]][names[1]] for row in rows) / len(rows)

    def between(rows, name, digits):
        values = [row[name] for row in rows]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    table = []
    for words, name, digits in (
        ("(a) deviation of the key norms over their mean", "key_norm_cv", 2),
        ("(b) gap between attention and the Gaussian kernel", "gap", 2),
        ("(f) effective rank of attention, of 257", "rank", 0),
        ("(f) its largest singular value", "top", 1),
    ):
        table.append([words, *(cell for rows in models.values() for cell in ("", between(rows, name, digits)))])
    for words, name, first, second in predictions:
        line = [words]
        for rows in models.values():
            line.append(f"{sum(row[name][second] < row[name][first] for row in rows)} of {len(rows)} layers")
            line.append(f"{mean(rows, name, first):.2f} -> {mean(rows, name, second):.2f}")
        table.append(line)
    return markdown(["", *(f"{model}{what}" for model in models for what in (": holds in", ": range or mean"))], table)


def positions() -> str:
    rows = []
    for row in data.load("positions")["records"]:
        line = [row["pictures"], f"{row['position_weight']:g}", row["ratio"]]
        for name in ("class", "patches"):
            line += [f"{row[name]:.4f}", difference(row, f"{name}_gain", 4) if row["position_weight"] else ""]
        rows.append(line)
    head = ["pictures", "position_weight", "kept at each of three blocks", "class token", "gain", "patches", "gain"]
    return markdown(head, rows)


# name -> way of the record, iterations
RECONSTRUCTION = {
    "WK-Means": ("tokens/weighted/farthest/mean", 5),
    "K-Means": ("tokens/plain/farthest/mean", 5),
    "WK-Medoids": ("tokens/weighted/farthest/medoid", 5),
    "K-Medoids": ("tokens/plain/farthest/medoid", 5),
    "K-Medoids, emit mean": ("tokens/plain/farthest/medoid's mean", 5),
    "K-Means of the keys": ("keys/plain/farthest/mean", 5),
    "K-Means from ToMe's matching": ("tokens/plain/bipartite/mean", 5),
    "bipartite (ToMe)": ("bipartite (ToMe)", 0),
    "grid": ("grid", 0),
    "score pruning": ("tokens/weighted/topk/medoid", 0),
    "importance": ("tokens/weighted/random/medoid", 0),
    "random": ("tokens/plain/random/medoid", 0),
}


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def reconstruction() -> str:
    content = data.load("reconstruction")
    ways = {way["way"]: way for way in content["ways"]}
    half = content["rates"].index(0.5)
    rows = []
    for name, (way, iterations) in RECONSTRUCTION.items():
        found, at = ways[way], content["iterations"].index(iterations)
        errors = [number(v) for v in found["error"][at]]
        rows.append([name, *errors, number(found["weighted_error"][at][half]), number(found["ms_at_half"][at], 2)])
    head = ["", *(f"{rate:.0%}" for rate in content["rates"]), "50%, weighted", "ms at 50%"]
    return markdown(head, rows)


def starts() -> str:
    content = data.load("reconstruction")
    column = content["rates"].index(0.5)
    rows = []
    for way in content["ways"]:
        clustered, _, rest = way["way"].partition("/")
        if clustered == "tokens" and rest.endswith("/mean"):
            kind, start, _ = rest.split("/")
            table = way["error" if kind == "plain" else "weighted_error"]
            weights, five = "yes" if kind == "weighted" else "no", content["iterations"].index(5)
            rows.append([start, weights, *(number(row[column]) for row in table), number(way["ms_at_half"][five], 2)])
    return markdown(["start", "weighted", *(f"{t} it." for t in content["iterations"]), "ms, 5 it."], rows)


def text() -> str:
    rows = []
    for row in data.load("text")["records"]:
        line = [row["method"], f"{row['ratio']:g}", f"{100 * row['macs']:.0f}", number(row["mrr"])]
        rows.append([*line, difference(row, "minus_all", 3), number(row.get("cosine"))])
    head = ["method", "kept at each of three blocks", "% of MACs", "reciprocal rank", "against all tokens", "cosine"]
    return markdown(head, rows)


TRAINED = {"kmeans": "WK-Means", "kmedoids": "WK-Medoids", "bipartite": "bipartite (ToMe)", "none": "all tokens"}
TRAINED |= {"kmeans-unweighted": "K-Means", "kmedoids-unweighted": "K-Medoids"}


def trained(tuned: bool) -> str:
    """Accuracy by budget, and under it the difference from WK-Means, of the first seed."""
    found: dict[str, dict[float, dict]] = {}
    for row in data.load("train")["records"]:
        if row["tuned"] == tuned and row["seed"] == 0 and "budget" in row:
            found.setdefault(row["method"], {})[row["budget"]] = row
    columns = sorted(next(iter(found.values())), reverse=True)
    rows = []
    for method, by in found.items():
        name = TRAINED.get(method, method)
        cells = [f"{100 * by[b]['accuracy']:.1f}" for b in columns]
        rows.append([name, *cells, *(points(by[b], "minus_wkmeans") for b in (0.58, 0.35))])
    head = ["method", *(f"{b:.0%}" for b in columns), "58%: against WK-Means", "35%: against WK-Means"]
    return markdown(head, rows)


def trained_seeds() -> str:
    """Of fine-tuned models, for every seed."""
    found: dict[str, list[str]] = {}
    for row in data.load("train")["records"]:
        if row["tuned"] and row.get("budget") in (0.58, 0.35):
            cells = found.setdefault(f"{TRAINED.get(row['method'], row['method'])}, seed {row['seed']}", [])
            cells += [f"{100 * row['accuracy']:.1f}", points(row, "minus_all"), points(row, "minus_wkmeans")]
    head = [f"{b}{what}" for b in ("58%", "35%") for what in ("", ": against all tokens", ": against WK-Means")]
    return markdown(["method", *head], ([name, *cells] for name, cells in sorted(found.items())))


def trained_whole() -> str:
    """The models that keep all tokens, and WK-Means at about the MACs of the narrow one."""
    rows = []
    for row in data.load("train")["records"]:
        if row["seed"]:
            continue
        if "budget" not in row or (row["tuned"] and row["budget"] == 0.58 and row["method"].startswith("k")):
            name = {"base": "all tokens", "narrow": "fewer features, all tokens"}.get(row["method"], row["method"])
            line = [TRAINED.get(name, name), row["epochs"] if not row["tuned"] else f"+ {row['epochs']:g}"]
            line += [f"{100 * row['macs']:.0f}", f"{100 * row['accuracy']:.2f}"]
            rows.append([*line, points(row, "minus_all")])
    return markdown(["model", "epochs", "% of MACs", "accuracy", "against all tokens, trained as long"], rows)


def speech(kind: str) -> str:
    content = data.load("speech")
    found = [row for row in content["records"] if row["kind"] == kind]
    rows = []
    for row in found:
        name = row["method"] + (f"={row['strength']:g}" if row["strength"] else "")
        name += f" ({row['clips']} clips)" if row["clips"] < found[0]["clips"] else ""
        others = [points(row, f"minus_{other}") for other in ("all", "grid", "wkmeans")]
        rows.append([name, f"{row['tokens']:g}", f"{100 * row['wer']:.1f}", *others])
        rows[-1] += [f"{row[f'{part}_ms']:.0f}" for part in ("encoder", "decoder")]
    head = ["method", "tokens", "word error rate %", "points against all tokens", "against the grid"]
    words = f"{found[0]['clips']} clips, {found[0]['words']:,} words."
    return words + "\n\n" + markdown([*head, "against WK-Means", "encoder, ms", "decoder, ms"], rows)


def strengths() -> str:
    """Word error rate by strength of the time coordinate, on the clips that chose it."""
    found: dict[float, dict[int, str]] = {}
    for row in data.load("speech")["calibration"]:
        found.setdefault(row["strength"], {})[row["tokens"]] = f"{100 * row['wer']:.1f}"
    tokens = list(next(iter(found.values())))
    rows = [[f"{weight:g}", *(row[k] for k in tokens)] for weight, row in found.items()]
    return markdown(["position_weight", *(f"{k} tokens: word error rate %" for k in tokens)], rows)


def speed() -> str:
    rows = []
    for model in ("deit-s", "deit-b"):
        for row in data.load(f"speed-{model}")["rows"]:
            times = [f"{row[f'{name}_ms']:.0f}" for name in ("whole", "pooled", "tome")]
            gains = [f"{row[f'{name}_speedup']:.2f}x" for name in ("pooled", "tome")]
            rows.append([model, row["batch"], *times, *gains, f"{row['pooled_own']:.1%}", f"{row['break_even']:.1%}"])
    head = ["model", "batch", "whole, ms", "pooled, ms", "ToMe's schedule, ms", "pooled", "ToMe's"]
    head += ["pooling's share of the time", "gains when it removes, of the MACs"]
    return markdown(head, rows)


def against_tome() -> str:
    rows = []
    for row in data.load("reconstruction")["against ToMe"]:
        words = ["yes" if row["weighted"] else "no", f"{row['rate']:.0%}", f"{row['above']} of {row['pairs']}"]
        rows.append([row["start"], *words, number(row["mean"]), number(row["worst"])])
    return markdown(["start", "weighted", "kept", "above ToMe's", "mean ratio", "worst"], rows)


def schedules() -> str:
    rows = []
    for row in data.load("schedules")["records"]:
        accuracy = f"{100 * row['accuracy']:.1f}" if "accuracy" in row else ""
        if "cosine" not in row:
            rows += [[row["pictures"], "100", row["method"], "", "", "", accuracy, ""]] if accuracy else []
            continue
        gains = [difference(row, "cosine_minus_searched", 4), accuracy, points(row, "accuracy_minus_searched")]
        line = [row["pictures"], f"{100 * row['macs']:.1f}", row["method"]]
        rows.append([*line, number(row["cosine"], 4), number(row["worst"]), *gains])
    head = ["pictures", "% of MACs", "schedule", "class token", "worst", "against the search", "accuracy", "against it"]
    return markdown(head, rows)


def latency() -> str:
    rows = []
    for row in data.load("latency")["records"]:
        times = [f"{row['ms']:.0f}", f"{row['speedup']:.2f}x", f"{100 * row['macs']:.0f}"]
        rows.append([row["schedule"], *times, number(row["cosine"], 4), str(row.get("search_seconds", ""))])
    return markdown(["schedule", "ms", "speed", "% of MACs", "class token", "search, s"], rows)


def overview() -> str:
    """A number for each method from each study, at a budget where the methods differ."""
    content = data.load("reconstruction")
    errors = {way["way"]: way["error"] for way in content["ways"]}
    at, half = content["iterations"].index, content["rates"].index(0.5)
    columns = {"error of half the tokens": {m: errors[w][at(n)][half] for m, (w, n) in RECONSTRUCTION.items()}}
    for words, record, field, wanted in (
        ("stamps, 40% of the MACs", "images-stamps", "accuracy", {"budget": 0.4, "group": "method"}),
        ("Fashion-MNIST, 50%", "images-fashion", "accuracy", {"budget": 0.5, "group": "method"}),
        ("trained, 58%", "train", "accuracy", {"budget": 0.58, "tuned": True}),
        ("text, 72%: reciprocal rank", "text", "mrr", {"ratio": 0.7}),
        ("speech, half the tokens: word errors", "speech", "wer", {"tokens": 750, "kind": "dense"}),
    ):
        columns[words] = {}
        for row in data.load(record)["records"]:
            name = row.get("name", row.get("method"))
            if row.get("seed"):  # the first of them here
                continue
            if name in ("all tokens", "none") or all(row.get(key) == value for key, value in wanted.items()):
                columns[words][TRAINED.get(name, name)] = row[field]
    methods = ("all tokens", *METHODS)
    return markdown(["", *columns], [[m, *(number(found.get(m)) for found in columns.values())] for m in methods])


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "cost": cost,
    "speed": speed,
    "one-line": one_line,
    "stamps": lambda: accuracy("stamps"),
    "stamps-intervals": lambda: against_all("stamps", (0.6, 0.5, 0.4)),
    "fashion": lambda: accuracy("fashion"),
    "fashion-intervals": lambda: against_all("fashion", (0.6, 0.5, 0.4)),
    "settings": settings,
    "reconstruction": reconstruction,
    "starts": starts,
    "against-tome": against_tome,
    "lowpass": lowpass,
    "text": text,
    "train": trained_whole,
    "train-tuned": lambda: trained(True),
    "train-seeds": trained_seeds,
    "train-untuned": lambda: trained(False),
    "positions": positions,
    "schedules": schedules,
    "latency": latency,
    "speech-strengths": strengths,
    "speech-dense": lambda: speech("dense"),
    "speech-padded": lambda: speech("padded"),
}
