"""Labels for fixed centers: `tokenpool_ext.assign` beside `cdist().argmin()`, a product with `argmin`, and faiss.

    python -m bench.assign [--threads N] [--rounds N] [--json OUT]

Every round times each provider once; seconds are the median, ratios those of the round. `cdist().argmin()` runs in
pieces of 8192 tokens, where the whole table would not fit. What differs from the labels in float64 is counted on the
first 2000 tokens (ties and rounding).
"""

from __future__ import annotations

import argparse
import time

import torch

import tokenpool_ext as tp

from . import machine, timing

SHAPES = [(196, 384, 98), (75_600, 128, 1000), (1_000_000, 64, 1024)]
PIECE = 8192


def providers(x, centers) -> dict:
    length = centers.square().sum(1)
    found = {
        "tokenpool_ext": lambda: tp.assign(x, centers),
        "cdist().argmin()": lambda: torch.cat([torch.cdist(piece, centers).argmin(1) for piece in x.split(PIECE)]),
        "product, argmin": lambda: torch.cat(
            [torch.addmm(length, piece, centers.T, alpha=-2).argmin(1) for piece in x.split(PIECE)]
        ),
    }
    try:
        import faiss
    except ImportError:
        return found
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centers.numpy())
    found["faiss flat"] = lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    return found


def measure(n: int, d: int, k: int, rounds: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x, centers = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    wide, samples = providers(x, centers), {}
    head = x[:2000].double()
    right = torch.cdist(head, centers.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    wrong = {name: (call()[:2000] != right).sum().item() for name, call in wide.items()}
    calls = max(1, int(2e8 / (n * d * k)))
    clock = timing.WallClock()
    for _ in range(rounds):
        for name, call in wide.items():
            samples.setdefault(name, []).append(clock.seconds(call, calls))
            time.sleep(timing.PAUSE_S)
    ours = samples["tokenpool_ext"]
    return [
        {
            "shape": [n, d, k],
            "provider": name,
            "seconds": timing.percentiles(taken),
            "ours_is_faster_by": timing.percentiles([t / o for t, o in zip(taken, ours)]),
            "wrong_of_2000": wrong[name],
        }
        for name, taken in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for shape in SHAPES:
        for record in measure(*shape, options.rounds):
            records.append(record)
            print(
                f"{'x'.join(map(str, shape)):>16}  {record['provider']:18} {record['seconds']['p50'] * 1e3:10.3f} ms"
                f"  x{record['ours_is_faster_by']['p50']:.2f}  {record['wrong_of_2000']} of 2000 differ from float64"
            )
    if options.json:
        machine.write(options.json, {**machine.stamp("bench.assign"), "threads": options.threads, "results": records})


if __name__ == "__main__":
    main()
