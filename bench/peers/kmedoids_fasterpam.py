"""`kmedoids` package, FasterPAM (another, better local search), one image after the other; distances included."""

from __future__ import annotations

import numpy as np

from .kmedoids_alternating import centers, squared_distances

NAME = "kmedoids fasterpam"
PACKAGE = "kmedoids"
OPS = ("kmedoids",)
DEVICES = ("cpu",)
OBJECTIVE = "other"
NOTE = "kmedoids.fasterpam(max_iter=T): swaps, not alternation, so a lower loss; distances counted"
__all__ = ["centers"]


def unavailable(problem):
    return None


def setup(data):
    import kmedoids

    p = data.problem
    pairs = [(x.numpy(), i.numpy().astype(np.uint64)) for x, i in zip(data.x32, data.init)]
    return lambda: [kmedoids.fasterpam(squared_distances(x), i.copy(), max_iter=p.iters) for x, i in pairs]
