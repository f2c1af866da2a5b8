"""faiss.Kmeans on the CPU, one image after the other."""

from __future__ import annotations

NAME = "faiss-cpu"
PACKAGE = "faiss-cpu"
OPS = ("kmeans",)
DEVICES = ("cpu",)
OBJECTIVE = "same"
NOTE = "faiss.Kmeans.train(x, init_centroids), all points used, loop over images; returns centers, no labels"


def unavailable(problem):
    return None


def setup(data):
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    p = data.problem
    pairs = [(x.numpy(), c.numpy()) for x, c in zip(data.x32, data.centers)]

    def call():
        found = []
        for x, c in pairs:
            kmeans = faiss.Kmeans(p.D, p.K, niter=p.iters, min_points_per_centroid=1, max_points_per_centroid=1 << 30)
            kmeans.train(x, init_centroids=c)
            found.append(kmeans.centroids)
        return found

    return call


def centers(result, data):
    return result
