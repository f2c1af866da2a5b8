"""flash-kmeans: its Triton path on a GPU, its PyTorch fallback on the CPU."""

from __future__ import annotations

NAME = "flash-kmeans"
PACKAGE = "flash-kmeans"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "batch_kmeans_Euclid, tol=-1 (fixed iterations); on the CPU its torch fallback"


def unavailable(problem):
    return None


def setup(data):
    p = data.problem
    if p.device == "cuda":
        from flash_kmeans import batch_kmeans_Euclid as kmeans

        x, c = data.x, data.centers.to(data.x.dtype)
    else:
        from flash_kmeans.torch_fallback import batch_kmeans_Euclid_torch_native as kmeans

        x, c = data.x32, data.centers
    return lambda: kmeans(x, p.K, max_iters=p.iters, tol=-1.0, init_centroids=c)


def centers(result, data):
    return result[1]
