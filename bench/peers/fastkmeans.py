"""fastkmeans (faiss-like interface on PyTorch), one image after the other.

It takes no initial centers: it draws them with torch.randperm after torch.manual_seed(seed). Tokens are therefore
handed over in an order in which that draw lands on the wanted tokens (K-Means does not depend on the order).
"""

from __future__ import annotations

import torch

NAME = "fastkmeans"
PACKAGE = "fastkmeans"
OPS = ("kmeans",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "FastKMeans(tol=-1).train, loop over images; tokens reordered so that its random draw is the wanted start"
SEED = 0


def unavailable(problem):
    return None


def setup(data):
    from fastkmeans import FastKMeans

    p = data.problem
    generator_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    draw = torch.randperm(p.N)
    torch.set_rng_state(generator_state)
    arrays = []
    for x, init in zip(data.x32.cpu(), data.init.cpu()):
        rest = torch.ones(p.N, dtype=torch.bool)
        rest[init] = False
        wanted = torch.cat([init, rest.nonzero().squeeze(1)])
        order = torch.empty(p.N, dtype=torch.int64)
        order[draw] = wanted
        arrays.append(x[order].contiguous().numpy())

    def call():
        found = []
        for x in arrays:
            kmeans = FastKMeans(
                p.D,
                p.K,
                niter=p.iters,
                tol=-1,
                seed=SEED,
                gpu=p.device == "cuda",
                use_triton=None if p.device == "cuda" else False,
            )
            kmeans.train(x)
            found.append(kmeans.centroids)
        return found

    return call


def centers(result, data):
    return result
