"""torch_kmeans, batched."""

from __future__ import annotations

NAME = "torch_kmeans"
PACKAGE = "torch-kmeans"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "KMeans(num_init=1)(x, centers=...), batched; it loops over images and clusters for the means"
LARGEST = 1 << 25  # N * K * D above which one image takes many seconds


def unavailable(problem):
    size = problem.N * problem.K * problem.D
    if problem.device == "cpu" and size > LARGEST:
        return f"one image would take about {size * problem.iters / 9e7:.0f} s (it makes N x K x D temporaries)"
    if problem.K >= problem.N or problem.K < 2:
        return "needs 1 < K < N"
    return None


def setup(data):
    from torch_kmeans import KMeans

    p = data.problem

    def call():
        return KMeans(num_init=1, max_iter=p.iters, tol=0, n_clusters=p.K, verbose=False)(
            data.x32, k=p.K, centers=data.centers
        )

    return call


def centers(result, data):
    return result.centers.reshape(data.images, data.problem.K, data.problem.D)
