"""What a call costs beside its arithmetic: validation, choice of a backend, dispatch, allocations.

    python -m bench.call_cost [--device cpu|cuda] [--json OUT]

One image of 8 tokens of 4 features into 4 clusters, two iterations: next to no arithmetic. Microseconds a call, the
median of 60 rounds of 200 calls that take turns. On a GPU the clock is the host's, and the device is waited for between
rounds only:
launches are counted, kernels are not.
"""

from __future__ import annotations

import argparse
import sys

import torch

import tokenpool_ext as tp

from . import machine, timing

ROUNDS, CALLS = 60, 200


def calls(device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 4, generator=generator).to(device)
    wanting = x.clone().requires_grad_()
    weights, init = torch.rand(1, 8, generator=generator).to(device), torch.arange(4, device=device)[None]
    labels, module = torch.arange(8, device=device)[None] % 4, tp.TokenPooling(4, num_iters=2, num_prefix_tokens=0)
    return {
        "kmeans, token indices": lambda: tp.kmeans(x, 4, init=init, num_iters=2),
        "kmeans, strided": lambda: tp.kmeans(x, 4, init="strided", num_iters=2),
        "kmeans, weights and topk": lambda: tp.kmeans(x, 4, weights=weights, init="topk", num_iters=2),
        "kmeans, farthest": lambda: tp.kmeans(x, 4, init="farthest", num_iters=2),
        "kmeans, recorded for backward": lambda: tp.kmeans(wanting, 4, init=init, num_iters=2),
        "kmedoids, token indices": lambda: tp.kmedoids(x, 4, init=init, num_iters=2),
        "TokenPooling": lambda: module(x),
        "pool": lambda: tp.pool(x, labels, 4),
        "unpool": lambda: tp.unpool(x[:, :4], labels),
        "torch.empty": lambda: torch.empty((1, 4, 4), device=device),
        **(op_alone(x, init) if tp.backends()[device] == "ok" else {}),
    }


def op_alone(x, init) -> dict:
    op = torch.ops.tokenpool_ext.kmeans
    return {"torch.ops.tokenpool_ext.kmeans": lambda: op(x, None, None, None, init, 4, 2, False)}


def measure(device: str, rounds: int = ROUNDS, count: int = CALLS) -> dict:
    """Name -> microseconds a call (p20, p50, p80)."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    timed = calls(device)
    samples = {name: [] for name in timed}
    clock = timing.WallClock()
    for _ in range(rounds + 1):
        for name, call in timed.items():
            wait()
            samples[name].append(clock.seconds(call, count) * 1e6)
    return {name: timing.percentiles(values[1:]) for name, values in samples.items()}  # the first round warms up


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.call_cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.device)
    for name, us in found.items():
        print(f"{name:32s} {us['p50']:8.1f} us")
    if args.json:
        content = {"schema": 1, **machine.stamp("bench.call_cost", args.device), "call_us": found}
        machine.write(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
