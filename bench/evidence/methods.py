"""The methods and settings that are compared, as arguments of ``tokenpool_ext.patch``, and keep ratios for a budget."""

from __future__ import annotations

LAYERS = (2, 5, 8)  # of 12 blocks, from 0: early enough for a quarter of the MACs
BUDGETS = (0.6, 0.5, 0.4, 0.3)  # of the blocks' MACs, clustering and scores not counted; above 0.6 nothing differs
CENTRAL = (0.6, 0.4)  # where settings are compared


KMEANS = {"pooling": "kmeans", "init": "farthest", "track_size": True, "position": "block"}
KMEDOIDS = {**KMEANS, "pooling": "kmedoids"}
PLAIN = {"track_size": False, "position": "block"}
METHODS: dict[str, dict] = {
    "WK-Means": KMEANS,
    "K-Means": {**KMEANS, "weighted": False},
    "WK-Medoids": KMEDOIDS,
    "K-Medoids": {**KMEDOIDS, "weighted": False},
    "bipartite (ToMe)": {"pooling": "bipartite", "track_size": True, "position": "block"},
    "grid": {"pooling": "grid", **PLAIN},
    "grid, sizes": {"pooling": "grid", "track_size": True, "position": "block"},
    "score pruning": {"pooling": "score", **PLAIN},
    "importance": {"pooling": "importance", "seed": 0, **PLAIN},
    "random": {"pooling": "random", "seed": 0, **PLAIN},
}
# setting -> value -> what changes against WK-Means above
SETTINGS: dict[str, dict[str, dict]] = {
    "init": {name: {**KMEANS, "init": name} for name in ("strided", "topk", "random", "kmeans++")},
    "position": {"attention": {**KMEANS, "position": "attention"}},
    "track_size": {"False": {**KMEANS, "track_size": False}},
    "cluster_on": {"keys": {**KMEANS, "cluster_on": "keys"}},
    "emit": {"K-Medoids, mean": {**KMEDOIDS, "emit": "mean"}},
    "num_iters": {"1": {**KMEANS, "num_iters": 1}, "20": {**KMEANS, "num_iters": 20}},
}


def macs(ratio: float, n: int, width: int, position: str = "block", layers=LAYERS, depth: int = 12) -> float:
    """MACs of the blocks alone when ``layers`` keep ``ratio`` of n patch tokens each; one prefix token."""
    total, left = 0.0, n
    for layer in range(depth):
        tokens = left + 1
        total += 4 * tokens * width**2 + 2 * tokens**2 * width
        after = max(1, round(left * ratio)) if layer in layers else left
        total += 8 * (tokens if position == "block" else after + 1) * width**2
        left = after
    return total


def ratio_for(budget: float, n: int, width: int, position: str = "block", layers=LAYERS) -> float:
    """The keep ratio that comes nearest to ``budget`` of the blocks' MACs."""
    whole = macs(1.0, n, width, position, layers)
    ratios = [i / 500 for i in range(5, 501)]
    return min(ratios, key=lambda r: abs(macs(r, n, width, position, layers) / whole - budget))
