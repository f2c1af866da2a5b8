"""scipy Ward linkage cut at K clusters: what multi-vector retrieval libraries use to pool a page's tokens."""

from __future__ import annotations

import numpy as np

NAME = "scipy Ward"
PACKAGE = "scipy"
OPS = ("kmeans",)
DEVICES = ("cpu",)
OBJECTIVE = "other"
NOTE = "linkage(x, 'ward') + fcluster(maxclust) + means of the clusters, loop over images"
SHAPES = ((1030, 128),)


def unavailable(problem):
    return None if (problem.N, problem.D) in SHAPES else "measured on the ColPali page 1030x128 only"


def setup(data):
    from scipy.cluster.hierarchy import fcluster, linkage

    p = data.problem
    arrays = [x.numpy() for x in data.x32]

    def one(x):
        labels = fcluster(linkage(x, method="ward", metric="euclidean"), t=p.K, criterion="maxclust") - 1
        sums = np.zeros((labels.max() + 1, p.D), np.float32)
        np.add.at(sums, labels, x)
        return sums / np.bincount(labels)[:, None].astype(np.float32)

    return lambda: [one(x) for x in arrays]


def centers(result, data):
    return result
