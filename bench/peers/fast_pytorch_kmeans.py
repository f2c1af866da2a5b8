"""fast-pytorch-kmeans, one image after the other."""

from __future__ import annotations

NAME = "fast-pytorch-kmeans"
PACKAGE = "fast-pytorch-kmeans"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "KMeans(tol=-1).fit_predict(x, centroids), loop over images; empty clusters become the zero vector"


def unavailable(problem):
    if problem.N * problem.K * 4 > 4 << 30:
        return f"its N x K float mask needs {problem.N * problem.K * 4 / 2**30:.1f} GiB"
    return None


def setup(data):
    from fast_pytorch_kmeans import KMeans

    p = data.problem

    def call():
        found = []
        for x, c in zip(data.x32, data.centers):
            kmeans = KMeans(p.K, max_iter=p.iters, tol=-1)
            kmeans.fit_predict(x, centroids=c)
            found.append(kmeans.centroids)
        return found

    return call


def centers(result, data):
    return result
