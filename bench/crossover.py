"""``python -m bench.crossover``: gram against direct on this machine, and the planner's constants fitted to it.

Both paths are forced in turn (environment variable TOKENPOOL_EXT_CPU_PATH) over a grid of N, D, K and T, interleaved,
on one thread, in CPU time (so a busy machine does little harm; with more threads: elapsed time). The tokens are real
(DINOv2's, bench/tokens.py): how much the bounds of the direct path spare depends on them.
The planner's model (csrc/planner.cpp), nanoseconds an image on one core:
    gram   = m_g N^2 D / 2 + t_g N D         + r P N^2
    direct = m_d M K D     + t_d N D (P + 1) + b N K   + (v N + d K D) (P - 1)
with P = min(T, 3), since later few clusters change; M = N, or N - K/2 for 48 and more starting tokens, whose products
with each
other are made once. It is fitted by non-negative least squares of relative errors. d, only for K-Medoids, whose
centers move
farther, is then chosen so that its picks lose least. Then: how often the fitted planner picks the slower path, and how
much time its picks lose against the best; and the same for random tokens (normal), on which bounds spare less.
--fit RECORD... measures nothing, but makes one fit to what these records hold; how fast each machine is as a whole is
fitted, too.
T is the number of iterations asked for, which is what the planner knows; an image stops early when nothing changes
("done").
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import torch

from . import machine, timing, tokens

VARIABLE = "TOKENPOOL_EXT_CPU_PATH"
PATHS = ("gram", "direct")
PASSES, STARTS_ONCE = 3, 48  # kPasses and kStartsOnce of the planner
REAL, MEDOIDS, RANDOM = "real tokens", "real tokens, K-Medoids", "random tokens"
KINDS = {REAL: "kmeans", MEDOIDS: "kmedoids", RANDOM: "kmeans"}
NAMES = (
    "kGramMultiplyAdd",
    "kGramToken",
    "kRowAdd",
    "kDirectMultiplyAdd",
    "kDirectToken",
    "kCompare",
    "kVisit",
    "kMedoidCenter",
)


def grid(quick: bool):
    tokens_, features = ((196, 576), (64, 384)) if quick else ((64, 196, 256, 576, 1024), (64, 192, 384, 768))
    for N, D, share, T in itertools.product(tokens_, features, (32, 8, 4, 3, 2), (1, 5)):
        if N // share >= 1:
            yield N, D, N // share, T


def run_path(path: str, call):
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        return call()
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def iterations_done(cluster, T: int) -> float:
    """Mean over images of the iterations carried out: up to the first that changes no label."""
    previous, done, stopped = None, None, None
    for t in range(1, T + 1):
        labels = cluster(t).assignment
        if previous is None:
            done, stopped = torch.ones(len(labels)), torch.zeros(len(labels), dtype=torch.bool)
        else:
            done += (~stopped).float()
            stopped |= (labels == previous).all(1)
        previous = labels
    return float(done.mean())


def measure(op: str, N: int, D: int, K: int, T: int, repeats: int, budget_s: float, base) -> dict:
    """Both paths timed on one problem: tokens derived from `base` (real ones), or random where it is None."""
    import tokenpool_ext as tp

    work = N * D * min(N / 2 + 8, T * K + 16)
    B = int(max(1, min(64, 1e9 // work)))
    x = tokens.random_tokens(B, N, D) if base is None else tokens.derive(base, B, N, D)[0].contiguous()

    def cluster(t=T):
        return getattr(tp, op)(x, K, init="strided", num_iters=t, backend="cpu")

    calls = {path: (lambda path=path: run_path(path, cluster)) for path in PATHS}
    done = run_path("direct", lambda: iterations_done(cluster, T)) if T > 1 else 1.0
    for call in calls.values():
        call()
    clock = timing.CpuClock() if torch.get_num_threads() == 1 else timing.WallClock()
    samples, errors = timing.interleave(calls, repeats=repeats, clock=clock, pause=0, deadline_s=budget_s)
    if errors:
        raise next(iter(errors.values()))
    return {
        "op": op,
        "N": N,
        "D": D,
        "K": K,
        "T": T,
        "B": B,
        "iterations_done": done,
        **{f"{p}_ns": timing.percentile([s for s in samples[p] if s], 20) / B * 1e9 for p in PATHS},
    }


def features(path: str, row: dict) -> list[float]:
    """Multipliers of the model's constants for one measurement."""
    N, D, K, P = row["N"], row["D"], row["K"], min(row["T"], PASSES)
    once = K / 2 if K >= STARTS_ONCE else 0
    medoids = (P - 1) * K * D if row["op"] == "kmedoids" else 0
    gram, direct = [N * N * D / 2, N * D, P * N * N], [(N - once) * K * D, (P + 1) * N * D, N * K, (P - 1) * N, medoids]
    return [*gram, *[0.0] * 5] if path == "gram" else [*[0.0] * 3, *direct]


def fit(rows: list[dict]) -> list[float]:
    """All constants (ns) but that of K-Medoids, by non-negative least squares of relative errors."""
    import numpy
    from scipy.optimize import nnls

    matrix = numpy.array([[f / row[f"{p}_ns"] for f in features(p, row)] for row in rows for p in PATHS])
    return nnls(matrix, numpy.ones(len(matrix)))[0].tolist()[:-1]


def with_medoids(constants: list[float], medoids: list[dict]) -> list[float]:
    """These and the constant of K-Medoids with which picks lose least."""
    return min(([*constants, d / 4] for d in range(41)), key=lambda c: judge(medoids, c)["mean_time_lost"])


def tell_time(constants: list[float], path: str, row: dict) -> float:
    """Nanoseconds that the model says a path takes."""
    return sum(c * f for c, f in zip(constants, features(path, row)))


def faster(rows: list[dict], factor: float) -> list[dict]:
    """What a machine would have measured that is so many times faster in everything."""
    return [{**row, **{f"{p}_ns": row[f"{p}_ns"] / factor for p in PATHS}} for row in rows]


def judge(rows: list[dict], constants: list[float]) -> dict:
    """How good the picks of these constants are on the measured rows."""
    wrong, lost, errors = 0, 0.0, []
    for row in rows:
        told = {p: tell_time(constants, p, row) for p in PATHS}
        pick = min(PATHS, key=told.get)
        fastest = min(PATHS, key=lambda p: row[f"{p}_ns"])
        wrong += row[f"{pick}_ns"] > 1.05 * row[f"{fastest}_ns"]
        lost += row[f"{pick}_ns"] / row[f"{fastest}_ns"] - 1
        errors += [abs(told[p] / row[f"{p}_ns"] - 1) for p in PATHS]
    return {
        "shapes": len(rows),
        "picks_over_5_percent_slower": wrong,
        "mean_time_lost": lost / len(rows),
        "median_error_of_times": timing.percentile(errors, 50),
    }


def tell(constants: list[float], judged: dict) -> None:
    print()
    for name, value in zip(NAMES, constants):
        print(f"  constexpr double {name} = {value:.4g};  // ns")
    for kind, found in judged.items():
        print(
            f"  {kind}: picks more than 5% slower than the best: {found['picks_over_5_percent_slower']} of "
            f"{found['shapes']}; mean time lost {found['mean_time_lost']:.1%}; median error of a predicted time "
            f"{found['median_error_of_times']:.0%}"
        )


def fit_records(paths: list[str]) -> None:
    """One set of constants for the machines of several records, and what its picks lose on each."""
    records = {Path(path).stem: json.loads(Path(path).read_text())["rows"] for path in paths}
    slower = dict.fromkeys(records, 1.0)  # than the machine of the constants
    for _ in range(20):
        even = {
            name: {kind: faster(found, slower[name]) for kind, found in rows.items()} for name, rows in records.items()
        }
        constants = fit([row for rows in even.values() for row in rows[REAL]])
        for name, rows in records.items():  # the factor with the least sum of squared relative errors
            told = [tell_time(constants, p, row) / row[f"{p}_ns"] for row in rows[REAL] for p in PATHS]
            slower[name] = sum(told) / sum(t * t for t in told)
    constants = with_medoids(constants, [row for rows in even.values() for row in rows[MEDOIDS]])
    print("\nslower than the machine of these constants: " + ", ".join(f"{name} {s:.2f}" for name, s in slower.items()))
    tell(
        constants,
        {f"{name}, {kind}": judge(found, constants) for name, rows in even.items() for kind, found in rows.items()},
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.crossover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a coarse grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of repeats a shape (three are always made)")
    parser.add_argument("--json")
    parser.add_argument("--fit", nargs="+", metavar="RECORD", help="files that --json made; nothing else is looked at")
    args = parser.parse_args(argv)
    if args.fit:
        fit_records(args.fit)
        return 0
    torch.set_num_threads(args.threads)
    base = tokens.real_base()[0]
    measured = {}
    for kind, op in KINDS.items():
        random = kind == RANDOM
        rows = measured[kind] = []
        print(kind)
        print(f"{'N':>6s} {'D':>5s} {'K':>5s} {'T':>3s} {'done':>5s} {'gram us':>10s} {'direct us':>10s}  gram/direct")
        for N, D, K, T in grid(args.quick or random):
            row = measure(op, N, D, K, T, args.repeats, args.budget, None if random else base)
            rows.append(row)
            print(
                f"{N:6d} {D:5d} {K:5d} {T:3d} {row['iterations_done']:5.1f} {row['gram_ns'] / 1e3:10.1f} "
                f"{row['direct_ns'] / 1e3:10.1f}  {row['gram_ns'] / row['direct_ns']:.2f}",
                flush=True,
            )
    constants = with_medoids(fit(measured[REAL]), measured[MEDOIDS])
    judged = {kind: judge(rows, constants) for kind, rows in measured.items()}
    tell(constants, judged)
    if args.json:
        content = {
            "schema": 3,
            **machine.stamp("bench.crossover"),
            "threads": args.threads,
            "rows": measured,
            "constants_ns": dict(zip(NAMES, constants)),
            "judged": judged,
        }
        machine.write(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
