"""K-Medoids as it is commonly copied: a Python loop over clusters that clones the distance matrix for each.

Written from the description of that pattern, with the right objective (squared distances, summed over members), so
that its loss can be compared. Per cluster and iteration: clone B x N x N, blank what is outside, sum, argmin.
"""

from __future__ import annotations

import torch

NAME = "per-cluster loop"
PACKAGE = "torch"
OPS = ("kmedoids",)
DEVICES = ("cpu", "cuda")
OBJECTIVE = "same"
NOTE = "PyTorch, T x K passes over a clone of the B x N x N distances"


def unavailable(problem):
    if problem.N > 2048:
        return "T x K copies of an N x N matrix an image: minutes"
    return None


def setup(data):
    p, x = data.problem, data.x32

    def call():
        distances = torch.cdist(x, x).square_()
        medoids = data.init.clone()
        labels = torch.arange(p.K, device=x.device)
        for _ in range(p.iters):
            a = distances.gather(2, medoids[:, None, :].expand(-1, p.N, -1)).argmin(-1)
            a.scatter_(1, medoids, labels.expand_as(medoids))
            for j in range(p.K):
                member = a == j
                local = distances.clone()
                local.masked_fill_(~member[:, None, :], 0)
                cost = local.sum(-1).masked_fill_(~member, float("inf"))
                medoids[:, j] = cost.argmin(-1)
        return medoids

    return call


def centers(result, data):
    return data.x32.gather(1, result[..., None].expand(-1, -1, data.problem.D))
