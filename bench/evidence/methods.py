"""The methods and settings that are compared, as arguments of ``tokenpool_ext.patch``, and keep ratios for a budget."""

from __future__ import annotations

import torch
from torch import Tensor

import tokenpool_ext as tp
from tokenpool_ext.modules import TokenPooling, take_tokens

LAYERS = (2, 5, 8)  # of 12 blocks, from 0: early enough for a quarter of the MACs
BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)  # of the whole model's MACs, clustering and scores not counted
CENTRAL = (0.6, 0.4)  # where settings are compared


def weighted_farthest(x: Tensor, k: int, weights: Tensor) -> Tensor:
    """(B, K) indices: the heaviest token, then always the one of largest w_i * (squared distance to those chosen)."""
    w = weights.to(torch.float32)
    size = x.float().square().sum(2)
    pick = w.argmax(1, keepdim=True)
    distance = torch.full_like(size, torch.inf)
    chosen = [pick]
    for _ in range(k - 1):
        row = x.gather(1, pick[:, :, None].expand(-1, -1, x.shape[2])).float()
        new = size + row.square().sum(2) - 2 * (x.float() @ row.transpose(1, 2))[:, :, 0]
        distance = torch.minimum(distance, new.clamp(min=0)).scatter(1, pick, 0)
        pick = (w * distance).argmax(1, keepdim=True)
        chosen.append(pick)
    return torch.cat(chosen, 1)


class WeightedFarthest(TokenPooling):
    """Token Pooling from :func:`weighted_farthest`, before the library has that start."""

    def reduce(self, x, k, scores, features, mask, sizes, want_clusters):
        weights = sizes if scores is None or not self.weighted else scores
        on = x if features is None else features.detach()
        start = weighted_farthest(on, k, torch.ones_like(on[:, :, 0]) if weights is None else weights)
        cluster = tp.kmeans if self.algorithm == "kmeans" else tp.kmedoids
        clusters = cluster(on, k, weights=weights, init=start, num_iters=self.num_iters, mask=mask, sort=self.sort)
        if self.emit == "medoid":
            return take_tokens(x, clusters.medoids), clusters
        return tp.pool(x, clusters.assignment, k, weights=weights), clusters


KMEANS = {"pooling": "kmeans", "init": "farthest", "track_size": True}
KMEDOIDS = {**KMEANS, "pooling": "kmedoids"}
METHODS: dict[str, dict] = {
    "WK-Means": KMEANS,
    "K-Means": {**KMEANS, "weighted": False},
    "WK-Medoids": KMEDOIDS,
    "K-Medoids": {**KMEDOIDS, "weighted": False},
    "bipartite (ToMe)": {"pooling": "bipartite", "track_size": True},
    "grid": {"pooling": "grid"},
    "grid, sizes": {"pooling": "grid", "track_size": True},
    "score pruning": {"pooling": "prune"},
    "importance": {"pooling": "importance", "seed": 0},
    "random": {"pooling": "random", "seed": 0},
}
# setting -> value -> what changes against WK-Means above
SETTINGS: dict[str, dict[str, dict]] = {
    "init": {name: {**KMEANS, "init": name} for name in ("strided", "topk", "random", "kmeans++")}
    | {"farthest, w d^2": {**KMEANS, "pooling": WeightedFarthest, "init": None}},
    "position": {"block": {**KMEANS, "position": "block"}},
    "track_size": {"False": {**KMEANS, "track_size": False}},
    "cluster_on": {"keys": {**KMEANS, "cluster_on": "keys"}},
    "emit": {"K-Medoids, mean": {**KMEDOIDS, "emit": "mean"}},
    "num_iters": {"1": {**KMEANS, "num_iters": 1}, "20": {**KMEANS, "num_iters": 20}},
}


def macs(ratio: float, n: int, width: int, position: str = "attention", layers=LAYERS, depth: int = 12) -> float:
    """MACs of the blocks alone when ``layers`` keep ``ratio`` of n patch tokens each; one prefix token."""
    total, left = 0.0, n
    for layer in range(depth):
        tokens = left + 1
        total += 4 * tokens * width**2 + 2 * tokens**2 * width
        after = max(1, round(left * ratio)) if layer in layers else left
        total += 8 * (tokens if position == "block" else after + 1) * width**2
        left = after
    return total


def ratio_for(budget: float, n: int, width: int, position: str = "attention", layers=LAYERS) -> float:
    """The keep ratio that comes nearest to ``budget`` of the blocks' MACs."""
    whole = macs(1.0, n, width, position, layers)
    ratios = [i / 500 for i in range(5, 501)]
    return min(ratios, key=lambda r: abs(macs(r, n, width, position, layers) / whole - budget))
