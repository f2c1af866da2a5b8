"""``python -m bench.what_moves``: how much of an assignment is left where only what moved is compared again?

Counts, not times (no GPU needed): what ``csrc/cuda/cluster.cuh`` leaves out on the paths "resident", "spread" and
"gram". For
each assignment after the first, the share of the members that are in clusters whose members changed, and the share of
the
tokens that stay open (their own center moved, and none of those that moved is as near as it was). Work is that of all
these assignments over comparing every token with every member; the first one, to the starting tokens, is always whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from . import machine, tokens

SHAPES = (
    (196, 192, 98),
    (196, 384, 98),
    (256, 384, 128),
    (196, 768, 49),
    (256, 1024, 64),
    (576, 768, 288),
    (576, 1024, 64),
)


def shares(x: torch.Tensor, init: torch.Tensor, iters: int) -> list[tuple[float, float]]:
    """(members of moved clusters, open tokens), each over N, mean of the images, for assignments 2 .. iters.

    x (B, N, D), init (B, K) token indices. K-Means in float64, the reference backend's labels.
    """
    from tokenpool_ext import kmeans

    x, (B, K), N = x.double(), init.shape, x.shape[1]
    members = torch.zeros(B, N, K, dtype=torch.bool).scatter_(1, init[:, None], True)
    distances = torch.cdist(x, x.gather(1, init[..., None].expand(-1, -1, x.shape[2]))).square()
    found = []
    for t in range(1, iters):
        done = kmeans(x, K, init=init, num_iters=t, backend="reference")
        before, nearest = distances.min(2)
        now = torch.nn.functional.one_hot(done.assignment, K).bool()
        moved = (now != members).any(1)
        members, distances = now, torch.cdist(x, done.centers).square()
        as_near = distances.masked_fill(~moved[:, None], torch.inf).amin(2) <= before
        still_open = moved.gather(1, nearest) & ~as_near
        found.append(((members & moved[:, None]).any(2).double().mean().item(), still_open.double().mean().item()))
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.what_moves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    base, words = tokens.real_base()
    if base is None:
        print(f"real tokens are needed: {words}", file=sys.stderr)
        return 2
    records = []
    print(
        f"{args.images} images, random starts; members of moved clusters / open tokens, work left of these assignments"
    )
    for n, d, k in SHAPES:
        for kind in ("real", "random"):
            x = tokens.derive(base, args.images, n, d)[0] if kind == "real" else tokens.random_tokens(args.images, n, d)
            found = shares(x, tokens.distinct_indices(args.images, n, k), args.iters)
            work = sum(moved + still_open * (1 - moved) for moved, still_open in found) / len(found)
            records.append(
                {
                    "shape": [n, d, k],
                    "tokens": kind,
                    "moved": [m for m, _ in found],
                    "open": [o for _, o in found],
                    "work": work,
                }
            )
            print(
                f"{n}x{d}->{k}".ljust(14),
                kind.ljust(7),
                "  ".join(f"{m:.2f} / {o:.2f}" for m, o in found),
                f"  {work:.2f}",
            )
    if args.json:
        content = {
            "schema": 1,
            **machine.stamp("bench.what_moves"),
            "images": args.images,
            "iters": args.iters,
            "records": records,
        }
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
