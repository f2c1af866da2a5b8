"""Systems that are compared: one small file each, found by the name of the file.

A peer module has
    NAME, PACKAGE (distribution name or None), OPS, DEVICES, OBJECTIVE ("same" or "other"), NOTE
    unavailable(problem) -> str | None      why this problem cannot be given to it (checked before anything runs)
    setup(data) -> call                     everything that is not part of the job; `call()` does the whole job
    centers(result, data) -> (B, K', D)     cluster centers (or medoids) of `call()`'s result, for the inertia check
and optionally `variant(data) -> str` (which formulation was picked), START = "own" for a peer that cannot be given
initial centers, NATIVE_DTYPE = True for one that takes the problem's dtype (others get float32 copies, made
beforehand), and TOLERANCE, the relative difference of its loss that is accepted.
"""

from __future__ import annotations

import importlib

from ..machine import package_version

NAMES = (
    "scikit_learn",
    "faiss_cpu",
    "torch_eager",
    "torch_eager_gram",
    "torch_compile",
    "flash_kmeans",
    "fast_pytorch_kmeans",
    "fastkmeans",
    "superkmeans",
    "torch_kmeans",
    "kmedoids_alternating",
    "kmedoids_fasterpam",
    "cluster_loop",
    "ward",
    "bipartite",
    "attention_matrix",
    "pool_backward_eager",
)


def load(name: str):
    """Peer module by its file name; importing it never imports the peer itself."""
    if name not in NAMES:
        raise ValueError(f"unknown peer {name!r}; known: {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}")


def select(text: str) -> list[str]:
    """'all', 'none' or comma-separated names (file name or shown name)."""
    if text == "all":
        return list(NAMES)
    if text == "none":
        return []
    shown = {load(name).NAME: name for name in NAMES}
    return [shown.get(part.strip(), part.strip().replace("-", "_")) for part in text.split(",") if part.strip()]


def why_not(peer, problem) -> str | None:
    """Reason this peer is not run on this problem, or None."""
    if problem.op not in peer.OPS:
        return f"does not compute {problem.op}"
    if problem.device not in peer.DEVICES:
        return f"runs on {', '.join(peer.DEVICES)} only"
    if problem.mode == "forward+backward" and not getattr(peer, "BACKWARD", False):
        return "has no backward"
    if peer.PACKAGE and package_version(peer.PACKAGE) is None:
        return f"{peer.PACKAGE} is not installed (pip install -r bench/requirements.txt)"
    return peer.unavailable(problem)
