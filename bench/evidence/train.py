"""Trained from scratch: a small ViT of 196 tokens on Fashion-MNIST, then fine-tuned with each token reduction.

    python -m bench.evidence train base                   # the whole model (28 x 28 pixels, patch 2, 196 tokens)
    python -m bench.evidence train narrow                 # fewer features instead of fewer tokens: 42% fewer MACs
    python -m bench.evidence train tune --method kmeans   # from base; budgets drawn per batch, evaluated at each
    python -m bench.evidence train record                 # bench/results/evidence-train.json, from the finished runs

Any of them stopped and started again goes on from its last checkpoint (every minute), as the same run but for methods
that draw. Under `torchrun` it is data parallel. Fashion-MNIST comes from Debian's package dataset-fashion-mnist.
Intervals: 95%, paired bootstrap over test images; they say nothing of another seed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tokenpool_ext as tp
from tokenpool_ext.cost import gmacs

from .. import machine
from . import data

METHODS = {
    "none": None,  # as many steps more, with all tokens: what the others are held against
    "kmeans": lambda k: tp.TokenPooling(k),
    "kmedoids": lambda k: tp.TokenPooling(k, algorithm="kmedoids"),
    "kmeans-unweighted": lambda k: tp.TokenPooling(k, weighted=False),
    "kmedoids-unweighted": lambda k: tp.TokenPooling(k, algorithm="kmedoids", weighted=False),
    "bipartite": lambda k: tp.BipartiteMatching(k),
    "score pruning": lambda k: tp.ScorePruning(k),
    "importance": lambda k: tp.ImportanceSampling(k),
    "random": lambda k: tp.RandomSelection(k),
    "grid": lambda k: tp.GridPooling(k),
}
NARROW = 46  # features of the narrow model
BUDGETS = (0.9, 0.8, 0.7, 0.58, 0.45, 0.35)  # shares of the whole model's MACs


class Block(nn.Module):
    """Pre-norm transformer block; also returns the attention that each token received."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, sizes=None):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = None if sizes is None else sizes.log()[:, None, None].to(q.dtype)
        # Plain products: under bfloat16 autocast a step takes two thirds of the time of the CPU's fused attention.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = (logits if bias is None else logits + bias).softmax(-1, dtype=logits.dtype)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, n, d))
        x = x + self.mlp(self.norm2(x))
        return x, weights.detach().sum((1, 2), dtype=torch.float32)


class ViT(nn.Module):
    """28 x 28 pixels in patches of 2: 196 tokens and a class token. `reduce` maps a block to a token reduction."""

    def __init__(self, dim: int = 64, depth: int = 6, heads: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 197, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)
        self.reduce: dict[int, nn.Module] = {}

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        sizes = None
        for i, block in enumerate(self.blocks):
            x, scores = block(x, sizes)
            if i in self.reduce:
                sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
                x, sizes = self.reduce[i](x, scores, sizes=sizes)
        return self.head(self.norm(x)[:, 0])


def cost(model: ViT, reduce: dict[int, nn.Module]) -> float:
    """GMAC of one image, as tokenpool_ext counts them: clustering and matching included."""
    model.reduce = reduce
    return gmacs(model, torch.zeros(1, 1, 28, 28))


@functools.cache  # it takes a second; evaluation and record ask often
def schedule(method: str, budget: float) -> tuple[dict[int, int], float]:
    """Block -> patch tokens kept after it, and the share of the whole model's MACs: at most `budget`, methods count.

    One ratio after the blocks at 1/6, 1/2 and 2/3 of the depth.
    """
    model = ViT()
    layers, whole = (model.depth // 6 - 1, model.depth // 2 - 1, 2 * model.depth // 3 - 1), cost(model, {})

    def kept(thousandth: int) -> tuple[dict[int, int], float]:
        counts, n = {}, 196
        for layer in layers:
            counts[layer] = n = max(1, round(n * thousandth / 1000))
        return counts, cost(model, reductions(method, counts)) / whole

    low, high = 1, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle)[1] <= budget else (low, middle)
    return kept(low)


def pictures(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """("train" | "t10k") -> images (n, 1, 28, 28) float32, standardised, labels (n,)."""
    images, labels = data.fashion(split)
    return (torch.from_numpy(images.copy())[:, None].float() / 255 - 0.286) / 0.353, labels


def reductions(method: str, counts: dict[int, int]) -> dict[int, nn.Module]:
    make = METHODS[method]
    return {} if make is None else {i: make(k) for i, k in counts.items()}


def run(args) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(args.seed)
    tuning = args.what == "tune"
    dim = NARROW if args.what == "narrow" else 64
    model = ViT(dim)
    name = f"{args.what}-{args.method.replace(' ', '_') + '-' if tuning else ''}{args.epochs:g}-{args.seed}"
    folder = Path(args.cache)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.pt"
    if tuning:
        model.load_state_dict(torch.load(folder / f"base-{args.base_epochs:g}-{args.seed}.pt")["model"])
    peak = args.lr or (3e-4 if tuning else 2e-3)
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}])
    images, labels = pictures("train")
    batch = args.batch // world
    per_epoch = len(images) // args.batch
    steps, step, spent = int(args.epochs * per_epoch), 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    budgets = (
        {budget: schedule(args.method, budget)[0] for budget in BUDGETS} if tuning and METHODS[args.method] else {}
    )
    forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    start = saved = time.time()

    def save(**results):
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **results}
            torch.save({**state, "seconds": spent + time.time() - start}, f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)

    while step < steps:
        # The order and the augmentation depend on the seed and the step alone, so a run that goes on is the same run.
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step // per_epoch)
        order = torch.randperm(len(images), generator=draw)
        draw.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        take = order[(step % per_epoch) * args.batch :][rank * batch : (rank + 1) * batch]
        x, y = images[take], labels[take]
        if torch.rand((), generator=draw) < 0.5:
            x = x.flip(3)
        shift = torch.randint(-2, 3, (2,), generator=draw)
        x = x.roll(tuple(int(s) for s in shift), (2, 3))
        rate = peak * min(1, (step + 1) / (0.05 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if tuning:
            shared = torch.Generator().manual_seed(args.seed + step)
            drawn = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=shared))]
            model.reduce = reductions(args.method, budgets.get(drawn, {}))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(forward(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 and rank == 0:
            pace = (spent + time.time() - start) / step
            print(
                f"{name}: step {step} of {steps}, loss {loss.item():.3f}, {pace * (steps - step):.0f} s left",
                flush=True,
            )
        if time.time() - saved > 60:
            save()
            saved = time.time()
    save()
    if rank > 0:
        return
    test = [t[: args.test] for t in pictures("t10k")]
    right = {}  # (method, budget) -> which test images are right
    for budget in budgets or (1.0,):
        model.reduce = reductions(args.method, budgets.get(budget, {}))
        right[args.method if tuning else args.what, budget] = correct(model, *test, args.bf16)
    if args.what == "base":  # off the shelf, before any fine-tuning
        for method, budget in itertools.product(METHODS, BUDGETS):
            if METHODS[method]:
                model.reduce = reductions(method, schedule(method, budget)[0])
                right[method, budget] = correct(model, *test, args.bf16)
    for (method, budget), found in right.items():
        print(f"{name}: {method}, {budget:g}: {found.float().mean():.4f}", flush=True)
    save(right=right, about={"what": args.what, "epochs": args.epochs, "seed": args.seed, "bf16": args.bf16})


@torch.no_grad()
def correct(model: ViT, images: torch.Tensor, labels: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    """(n,) bool: which images are put into their class."""
    torch.manual_seed(0)  # for the methods that draw
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = torch.cat([model(x).argmax(1) for x in images.split(250)])
    model.train()
    return found == labels


def record(args) -> Path:
    """The finished runs, each against the whole model trained as long and against WK-Means of the same seed.

    Records of other seeds stay as they are.
    """
    runs = [torch.load(path) for path in sorted(Path(args.cache).glob("*.pt"))]
    runs = [run for run in runs if "right" in run]
    all_right: dict[tuple, tuple] = {}
    for run in runs:
        for key, found in run["right"].items():
            key = (run["about"]["seed"], run["about"]["what"] == "tune", *key)
            if key in all_right:
                raise ValueError(f"two runs of {key} in {args.cache}: leave one of them there")
            all_right[key] = (found, run)
    old, whole = data.load("train"), cost(ViT(), {})
    records = [row for row in old["records"] if row["seed"] not in {seed for seed, *_ in all_right}]
    for (seed, tuned, method, budget), (found, run) in all_right.items():
        row = {"method": method, "tuned": tuned, "seed": seed}
        row |= {name: run["about"][name] for name in ("epochs", "bf16")}
        if method in ("base", "none", "narrow"):
            row["macs"] = round(cost(ViT(NARROW), {}) / whole, 3) if method == "narrow" else 1.0
        else:
            counts, share = schedule(method, budget)
            row |= {"budget": budget, "counts": list(counts.values()), "macs": round(share, 3)}
        row["accuracy"] = round(found.double().mean().item(), 4)
        # The narrow model saw as many images as the base and its fine-tuning together.
        last = tuned or method == "narrow"
        references = {"all": (seed, last, "none" if last else "base", 1.0), "wkmeans": (seed, last, "kmeans", budget)}
        if method == "narrow":
            references["wkmeans"] = (seed, last, "kmeans", 0.58)
        for name, key in references.items():
            if key in all_right and all_right[key][0] is not found:
                row |= data.difference(f"minus_{name}", found.double() - all_right[key][0].double())
        records.append(row)
    stamps = old.get("seeds") or {"0": {k: old[k] for k in ("machine", "versions", "commit", "command", "date")}}
    stamps |= {str(seed): machine.stamp("bench.evidence") for seed, *_ in all_right}  # the record's own is its last
    about = {
        "what": "ViT of 6 blocks, 64 features, 2 heads, 196 tokens from scratch on Fashion-MNIST",
        "images": len(next(iter(all_right.values()))[0]),
        "seconds": old["seconds"]
        | {
            f"{r['about']['what']} {next(iter(r['right']))[0]}, seed {r['about']['seed']}": round(r["seconds"])
            for r in runs
        },
        "seeds": stamps,
    }
    return data.save("train", about, {"records": records})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("base", "narrow", "tune", "record"))
    parser.add_argument("--method", choices=tuple(METHODS), default="kmeans")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--base-epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--cache", default=str(data.CACHE / "train"))
    args = parser.parse_args(argv)
    if args.what == "record":
        print(record(args))
    else:
        run(args)
    return 0
