"""How much faster a pooled model is: its own forward against the patched one, in turns, with ToMe's schedule beside.

The model as it is (with whatever fused attention it uses), pooled to a share of its multiply-accumulates, and pooled by
ToMe's matching (arXiv 2210.09461: some tokens in every block, between attention and MLP) to the same share, run in
turns on the same input. Given are medians, and the median of the ratios within a turn, which other load on the machine
moves less. The pooling's own share (scores, clustering, what follows from it) is measured inside the pooled forwards.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from .checks import check_int
from .cost import IMAGE, cost, example_input

__all__ = ["bench_model"]

METHODS = ("whole", "pooled", "tome")


def bench_model(
    model: nn.Module, batches: Iterable[int] = (1, 8, 32), budget: float = 0.58, rounds: int = 20
) -> list[dict[str, Any]]:
    """Time a model whole, pooled and with ToMe's schedule, on made-up inputs, without gradients.

    Args:
        model: any that :func:`~tokenpool_ext.patch` takes; a copy without its patch is timed, in eval mode.
        batches: batch sizes.
        budget: share of the model's multiply-accumulates that both poolings come down to.
        rounds: turns; one more goes before.

    Returns:
        One dict a batch size: ``batch``; for ``whole``, ``pooled`` and ``tome`` the median ``_ms`` of a forward; for
        the latter two the ``_speedup`` over the whole model, the ``_share`` of its MACs, and the ``_own`` share of the
        forward's time that pooling takes; and ``break_even``: the share of MACs that pooling must remove before it
        gains, its own time over the whole model's.

    Raises:
        TypeError, ValueError: as ``patch``; a budget that ToMe's schedule cannot come down to.
    """
    from .vit import patch, unpatch

    batches = [check_int("bench-model", "batches", batch, 1) for batch in batches]
    if not batches:
        raise ValueError("bench-model: batches must hold at least one batch size, got none")
    rounds = check_int("bench-model", "rounds", rounds, 1)
    models = {"whole": unpatch(copy.deepcopy(model)).eval()}
    models["pooled"] = patch(copy.deepcopy(models["whole"]), budget=budget)
    whole = cost(models["whole"]).total
    models["tome"] = tome(copy.deepcopy(models["whole"]), budget * whole)
    shares = {name: cost(m).total / whole for name, m in models.items()}
    return [measure(models, shares, batch, rounds) for batch in batches]


def tome(model: nn.Module, budget: float) -> nn.Module:
    """Patched by ToMe's matching: about as many tokens removed by every block, as few as ``budget`` MACs allow."""
    from .vit import patch, patched_blocks

    patch(model, r=1, pooling="bipartite")
    depth = len(patched_blocks(model))
    position = "attention"

    def apply(total: int) -> float:
        counts = {i: -(total // depth + (i < total % depth)) for i in range(min(depth, total))}
        patch(model, num_tokens=counts, pooling="bipartite", position=position)
        return cost(model).total

    try:
        apply(1)
    except ValueError:  # blocks without such a place
        position = "block"
    low, high = 1, 64 * depth
    if apply(high) > budget:
        raise ValueError("bench-model: halving the tokens in every block is not enough for this budget")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if apply(middle) <= budget else (middle + 1, high)
    apply(low)
    return model


def measure(models: dict[str, nn.Module], shares: dict[str, float], batch: int, rounds: int) -> dict[str, Any]:
    """One row of :func:`bench_model`."""
    inputs: dict[str, torch.Tensor] = {
        name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in example_input(models["whole"]).items()
    }
    inputs = {name: x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x for name, x in inputs.items()}
    args = (inputs.pop(IMAGE),) if IMAGE in inputs else ()
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    own: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(rounds + 1):
        for name in METHODS:
            with torch.no_grad(), watch() as spent:
                start = time.perf_counter()
                models[name](*args, **inputs)
                passed = time.perf_counter() - start
            if turn:
                times[name].append(passed)
                own[name].append(sum(spent) / passed)
    row: dict[str, Any] = {"batch": batch, "rounds": rounds}
    for name in METHODS:
        row[f"{name}_ms"] = round(1e3 * statistics.median(times[name]), 2)
        if name != "whole":
            row[f"{name}_speedup"] = round(statistics.median(a / b for a, b in zip(times["whole"], times[name])), 3)
            row[f"{name}_share"] = round(shares[name], 4)
            row[f"{name}_own"] = round(statistics.median(own[name]), 4)
    row["break_even"] = round(
        statistics.median(o * p / w for o, p, w in zip(own["pooled"], times["pooled"], times["whole"])), 4
    )
    return row


@contextmanager
def watch() -> Iterator[list[float]]:
    """The seconds that pooling takes inside, as a list."""
    from .vit.reducing import Reducer

    spent: list[float] = []
    plain = Reducer.__call__

    def timed(reducer: Reducer, tokens: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        out = plain(reducer, tokens)
        spent.append(time.perf_counter() - start)
        return out

    with mock.patch.object(Reducer, "__call__", timed):
        yield spent


def table(rows: list[dict[str, Any]]) -> str:
    """Batch sizes downwards."""
    lines = ["batch   whole      pooled            pooling itself   ToMe's schedule"]
    for r in rows:
        lines.append(
            f"{r['batch']:>5} {r['whole_ms']:>8.1f} ms {r['pooled_ms']:>8.1f} ms {r['pooled_speedup']:>5.2f}x"
            f" {100 * r['pooled_own']:>9.1f} % {r['tome_ms']:>14.1f} ms {r['tome_speedup']:>5.2f}x"
        )
    first = rows[0]
    lines.append(
        f"MACs: pooled {100 * first['pooled_share']:.1f} %, ToMe's schedule {100 * first['tome_share']:.1f} % of the"
        " whole model's"
    )
    points = ", ".join(f"{100 * r['break_even']:.1f} % at batch {r['batch']}" for r in rows)
    return "\n".join([*lines, f"break-even: pooling gains when it removes more than {points} of the MACs"])


def main(argv=None) -> int:
    from .models import build, whole_numbers

    parser = argparse.ArgumentParser(
        prog="python -m tokenpool_ext bench-model", description="time a model whole, pooled, and with ToMe's schedule"
    )
    parser.add_argument(
        "--model", required=True, help="deit-s and others, FILE.py:FUNCTION, or the name of a timm model"
    )
    parser.add_argument(
        "--batch", type=whole_numbers, default="1,8,32", help="batch sizes, comma-separated (default: 1,8,32)"
    )
    parser.add_argument("--budget", type=float, default=0.58, help="share of the MACs that is left (default: 0.58)")
    parser.add_argument("--rounds", type=int, default=20, help="turns (default: 20)")
    parser.add_argument("--json", help="write a record (in a checkout of the repository)")
    args = parser.parse_args(argv)
    try:
        torch.manual_seed(0)
        rows = bench_model(build(args.model), args.batch, args.budget, args.rounds)
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        machine = importlib.import_module("bench.machine")
        facts = {"model": args.model, "threads": torch.get_num_threads(), "dtype": "float32"}
        machine.write(args.json, {**machine.stamp("tokenpool_ext"), **facts, "rows": rows})
    return 0
