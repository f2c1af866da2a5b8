"""`python -m tokenpool_ext doctor`: what is built, what would run, and a short self-test; for bug reports."""

from __future__ import annotations

import time

import torch

from . import functional
from .backends import REGISTRY
from .explain import explain

# images, tokens, features, clusters: a small ViT's, few clusters, one long sequence
SHAPES = ((4, 196, 64, 98), (2, 300, 32, 5), (1, 2000, 16, 50))


def self_test(name: str, device: str) -> str:
    """ "ok" and the time, or what is wrong: results of a backend against the plain PyTorch reference."""
    begun = time.perf_counter()
    for images, tokens, features, clusters in SHAPES:
        # Small integers: every backend must find the same labels, whatever the order of its sums.
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randint(-4, 5, (images, tokens, features), generator=generator, device="cpu").float()
        start = torch.arange(clusters, device="cpu").expand(images, clusters) * tokens // clusters
        for algorithm in (functional.kmeans, functional.kmedoids):
            want = algorithm(x, clusters, init=start, num_iters=1, backend="reference")
            got = algorithm(x.to(device), clusters, init=start.to(device), num_iters=1, backend=name)
            problem = f"{algorithm.__name__}, {images} x {tokens} tokens x {features} features -> {clusters} clusters"
            differ = int((got.assignment.cpu() != want.assignment).sum())
            if differ:
                return f"WRONG: {differ} labels of {images * tokens} differ from the reference ({problem})"
            if not torch.allclose(got.centers.cpu(), want.centers, atol=1e-5):
                return f"WRONG: cluster centers differ from the reference ({problem})"
        pooled = functional.pool(x.to(device), want.assignment.to(device), clusters, backend=name)
        back = functional.unpool(pooled, want.assignment.to(device), backend=name)
        if back.shape != x.shape or not torch.isfinite(back).all():
            return "WRONG: pool and unpool do not give the tokens' shape back"
    return f"ok, {time.perf_counter() - begun:.1f} s"


def main() -> int:
    """Print the report; 1 if a backend that says it can run gives wrong results."""
    failed = False
    print("\nplan for 64 images of 196 tokens x 384 features -> 98 clusters:")
    print(f"  {explain(64, 196, 98, 384, device='cuda' if torch.cuda.is_available() else 'cpu')}")
    print("\nself-test against the reference:")
    for name, backend in REGISTRY.items():
        device = "cuda" if name in ("cuda", "triton") else "cpu"
        reason = backend.absent() or (None if device == "cpu" or torch.cuda.is_available() else "no CUDA device")
        if reason:
            print(f"  {name:10} not here: {reason}")
            continue
        try:
            found = self_test(name, device)
        except Exception as error:  # a report must come out whatever happens
            found = f"FAILED: {type(error).__name__}: {error}"
        failed = failed or not found.startswith("ok")
        print(f"  {name:10} {found}")
    print("\nPaste all of the above into a bug report, with the shortest code that shows the fault.")
    return 1 if failed else 0
