"""scikit-learn KMeans(algorithm="lloyd"), one image after the other."""

from __future__ import annotations

import warnings

NAME = "scikit-learn"
PACKAGE = "scikit-learn"
OPS = ("kmeans",)
DEVICES = ("cpu",)
OBJECTIVE = "same"
NOTE = "KMeans(algorithm='lloyd', n_init=1, tol=0), loop over images; computes one more assignment at the end"


def unavailable(problem):
    return None


def setup(data):
    from sklearn.cluster import KMeans

    p = data.problem
    pairs = [(x.numpy(), c.numpy()) for x, c in zip(data.x32, data.centers)]

    def call():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [KMeans(p.K, init=c, n_init=1, max_iter=p.iters, tol=0, algorithm="lloyd").fit(x) for x, c in pairs]

    return call


def centers(result, data):
    return [r.cluster_centers_ for r in result]
