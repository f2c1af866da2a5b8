"""Trained from scratch: a small ViT of 196 tokens on Fashion-MNIST, then fine-tuned with each token reduction.

    python -m bench.evidence.train base                   # the whole model (28 x 28 pixels, patch 2, 196 tokens)
    python -m bench.evidence.train narrow                 # fewer features instead of fewer tokens: 42% fewer MACs
    python -m bench.evidence.train tune --method kmeans   # from base; budgets drawn per batch, evaluated at each
    python -m bench.evidence.train table                  # the table, from the records

Any of them stopped and started again goes on from its last checkpoint (every minute). Under `torchrun` it is data
parallel. Fashion-MNIST comes from Debian's package dataset-fashion-mnist (or --data DIR with the four .gz files).
Records: one line a run in bench/results/evidence-train.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tokenpool_ext as tp
from bench import machine

RECORD = Path(__file__).parents[1] / "results" / "evidence-train.json"
METHODS = {
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
    """Pre-norm transformer block; also returns the attention that each token received, when asked."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, sizes=None, want_scores=False):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = None if sizes is None else sizes.log()[:, None, None].to(q.dtype)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, d))
        x = x + self.mlp(self.norm2(x))
        return x, tp.attention_received(q, k) if want_scores else None


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
            layer = self.reduce.get(i)
            x, scores = block(x, sizes, layer is not None and layer.needs_scores)
            if layer is not None:
                sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
                x, sizes = layer(x, scores, sizes=sizes)
        return self.head(self.norm(x)[:, 0])


def macs(dim: int, depth: int, counts: dict[int, int], clustering: bool) -> int:
    """Multiply-adds of one image, a Gram product a pooling included; counts: patch tokens after a block."""
    total, n = 196 * 4 * dim + 10 * dim, 196
    for i in range(depth):
        total += 12 * (n + 1) * dim * dim + 2 * (n + 1) ** 2 * dim
        if i in counts:
            total += n * n * dim if clustering else 0
            n = counts[i]
    return total


def schedule(budget: float, dim: int = 64, depth: int = 6) -> dict[int, int]:
    """A constant keep ratio after the blocks at 1/6, 1/2 and 2/3 of the depth that comes nearest to `budget`."""
    layers, whole = (depth // 6 - 1, depth // 2 - 1, 2 * depth // 3 - 1), macs(dim, depth, {}, False)
    best = None
    for thousandth in range(100, 1000, 2):
        counts, n = {}, 196
        for layer in layers:
            n = max(1, round(n * thousandth / 1000))
            counts[layer] = n
        miss = abs(macs(dim, depth, counts, True) / whole - budget)
        if best is None or miss < best[0]:
            best = (miss, counts)
    return best[1]


def fashion_mnist(folder: str, train: bool):
    """(images (n, 1, 28, 28) float32 standardised, labels (n,))."""
    kind = "train" if train else "t10k"

    def read(name, skip):
        return torch.frombuffer(bytearray(gzip.open(Path(folder) / name).read()[skip:]), dtype=torch.uint8)

    images = read(f"{kind}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28).float() / 255
    return (images - 0.286) / 0.353, read(f"{kind}-labels-idx1-ubyte.gz", 8).long()


def run(args) -> dict:
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
    images, labels = fashion_mnist(args.data, True)
    batch = args.batch // world
    per_epoch = len(images) // args.batch
    steps, step, spent = int(args.epochs * per_epoch), 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    budgets = {budget: schedule(budget) for budget in BUDGETS}
    forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    start = saved = time.time()

    def save():
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
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
            counts = budgets[BUDGETS[int(torch.randint(len(BUDGETS), (), generator=shared))]]
            model.reduce = {i: METHODS[args.method](k) for i, k in counts.items()}
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
    whole = macs(64, 6, {}, False)
    out = {
        "run": name,
        "method": args.method if tuning else args.what,
        "epochs": args.epochs,
        "seed": args.seed,
        "test": args.test,
    }
    out["seconds"] = round(spent + time.time() - start)
    if tuning:
        out["accuracy"] = {}
        for budget, counts in budgets.items():
            torch.manual_seed(0)
            model.reduce = {i: METHODS[args.method](k) for i, k in counts.items()}
            clusters = args.method.startswith(("kmeans", "kmedoids"))
            cost = macs(64, 6, counts, clusters) / whole
            out["accuracy"][f"{budget:g}"] = [
                round(accuracy(model, args), 2),
                round(cost, 3),
                list(counts.values()),
            ]
    else:
        out["accuracy"] = {"whole": [round(accuracy(model, args), 2), round(macs(dim, 6, {}, False) / whole, 3)]}
        if args.what == "base":  # off the shelf, before any fine-tuning
            out["untuned"] = {}
            for method, make in METHODS.items():
                torch.manual_seed(0)
                rows = {}
                for budget, counts in budgets.items():
                    model.reduce = {i: make(k) for i, k in counts.items()}
                    rows[f"{budget:g}"] = round(accuracy(model, args), 2)
                out["untuned"][method] = rows
    return out if rank == 0 else {}


@torch.no_grad()
def accuracy(model: ViT, args) -> float:
    """Top-1 on the first `--test` of the 10,000 test images, in percent."""
    images, labels = (t[: args.test] for t in fashion_mnist(args.data, False))
    model.eval()
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    model.train()
    return right / len(labels) * 100


def records() -> list[dict]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def table() -> str:
    """Markdown: accuracy at each budget, mean over seeds."""
    rows, found = [], records()
    for record in found:
        if record["method"] in ("base", "narrow"):
            accuracy, share = record["accuracy"]["whole"]
            rows.append(f"| {record['method']} ({share:.2f} of the MACs, seed {record['seed']}) | {accuracy} |")
    lines = ["| model | top-1 |", "|---|---|", *rows, ""]
    for key, title in (("accuracy", "fine-tuned"), ("untuned", "off the shelf")):
        lines += [f"| {title}, share of MACs | " + " | ".join(f"{b:g}" for b in BUDGETS) + " |", "|---" * 7 + "|"]
        for method in METHODS:
            runs = [r["accuracy"] for r in found if r["method"] == method]
            if key == "untuned":
                runs = [r["untuned"][method] for r in found if "untuned" in r]
                runs = [{b: [v] for b, v in r.items()} for r in runs]
            if runs:
                means = [sum(r[f"{b:g}"][0] for r in runs) / len(runs) for b in BUDGETS]
                lines.append(f"| {method} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "narrow", "tune", "table"))
    parser.add_argument("--method", choices=tuple(METHODS), default="kmeans")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--base-epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/tokenpool_ext/train"))
    args = parser.parse_args()
    if args.what == "table":
        print(table())
        return
    out = run(args)
    if out:
        stamp = machine.stamp("bench.evidence.train")
        out["machine"] = {key: stamp[key] for key in ("date", "commit", "cpu", "torch") if key in stamp}
        with open(RECORD, "a") as file:
            file.write(json.dumps(out) + "\n")
        print(json.dumps(out))


if __name__ == "__main__":
    main()
