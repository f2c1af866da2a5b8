"""Input data: real ViT tokens (or tokens derived from them), or random ones; never zeros.

Real tokens are DINOv2 ViT-S/14 tokens of photographs, 256 tokens (16 x 16 grid) of 384 features. Other sizes are
derived by one fixed recipe, which is written into the record:
1. the 16 x 16 grid is resized bilinearly to the smallest square grid with at least N tokens; the first N in raster
   order are kept;
2. features are multiplied by a matrix with orthonormal rows or columns (QR of a seeded Gaussian), 384 -> D;
3. Gaussian noise of 0.1 standard deviations (of that image's features, all together) is added, so that interpolated
   tokens are not exact combinations of their neighbours.
Where the batch is larger than the number of real images, images repeat with fresh noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .problem import Problem

CACHE = Path(__file__).resolve().parent / ".cache"
GRID, FEATURES = 16, 384
NOISE = 0.1
BASE_IMAGES = 64


@dataclass
class Data:
    """Inputs of one problem, shared by every provider."""

    problem: Problem
    x: torch.Tensor  # (B, N, D) problem.dtype on problem.device; attention_received: q (B, K heads, N, D)
    x32: torch.Tensor  # (B, N, D) float32, the same values
    init: torch.Tensor  # (B, K) int64 distinct token indices
    centers: torch.Tensor  # (B, K, D) float32 initial centers = x32 rows at init
    tokens: str  # what the tokens are
    k: torch.Tensor | None = None  # attention_received: keys

    @property
    def images(self) -> int:
        return self.x.shape[0]

    def take(self, images: int) -> Data:
        """The first `images` images."""
        if images >= self.images:
            return self
        return replace(
            self,
            x=self.x[:images],
            x32=self.x32[:images],
            init=self.init[:images],
            centers=self.centers[:images],
            k=None if self.k is None else self.k[:images],
        )


def real_base(images: int = BASE_IMAGES) -> tuple[torch.Tensor | None, str]:
    """(images, 256, 384) float32 real tokens from the cache or the demo's pretrained model, or (None, reason)."""
    found, words = real_with_scores(images)
    return (None, words) if found is None else (found["tokens"], words)


def real_with_scores(images: int = BASE_IMAGES) -> tuple[dict | None, str]:
    """{"tokens": (images, 256, 384), "scores": (images, 256) attention received}, or (None, reason)."""
    path = CACHE / f"real_{images}x{GRID * GRID}x{FEATURES}.pt"
    if path.exists():
        return torch.load(path, weights_only=True), "real"
    try:
        from tokenpool_ext.demo.tokens import real_tokens
    except ImportError as error:
        return None, f"no cache at bench/.cache and no tokenpool_ext.demo ({error})"
    try:
        tokens, scores = real_tokens(images, with_scores=True)
    except Exception as error:  # download, licence or shape trouble: the reason goes into the record
        return None, f"tokenpool_ext.demo could not make them ({type(error).__name__}: {error})"
    tokens, scores = tokens.detach().float().contiguous(), scores.detach().float().contiguous()
    if tuple(tokens.shape[1:]) != (GRID * GRID, FEATURES):
        return None, f"tokenpool_ext.demo gave shape {tuple(tokens.shape)}, expected (*, {GRID * GRID}, {FEATURES})"
    CACHE.mkdir(exist_ok=True)
    torch.save({"tokens": tokens, "scores": scores}, path)
    return {"tokens": tokens, "scores": scores}, "real"


def derive(base: torch.Tensor, B: int, N: int, D: int, seed: int = 0) -> tuple[torch.Tensor, str]:
    """(B, N, D) float32 tokens by the recipe above, and the recipe in words."""
    generator = torch.Generator().manual_seed(seed)
    x = base[torch.arange(B) % base.shape[0]]
    steps = ["real"]
    noisy = False
    if N != GRID * GRID:
        side = math.ceil(math.sqrt(N))
        grid = x.reshape(B, GRID, GRID, FEATURES).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
        x = grid.permute(0, 2, 3, 1).reshape(B, side * side, FEATURES)[:, :N]
        steps.append(f"grid {GRID}x{GRID} -> {side}x{side} bilinear, first {N}")
        noisy = True
    if D != FEATURES:
        tall = torch.randn(max(D, FEATURES), min(D, FEATURES), generator=generator)
        orthonormal = torch.linalg.qr(tall).Q
        x = x @ (orthonormal if D < FEATURES else orthonormal.T)
        steps.append(f"orthonormal map {FEATURES} -> {D}")
        noisy = True
    if noisy or base.shape[0] < B:
        deviation = x.std(dim=(1, 2), keepdim=True)
        x = x + NOISE * deviation * torch.randn(x.shape, generator=generator)
        steps.append(f"noise {NOISE} std")
    return x.contiguous(), "; ".join(steps)


def random_tokens(B: int, N: int, D: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, D, generator=generator)


def distinct_indices(B: int, N: int, K: int, seed: int = 1) -> torch.Tensor:
    """(B, K) int64: K different tokens an image, uniformly at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(B)])


_base: dict = {}


def make(problem: Problem, seed: int = 0) -> Data:
    """Inputs of a problem; when real tokens cannot be had, random ones, and `Data.tokens` says why."""
    B, N, D, K = problem.B, problem.N, problem.D, problem.K
    dtype = getattr(torch, problem.dtype)
    if problem.op == "attention_received":
        generator = torch.Generator().manual_seed(seed)
        q, k = (torch.randn(B, K, N, D, generator=generator).to(problem.device, dtype) for _ in range(2))
        empty = torch.empty(B, 0)
        return Data(problem, q, empty, empty, empty, "random normal q and k", k)
    if problem.tokens == "real":
        if "base" not in _base:
            _base["base"] = real_base()
        base, reason = _base["base"]
        x, words = (
            derive(base, B, N, D, seed)
            if base is not None
            else (random_tokens(B, N, D, seed), f"random (real tokens were asked for: {reason})")
        )
    else:
        x, words = random_tokens(B, N, D, seed), "random"
    x = x.to(problem.device, dtype)
    x32 = x.float() if dtype != torch.float64 else x
    init = distinct_indices(B, N, K).to(problem.device)
    centers = x32.gather(1, init[..., None].expand(-1, -1, D))
    return Data(problem, x, x32.contiguous(), init, centers.contiguous(), words)
