"""``python -m bench``: time tokenpool_ext against other systems, in one run, on the same tokens.

Examples
    python -m bench --quick
    python -m bench --suite vit --batch 64 --peers all --floor --json bench/results/cpu-vit-b64.json
    python -m bench --op kmedoids --shapes 256x384:128 --batch 64
    python -m bench --op attention_received --batch 8
    python -m bench --op pool_backward --shapes 256x384:128 --dtype float32,bfloat16 --floor
    python -m bench --device cuda --dtype bfloat16 --batch 1,64,256 --json bench/results/gpu.json
The figure: ``python -m bench.plot RESULT.json``. Other questions: ``python -m bench.init_study``,
``python -m bench.crossover``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ints(text: str) -> list[int]:
    return [int(part) for part in _list(text)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--suite", default="vit", choices=["vit", "long", "retrieval", "all"], help="shapes of real models")
    p.add_argument(
        "--shapes", help="instead of a suite: NxD:K[,...]; for attention_received tokens x head size : heads"
    )
    p.add_argument("--batch", type=_ints, default=[64], metavar="B,...", help="images a call (default 64)")
    p.add_argument("--dtype", type=_list, default=["float32"], metavar="T,...", help="float32,bfloat16,float16,float64")
    p.add_argument(
        "--op",
        type=_list,
        default=["kmeans"],
        metavar="OP,...",
        help="kmeans,kmedoids,pool_backward,attention_received",
    )
    p.add_argument("--iters", type=_ints, default=[5], metavar="T,...", help="iterations (default 5)")
    p.add_argument("--mode", default="forward", choices=["forward", "forward+backward"])
    p.add_argument("--peers", default="all", help="all, none, or names (see bench/peers)")
    p.add_argument(
        "--backend",
        type=_list,
        default=[],
        metavar="NAME,...",
        help="time these backends of ours instead of the one the library chooses",
    )
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--threads", type=int, default=2, help="CPU threads for everyone (default 2)")
    p.add_argument("--tokens", default="real", choices=["real", "random"])
    p.add_argument("--json", metavar="OUT", help="write the records there (after every problem)")
    p.add_argument("--floor", action="store_true", help="measure peak rates first and print time over floor")
    p.add_argument("--repeats", type=int, default=11, help="timed rounds (default 11)")
    p.add_argument(
        "--wait-idle",
        type=float,
        default=0,
        metavar="S",
        help="wait up to S seconds for other processes to leave the cores alone (CPU only)",
    )
    p.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: CPU time of the process instead of elapsed time; for --threads 1 on a busy machine",
    )
    p.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    p.add_argument(
        "--quick",
        action="store_true",
        help="under a minute: one shape, batch 8, 5 rounds, no torch.compile and none of the slowest",
    )
    p.add_argument(
        "--break-even", action="store_true", help="name the problems where ours is not the fastest, at the end"
    )
    return p


NOISY = 0.3  # cores used by other processes above which CPU times are called untrustworthy
QUICK_SKIP = {"torch_compile", "torch_kmeans", "superkmeans"}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))  # read by every OpenMP runtime when it is loaded
    import torch

    torch.set_num_threads(args.threads)
    from . import floor, machine, peers, report, runner
    from .problem import parse_shapes, problems

    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this torch sees no CUDA device", file=sys.stderr)
        return 2
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        print("--clock cpu adds up the time of all threads: use it with --threads 1 on the CPU", file=sys.stderr)
        return 2
    names = [n for n in peers.select(args.peers) if not (args.quick and args.peers == "all" and n in QUICK_SKIP)]
    settings = runner.Settings(repeats=args.repeats, memory=not args.no_memory, clock=args.clock)
    shapes, batches = parse_shapes(args.shapes) if args.shapes else None, args.batch
    if args.quick:
        settings = runner.Settings(repeats=5, sample_s=0.15, problem_s=8.0, memory=not args.no_memory, clock=args.clock)
        batches = [8] if args.batch == [64] else args.batch
    todo, left_out = problems(
        suite="quick" if args.quick else args.suite,
        shapes=shapes,
        batches=batches,
        dtypes=args.dtype,
        ops=args.op,
        iters=args.iters,
        mode=args.mode,
        device=args.device,
        tokens=args.tokens,
    )
    for message in left_out:
        print(f"left out: {message}")
    context = {**machine.stamp(device=args.device), "threads": args.threads, "nice": os.nice(0)}
    if args.device == "cpu":
        used = machine.wait_idle(args.wait_idle)
        if (used or 0) >= NOISY and args.clock == "wall":
            print(f"note: other processes use {used} of {os.cpu_count()} cores: times will be wrong (see --wait-idle)")
    rates = None
    if args.floor:
        rates = floor.measure(args.device, args.threads)
        print(f"rates of this machine now: {floor.describe(rates)}")
    providers = [runner.our_provider(b) for b in (args.backend or [None])] + [runner.peer_provider(n) for n in names]
    records: list[dict] = []
    began = time.perf_counter()
    for index, problem in enumerate(todo):
        print(f"\n[{index + 1}/{len(todo)}, {time.perf_counter() - began:.0f} s] {problem.title()}", flush=True)
        chosen, skip = [], {}
        for provider in providers:
            reason = None if provider.is_ours else peers.why_not(provider.module, problem)
            if reason and reason.startswith("does not compute"):
                continue
            chosen.append(provider)
            if reason:
                skip[provider.name] = reason
        found = runner.run(problem, chosen, settings, context, floors=rates, skip=skip)
        print(f"  tokens: {found[0]['tokens_used']}" if found else "  nothing to run")
        print(report.table(found), flush=True)
        busy = next((r["others_cpu_cores"] for r in found if r.get("others_cpu_cores") is not None), 0)
        if busy >= NOISY and args.device == "cpu" and args.clock == "wall":
            print(f"  NOT TO BE TRUSTED: other processes used {busy} cores during these timings")
        records += found
        if args.json:
            write(Path(args.json), context, settings, rates, records, left_out)
    print("\n" + report.summary(records))
    if args.break_even:
        print("\n" + break_even(records, report))
    if args.json:
        print(f"{len(records)} records in {args.json} ({time.perf_counter() - began:.0f} s)")
    return 0


def break_even(records: list[dict], report) -> str:
    lines = []
    for group in report.by_problem(records).values():
        peer = report.best_peer(group)
        if peer and peer.get("time_over_ours", {"p50": 2})["p50"] < 1:
            lines.append(
                f"  {peer['op']} {peer['shape']} batch {peer['B']} T={peer['iters']} {peer['dtype']}: "
                f"{peer['provider']} takes {peer['time_over_ours']['p50']:.2f} of our time"
            )
    return "\n".join(["Problems where a peer is faster than ours:", *(lines or ["  none"])])


def write(path: Path, context: dict, settings, rates, records: list[dict], left_out: list[str]) -> None:
    from . import machine

    content = {
        "schema": 1,
        **context,
        "settings": vars(settings),
        "rates": rates,
        "left_out": left_out,
        "records": records,
    }
    machine.write(path, content)


if __name__ == "__main__":
    sys.exit(main())
