"""What the CUDA kernels execute in one call, counted on the CPU from their compiled code (PTX, sm_90a).

    python tests/cuda_sim/count.py --shape 1x196x384 --clusters 98 [--dtype bfloat16] [--path resident] [--medoids]
    python tests/cuda_sim/count.py --suite bench/results/cuda-counts.json

Per kernel and source line, a call with what it calls: instructions of a warp, passes of its shared-memory accesses (and
how many of them bank conflicts add), 32-byte sectors of its global ones (and how many more than the bytes it asks for
fill). Counts, not times: the assembler still merges and drops instructions, and nothing here knows what overlaps. Needs
g++ and nvcc.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import simulator

KINDS = {
    "mma": "tensor",
    "ld.shared": "shared",
    "st.shared": "shared",
    "atom.shared": "shared",
    "ldmatrix": "shared",
    "ld.global": "global",
    "st.global": "global",
    "cp.async.cg": "global",
    "atom.global": "global",
    "bar.sync": "barrier",
    "bar.red": "barrier",
}


@dataclass
class Line:
    """Totals of one line of source, or of one kernel."""

    instructions: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    passes: int = 0
    conflicts: int = 0
    sectors: int = 0
    wasted: int = 0

    def add(self, other: Line) -> None:
        for name in ("instructions", "passes", "conflicts", "sectors", "wasted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.kinds.items():
            self.kinds[kind] += count


def kind(opcode: str) -> str:
    found = next((name for start, name in KINDS.items() if opcode.startswith(start)), None)
    return found or ("float" if opcode.split(".")[-1] in ("f32", "f64") else "integer")


def counted(sim: simulator.Simulator) -> dict[tuple[str, ...], Line]:
    """What ran since the last call. `sim` runs the variant "count"."""
    listing = json.loads(Path(sim.lib._name).with_suffix(".json").read_text())
    blocks = np.zeros(listing["blocks"], dtype=np.int64)
    accesses = np.zeros((len(listing["instructions"]), 3), dtype=np.int64)
    sim.lib.sim_counts(blocks.ctypes.data_as(ctypes.c_void_p), accesses.ctypes.data_as(ctypes.c_void_p))
    return by_place(listing["instructions"], blocks, accesses)


def by_place(instructions: list, blocks: np.ndarray, accesses: np.ndarray) -> dict[tuple[str, ...], Line]:
    """Counts by kernel and place ("file:line" of every inlined call down to the instruction), and by every beginning of
    that: a call holds what it calls. blocks, accesses: of count.h's take_counts."""
    lines: dict[tuple[str, ...], Line] = defaultdict(Line)
    for (kernel, block, opcode, place), (requests, made, fewest) in zip(instructions, accesses.tolist()):
        times = int(blocks[block])
        if not times:
            continue
        this = Line(times, defaultdict(int, {kind(opcode): times}))
        if requests and ".shared" in opcode and not opcode.startswith("cp.async"):
            this.passes, this.conflicts = made, made - fewest
        elif requests:
            this.sectors, this.wasted = made, made - fewest
        for depth in range(len(place) + 1):
            lines[(kernel, *place[:depth])].add(this)
    return lines


def table(lines: dict[tuple[str, ...], Line], least: float) -> list[str]:
    """As text, each place below its caller, the busiest first; places below a share `least` of their kernel left
    out."""
    out = ["instructions  float  tensor  shared passes (of conflicts)  sectors (wasted)"]

    def show(place: tuple[str, ...], total: int) -> None:
        line = lines[place]
        name = place[-1]
        file, _, number = name.partition(":")
        source = simulator.CSRC / "cuda" / file
        if number and source.exists():
            name += "  " + source.read_text().splitlines()[int(number) - 1].strip()[:60]
        out.append(
            f"{line.instructions:12d} {line.kinds['float']:6d} {line.kinds['tensor']:6d} {line.passes:8d} "
            f"({line.conflicts:6d})"
            f" {line.sectors:7d} ({line.wasted:5d})  {'  ' * (len(place) - 1)}{name}"
        )
        below = [other for other in lines if len(other) == len(place) + 1 and other[:-1] == place]
        for other in sorted(below, key=lambda o: -lines[o].instructions):
            if lines[other].instructions >= least * total:
                show(other, total)

    for kernel in sorted((place for place in lines if len(place) == 1), key=lambda p: -lines[p].instructions):
        show(kernel, lines[kernel].instructions)
    return out


SUITE = (
    ("196x192", 98, "resident"),
    ("196x384", 98, "resident"),
    ("256x384", 128, "resident"),
    ("196x768", 49, "resident"),
    ("256x1024", 64, "resident"),
    ("196x384", 98, "spread"),
    ("576x768", 288, "gram"),
    ("576x1024", 64, "gram"),
    ("1024x128", 256, "streaming"),
)


def made(tokens: str, b: int, n: int, d: int) -> torch.Tensor:
    """(b, n, d) float32 tokens: real ones by the recipe of bench/tokens.py, or normal numbers."""
    if tokens == "random":
        return torch.randn(b, n, d, generator=torch.Generator().manual_seed(0))
    sys.path.insert(0, str(simulator.HERE.parent.parent))
    from bench.tokens import derive, real_base

    base, words = real_base()
    if base is None:
        raise SystemExit(f"no real tokens: {words}")
    return derive(base, b, n, d)[0]


def run(
    sim: simulator.Simulator, x: torch.Tensor, k: int, iterations: int, medoids: bool = False, farthest: bool = False
):
    """Counts of one call, by place (by_place)."""
    b, n, _ = x.shape
    start = torch.empty(b, 0, dtype=torch.int64) if farthest else (torch.arange(k) * n // k).expand(b, k)
    (sim.kmedoids if medoids else sim.kmeans)(x, None, None, None, start, k, iterations, False)
    return counted(sim)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1x196x384", help="images x tokens x features")
    parser.add_argument("--clusters", type=int, default=98)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--path", choices=simulator.PATHS)
    parser.add_argument("--medoids", action="store_true")
    parser.add_argument("--farthest", action="store_true", help="farthest-first start instead of a strided one")
    parser.add_argument("--tokens", default="random", choices=["random", "real"])
    parser.add_argument("--least", type=float, default=0.01, help="share of its kernel below which a line is left out")
    parser.add_argument(
        "--suite", metavar="FILE", help="instead: one image of each shape of the suite, real tokens; totals as JSON"
    )
    options = parser.parse_args(arguments)
    dtype, library = getattr(torch, options.dtype), simulator.build("count")
    if options.suite:
        records = []
        for shape, k, path in SUITE:
            lines = run(
                simulator.Simulator(library, path=path),
                made("real", 1, *map(int, shape.split("x"))).to(dtype),
                k,
                options.iterations,
            )
            kernels = {
                place[0]: {**vars(line), "kinds": dict(line.kinds)} for place, line in lines.items() if len(place) == 1
            }
            records.append({"shape": shape, "clusters": k, "path": path, "kernels": kernels})
            print(f"{shape}->{k} {path}: {sum(kernel['instructions'] for kernel in kernels.values())}")
        record = {
            "what": "warp instructions (PTX, sm_90a) and memory transactions of one image; counts, not times",
            "command": "python tests/cuda_sim/count.py " + " ".join(arguments),
            "dtype": options.dtype,
            "iterations": options.iterations,
            "records": records,
        }
        Path(options.suite).write_text(json.dumps(record, indent=1) + "\n")
        return
    x = made(options.tokens, *map(int, options.shape.split("x"))).to(dtype)
    sim = simulator.Simulator(library, path=options.path)
    lines = run(sim, x, options.clusters, options.iterations, options.medoids, options.farthest)
    print(f"{options.shape}->{options.clusters} {options.dtype}, {options.iterations} iterations, path {sim.taken}")
    print("\n".join(table(lines, options.least)))


if __name__ == "__main__":
    main(sys.argv[1:])
