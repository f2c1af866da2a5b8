"""What is measured: one `Problem` is one row group of the table.

Shapes are written ``NxD:K``: N tokens of D features pooled to K clusters. For `attention_received`
the same text means N tokens, D features a head, K heads.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict, dataclass

OPS = ("kmeans", "kmedoids", "pool_backward", "attention_received")
MODES = ("forward", "forward+backward")
DTYPES = ("float64", "float32", "bfloat16", "float16")

# (label, N, D, K): sizes of public models.
SUITES = {
    "vit": [
        ("DeiT-Ti", 196, 192, 98),
        ("DeiT-S", 196, 384, 98),
        ("DINOv2-S", 256, 384, 128),
        ("ViT-B", 196, 768, 49),
        ("ViT-B/384", 576, 768, 288),
        ("ViT-L/14", 256, 1024, 64),
        ("CLIP-L/336", 576, 1024, 64),
    ],
    "retrieval": [("ColPali page", 1030, 128, 343)],
    "long": [("latent", 4096, 320, 1024), ("video", 75600, 128, 1000)],
}
QUICK_SHAPE = ("DINOv2-S", 256, 384, 128)
ATTENTION_SUITE = [("DeiT-S", 197, 64, 6), ("ViT-B/384", 577, 64, 12), ("1025 tokens", 1025, 64, 12)]
LARGEST_INPUT_BYTES = 2 << 30  # a (shape, batch) whose tokens exceed this is left out of a suite, and said so


@dataclass(frozen=True)
class Problem:
    """One thing to time. B images of N tokens of D features, K clusters, T = iters."""

    op: str
    B: int
    N: int
    D: int
    K: int
    iters: int = 5
    dtype: str = "float32"
    mode: str = "forward"
    device: str = "cpu"
    tokens: str = "random"
    label: str = ""

    def __post_init__(self):
        for name, allowed in (("op", OPS), ("dtype", DTYPES), ("mode", MODES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("B", "N", "D", "K", "iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.op != "attention_received" and self.K > self.N:
            raise ValueError(f"K must be <= N, got K={self.K}, N={self.N}")

    @property
    def shape(self) -> str:
        return f"{self.N}x{self.D}:{self.K}"

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def input_bytes(self) -> int:
        heads = 2 * self.K if self.op == "attention_received" else 1
        return self.B * self.N * self.D * heads * self.itemsize

    def title(self) -> str:
        what = f"{self.op} {self.shape}"
        iters = f", {self.iters} iterations" if self.op in ("kmeans", "kmedoids") else ""
        label = f" ({self.label})" if self.label else ""
        mode = "" if self.mode == "forward" else f", {self.mode}"
        return f"{what}{label}, batch {self.B}, {self.dtype}{iters}{mode}, {self.device}, {self.tokens} tokens"

    def as_dict(self) -> dict:
        return {**asdict(self), "shape": self.shape}


def parse_shapes(text: str) -> list[tuple[str, int, int, int]]:
    """'256x384:128,196x768:49' -> [("", 256, 384, 128), ...]."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+):(\d+)\s*", part)
        if not match:
            raise ValueError(f"--shapes expects NxD:K[,NxD:K...], for example 256x384:128; got {part!r}")
        shapes.append((known_label(*map(int, match.groups())), *map(int, match.groups())))
    return shapes


def known_label(N: int, D: int, K: int) -> str:
    every = list(itertools.chain(*SUITES.values(), ATTENTION_SUITE))
    return next((label for label, *shape in every if shape == [N, D, K]), "")


def suite_shapes(name: str) -> list[tuple[str, int, int, int]]:
    if name == "all":
        return [shape for suite in SUITES.values() for shape in suite]
    if name == "quick":
        return [QUICK_SHAPE]
    if name not in SUITES:
        raise ValueError(f"--suite must be one of {', '.join(SUITES)}, all; got {name!r}")
    return list(SUITES[name])


def problems(
    *,
    suite="vit",
    shapes=None,
    batches=(64,),
    dtypes=("float32",),
    ops=("kmeans",),
    iters=(5,),
    mode="forward",
    device="cpu",
    tokens="random",
):
    """Every combination asked for -> (list of Problem, list of messages about combinations left out)."""
    found, left_out = [], []
    for op in ops:
        attention = ATTENTION_SUITE[:1] if suite == "quick" else ATTENTION_SUITE
        chosen = shapes or (attention if op == "attention_received" else suite_shapes(suite))
        rounds = iters if op in ("kmeans", "kmedoids") else (iters[0],)
        for (label, N, D, K), B, dtype, T in itertools.product(chosen, batches, dtypes, rounds):
            problem = Problem(op, B, N, D, K, T, dtype, mode, device, tokens, label)
            if op == "kmedoids" and N > 8192:
                left_out.append(f"{problem.title()}: K-Medoids needs an N x N matrix, N <= 8192 here")
            elif problem.input_bytes > LARGEST_INPUT_BYTES:
                left_out.append(f"{problem.title()}: input of {problem.input_bytes / 2**30:.1f} GiB")
            else:
                found.append(problem)
    return found, left_out
