"""Single-token moves after Lloyd's iterations (Hartigan and Wong, 1979).

Where clusters are small, Lloyd's iteration stops early: a token stays with its nearest mean even where moving it would
lower the loss, because its own mean follows it. Moving token i from its cluster of m tokens to one of k tokens changes
the loss by k / (k + 1) ||x_i - c'||^2 - m / (m - 1) ||x_i - c||^2. A round makes, in every cluster, the best such move
that touches it and that is also the best of the other cluster: so the loss falls by exactly the sum of the gains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import values
from ..functional import pool
from ..reference_steps import power_of_two_scale

LEAST_GAIN = 1e-6  # of the token's squared norm: below it, rounding


def scaled(x: Tensor) -> Tensor:
    """Documents (..., n, D) times a power of two each, so that no square of a difference overflows or vanishes."""
    return x * power_of_two_scale(x.detach().abs().amax((-2, -1), keepdim=True))[0] if x.numel() else x


@torch.no_grad()
def refined(x: Tensor, assignment: Tensor, num_clusters: int, rounds: int) -> Tensor:
    """(n,) labels of one document's (n, D) tokens after at most `rounds` rounds; ordered by each cluster's first token.

    Clusters keep at least one token. A document at a time: library products may differ with the batch.
    """
    x = scaled(x.detach())  # of its own memory: products may differ with the alignment too
    n, energy = len(x), x.square().sum(1)
    token = torch.arange(n, device=x.device)
    for _ in range(rounds):
        mass = x.new_zeros(num_clusters).index_add_(0, assignment, x.new_ones(n))
        centers = pool(x, assignment, num_clusters)
        distance = torch.addmm(centers.square().sum(1), x, centers.T, alpha=-2).add_(energy[:, None]).clamp(min=0)
        m = mass[assignment]
        leave = distance.gather(1, assignment[:, None])[:, 0] * m / (m - 1).clamp(min=1)
        join = distance.mul_(mass / (mass + 1)).scatter(1, assignment[:, None], torch.inf)
        cost, target = join.min(1)
        gain = torch.where(m > 1, leave - cost, 0)
        gain = torch.where(gain > LEAST_GAIN * energy, gain, 0)
        best = gain.new_zeros(num_clusters)
        best = best.scatter_reduce(0, assignment, gain, "amax").scatter_reduce(0, target, gain, "amax")
        wins = (gain > 0) & (gain == best[assignment]) & (gain == best[target])
        index = torch.where(wins, token, n)  # of equal gains the first token's
        first = index.new_full((num_clusters,), n)
        first = first.scatter_reduce(0, assignment, index, "amin").scatter_reduce(0, target, index, "amin")
        wins &= (first[assignment] == token) & (first[target] == token)
        if values.visible(wins) and not wins.any():  # where none is made, a round changes nothing
            break
        assignment = torch.where(wins, target, assignment)
    first = token.new_full((num_clusters,), n).scatter_reduce(0, assignment, token, "amin")
    return first.argsort().argsort()[assignment]
