"""An independent oracle, written from the contract alone, one image at a time, as literally as possible.

numpy only, nothing shared with the library.  With `exact=True` all arithmetic is rational (fractions.Fraction), so
ties are ties; otherwise float64 with distances by differences.  Slow on purpose.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np


@dataclasses.dataclass
class Answer:
    centers: np.ndarray  # (K, D)
    assignment: np.ndarray  # (N,) int64, -1 for padding
    mass: np.ndarray  # (K,)
    medoids: np.ndarray | None  # (K,) int64, -1 for padded clusters
    inertia: float
    iterations: int  # iterations run before the assignment repeated


def _numbers(a, exact):
    a = np.asarray(a)
    if not exact:
        return a.astype(np.float64)
    return np.array([Fraction(float(v)) for v in a.ravel()], dtype=object).reshape(a.shape)


def _integers(a):
    """Whole numbers (Python's own) in the proportions of these."""
    a = _numbers(a, True)
    scale = math.lcm(*(v.denominator for v in a.ravel()))
    return np.array([int(v * scale) for v in a.ravel()], dtype=object).reshape(a.shape)


def _distance(x, c):
    return ((x - c) ** 2).sum()


def _mean(x, w):
    """Weighted mean of rows; the plain mean when the weights add up to zero."""
    if w.sum() == 0:
        return x.sum(0) / len(x)
    return (w[:, None] * x).sum(0) / w.sum()


def _nearest(x, centers):
    """Lowest index among the nearest centers; NaN never wins."""
    best, label = None, 0
    for j, c in enumerate(centers):
        d = _distance(x, c)
        if d == d and (best is None or d < best):
            best, label = d, j
    return label


def _nearest_all(x, centers):
    """The same for every token at once, in float64."""
    d = ((x[:, None] - centers[None]) ** 2).sum(-1)
    return np.where(np.isnan(d), np.inf, d).argmin(1)


def _repair(labels, cost, k):
    """Contract 2.2, one empty cluster after the other."""
    for j in range(k):
        if (labels == j).any():
            continue
        sizes = np.bincount(labels, minlength=k)
        donors = [i for i in range(len(labels)) if sizes[labels[i]] >= 2]
        heaviest = max(cost[i] for i in donors)
        labels[next(i for i in donors if cost[i] == heaviest)] = j
    return labels


_answers = {}


def cluster(x, k, **options):
    """`_cluster`, remembered: every backend asks the same questions."""

    def plain(value):
        array = np.asarray(value)
        return value if value is None or array.dtype == object else (array.shape, str(array.dtype), array.tobytes())

    key = (plain(x), k, tuple((name, plain(value)) for name, value in sorted(options.items())))
    if key not in _answers:
        _answers[key] = _cluster(x, k, **options)
    return _answers[key]


def _cluster(
    x, k, *, init, weights=None, mask=None, num_iters=5, algorithm="kmeans", sort=False, num_clusters=None, exact=False
):
    """One image.  x (N, D); init: k token indices, or (k, D) centers (kmeans); num_clusters: padded K."""
    n_all = len(x)
    real = np.arange(n_all) if mask is None else np.flatnonzero(mask)
    padded = k if num_clusters is None else num_clusters
    k = min(k, len(real))
    x = _numbers(np.asarray(x)[real], exact)
    w = _numbers(np.ones(n_all) if weights is None else weights, exact)[real]
    n, dim = x.shape
    init = np.asarray(init)
    at_tokens = init.ndim == 1
    if at_tokens:
        place = {int(token): slot for slot, token in enumerate(real)}
        medoids = np.array([place[int(i)] for i in init[:k]], dtype=int)
        centers = x[medoids]
    else:
        centers = _numbers(init, exact)[:k]
    labels, previous, ran = np.zeros(n, int), None, 0
    for _ in range(num_iters if k else 0):
        ran += 1
        labels = np.array([_nearest(row, centers) for row in x]) if exact else _nearest_all(x, centers)
        if algorithm == "kmedoids":
            for j in range(k - 1, -1, -1):  # descending: the lowest cluster that names a token keeps it
                labels[medoids[j]] = j
        if len(np.unique(labels)) < k:
            labels = _repair(labels, [w[i] * _distance(x[i], centers[labels[i]]) for i in range(n)], k)
        if previous is not None and (labels == previous).all():
            break
        previous = labels.copy()
        members = [np.flatnonzero(labels == j) for j in range(k)]
        centers = np.stack([_mean(x[m], w[m]) for m in members])
        if algorithm == "kmedoids":
            medoids = np.array([_central(x, w, m, mu) for m, mu in zip(members, centers)])
            centers = x[medoids]
    if sort and k:
        order = np.argsort([np.flatnonzero(labels == j)[0] for j in range(k)])
        centers, labels = centers[order], np.argsort(order)[labels]
        medoids = medoids[order] if algorithm == "kmedoids" else None
    out = np.zeros((padded, dim))
    out[:k] = centers.astype(np.float64) if k else 0
    mass = np.zeros(padded)
    mass[:k] = [float(w[labels == j].sum()) for j in range(k)]
    full = np.full(n_all, -1)
    full[real] = labels
    inertia = float(sum(w[i] * _distance(x[i], centers[labels[i]]) for i in range(n))) if k else 0.0
    chosen = None
    if algorithm == "kmedoids":
        chosen = np.full(padded, -1)
        chosen[:k] = real[medoids] if k else []
    return Answer(out, full, mass, chosen, inertia, ran)


def _central(x, w, members, mu):
    """Contract 3.2: the member with the least weighted sum of squared distances, through the mean identity."""
    if w[members].sum() == 0:
        return members[0]
    members = members[w[members] > 0]
    d = [_distance(x[i], mu) for i in members]
    return members[d.index(min(d))]


def representatives(x, labels, k, weights=None):
    """(k,) of each cluster the member nearest to its mean, lowest index on a tie, exactly; -1: none."""
    labels = np.asarray(labels)
    x, w = _integers(x), _integers(np.ones(len(x)) if weights is None else weights)
    chosen = np.full(k, -1)
    for j in range(k):
        members = np.flatnonzero(labels == j)
        if len(members):
            p = w[members] if w[members].sum() else np.ones(len(members), object)
            moment = (p[:, None] * x[members]).sum(0)
            d = [_distance(p.sum() * x[i], moment) for i in members]  # times the total weight squared
            chosen[j] = members[d.index(min(d))]
    return chosen


def best_medoid(x, w):
    """Brute force over all members (contract 3.2 as written, no identity): (losses, lowest index of the least)."""
    losses = np.array([(w * ((x - row) ** 2).sum(-1)).sum() for row in x])
    return losses, int(losses.argmin())


def attention_received(q, k, scale):
    """(H, Nq, d), (H, N, d) -> (N,): mean over heads and queries of softmax(scale q k^T)."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    logits = scale * np.einsum("hqd,hnd->hqn", q, k)
    logits -= logits.max(-1, keepdims=True)
    a = np.exp(logits)
    return (a / a.sum(-1, keepdims=True)).mean((0, 1))


def farthest(x, k, w=None):
    """Contract 5, "farthest": from the heaviest token on, the largest weight times squared distance to those chosen
    (lowest index on ties)."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if w is None else np.asarray(w, np.float64)
    picks = [int(np.argmax(w))]
    while len(picks) < k:
        gap = w * np.min([((x - x[p]) ** 2).sum(-1) for p in picks], 0)
        gap[picks] = -1
        picks.append(int(gap.argmax()))
    return picks


def bipartite(x, k):
    """Labels (N,) of one-shot bipartite matching: even tokens offer, odd tokens receive, the N-k best edges merge."""
    x = np.asarray(x, np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    even, odd = np.arange(0, len(x), 2), np.arange(1, len(x), 2)
    if not len(odd):
        return np.zeros(len(x), int)
    similarity = unit[even] @ unit[odd].T
    partner, strength = similarity.argmax(1), similarity.max(1)
    labels = np.arange(len(x))
    for e in np.argsort(-strength, kind="stable")[: len(x) - k]:
        labels[even[e]] = odd[partner[e]]
    return np.unique(labels, return_inverse=True)[1]


def partition_loss(x, labels, w=None):
    """Weighted reconstruction error of a partition with the means as centers."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if w is None else np.asarray(w, np.float64)
    loss = 0.0
    for j in np.unique(labels):
        m = labels == j
        loss += (w[m] * ((x[m] - _mean(x[m], w[m])) ** 2).sum(-1)).sum()
    return loss
