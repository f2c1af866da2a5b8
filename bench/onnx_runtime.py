"""ONNX Runtime's time of a ViT exported unpooled and pooled, beside PyTorch's, and how far apart their results are.

    python -m bench.onnx_runtime [--batch 8] [--json OUT]

A ViT-S-shaped encoder of random weights (12 blocks, width 384, 6 heads, 197 tokens), pooled after blocks 3, 6 and 9 at
keep_ratio 0.5, weighted by the attention received. Needs onnxscript and onnxruntime. Seconds a batch: the median of
rounds in which the four take turns, one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import tokenpool_ext as tp

from . import machine, timing


class Block(nn.Module):
    def __init__(self, width: int, heads: int, pooling: nn.Module | None) -> None:
        super().__init__()
        self.heads, self.pooling = heads, pooling
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        return x if self.pooling is None else self.pooling(x, tp.attention_received(q, k))


def encoder(pooled: bool) -> nn.Module:
    torch.manual_seed(0)
    pooling = [tp.TokenPooling(keep_ratio=0.5) if pooled and i in (3, 6, 9) else None for i in range(12)]
    return nn.Sequential(*(Block(384, 6, layer) for layer in pooling), nn.LayerNorm(384)).eval()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.onnx_runtime", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    import onnxruntime

    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    x = torch.randn(args.batch, 197, 384, generator=torch.Generator().manual_seed(1))
    batch = torch.export.Dim("batch", min=1, max=1024)
    calls, apart, nodes = {}, {}, {}
    for name, pooled in (("unpooled", False), ("pooled", True)):
        model = encoder(pooled)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            program = torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
            program.save(Path(folder) / "model.onnx")
            session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", options, ["CPUExecutionProvider"])
            want = model(x)
        feed = {session.get_inputs()[0].name: x.numpy()}
        got = torch.from_numpy(session.run(None, feed)[0])
        apart[name], nodes[name] = (got - want).abs().max().item(), len(program.model_proto.graph.node)
        calls[f"{name}, ONNX Runtime"] = lambda session=session, feed=feed: session.run(None, feed)
        calls[f"{name}, PyTorch"] = lambda model=model: model(x)
    clock, samples = timing.WallClock(), {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for name, call in calls.items():
                samples[name].append(clock.seconds(call, 1))
    seconds = {name: timing.percentiles(values[1:]) for name, values in samples.items()}
    for name, found in seconds.items():
        print(f"{name:26s} {found['p50'] * 1e3:8.1f} ms")
    print(f"largest difference {apart}, nodes {nodes}, onnxruntime {onnxruntime.__version__}")
    if args.json:
        record = {"schema": 1, **machine.stamp("bench.onnx_runtime", "cpu"), "onnxruntime": onnxruntime.__version__}
        record.update(batch=args.batch, seconds=seconds, largest_difference=apart, nodes=nodes)
        Path(args.json).write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
