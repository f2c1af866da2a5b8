"""superkmeans (C++), one image after the other. It cannot be given initial centers."""

from __future__ import annotations

NAME = "superkmeans"
PACKAGE = "superkmeans"
OPS = ("kmeans",)
DEVICES = ("cpu",)
OBJECTIVE = "same"
START = "own"
NOTE = "SuperKMeans(hierarchical=False, sampling_fraction=1, early_termination=False).train, loop; own random start"


def unavailable(problem):
    return None


def setup(data):
    import torch
    from superkmeans import SuperKMeans

    p, threads = data.problem, torch.get_num_threads()
    arrays = [x.numpy() for x in data.x32]

    def call():
        return [
            SuperKMeans(
                p.K,
                p.D,
                hierarchical=False,
                iters=p.iters,
                sampling_fraction=1.0,
                max_points_per_cluster=p.N,
                n_threads=threads,
                early_termination=False,
            ).train(x)
            for x in arrays
        ]

    return call


def centers(result, data):
    return result
