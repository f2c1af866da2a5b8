"""The public functions: check the arguments (checks.py), choose a backend (backends.py), run its op.

Shapes: B images, N tokens an image, D features a token, K clusters. Statistics and sums are float32, or float64 for
float64 tokens ("acc" below).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from . import autograd, starts
from .backends import Backend, no_autocast, run, select
from .checks import (
    check_assignment,
    check_attention,
    check_bool,
    check_centers,
    check_dims,
    check_finite_centers,
    check_finite_tokens,
    check_generator,
    check_init,
    check_int,
    check_labels,
    check_mask,
    check_num_clusters,
    check_weights,
)


class Clusters(NamedTuple):
    """What `kmeans` and `kmedoids` return. For tokens of shape (N, D) the leading B is absent.

    centers     (B, K, D) in x.dtype. K-Means: the weighted mean of exactly the tokens with that assignment.
                K-Medoids: rows of x. Zeros where the cluster does not exist (per-image K, padding). Differentiable.
    assignment  (B, N) int64 in 0..K-1; -1 for padding.
    mass        (B, K) acc: summed weights of the members (their number, without weights).
    medoids     (B, K) int64 token indices, -1 where the cluster does not exist. K-Medoids: the rows that are centers.
                K-Means: each cluster's representative, the member nearest to its mean (ties: the lowest index).
    inertia     (B,) acc: sum_i w_i ||x_i - c_{a_i}||^2 of this assignment and these centers (before they are rounded to
                x.dtype). Saturates at the largest finite number.
    """

    centers: Tensor
    assignment: Tensor
    mass: Tensor
    medoids: Tensor
    inertia: Tensor


def register_result(result: type) -> None:
    """Let torch.load(weights_only=True), its default, read saved results of this kind, and a `DataLoader` batch those
    of single images."""
    torch.serialization.add_safe_globals([result])
    default_collate_fn_map[result] = _collate


def _collate(batch: Any, *, collate_fn_map: dict[Any, Callable[..., Any]] | None = None) -> Any:
    parts = zip(*batch)
    return type(batch[0])(*(None if p[0] is None else collate(p, collate_fn_map=collate_fn_map) for p in parts))


register_result(Clusters)


def kmeans(
    x: Tensor,
    num_clusters: int | Tensor,
    *,
    weights: Tensor | None = None,
    init: str | Tensor | None = None,
    num_iters: int = 5,
    mask: Tensor | None = None,
    sort: bool = False,
    generator: torch.Generator | None = None,
    check_finite: bool = False,
    backend: str | None = None,
) -> Clusters:
    """Exact weighted K-Means of every image's tokens, batched and differentiable.

    Minimises sum_i w_i * min_j ||x_i - c_j||^2 by at most `num_iters` Lloyd iterations from `init`. An image whose
    assignment stops changing is done. Empty clusters are refilled with the costliest tokens, so every one of the K
    clusters has a member, whatever the input.

    Args:
        x: tokens (B, N, D) or (N, D); float64, float32, bfloat16 or float16; any strides.
        num_clusters: K, 1 <= K <= N; or a (B,) integer tensor of per-image K (outputs are padded to the largest; an
            image with fewer valid tokens than its K gets as many clusters as it has tokens). Reading the largest from a
            GPU tensor synchronises with it: the output's shape depends on it.
        weights: significance of each token, (B, N), finite and >= 0, taken as acc. None: all ones. Only ratios matter.
        init: where to start. "farthest" (the default, None): the heaviest token, then always the one with the largest
            w_i * (squared distance to the nearest chosen token). "topk": the K heaviest tokens; "strided": evenly
            spaced tokens; "random"; "kmeans++"; "bipartite" (the clusters of ToMe's matching, K >= N/2); a (B, K)
            integer tensor of token indices (one of padding means the next valid token); or a (B, K, D) tensor of
            centers. A tie in "farthest" that rounding breaks may fall differently on another backend.
        num_iters: upper bound on iterations, >= 1. The paper: converges "usually within 5".
        mask: (B, N) bool, True for real tokens. Padding is assigned -1 and never influences anything, even NaN.
        sort: order clusters by their smallest token index (keeps spatial order) instead of by `init`.
        generator: for "random" and "kmeans++".
        check_finite: raise on tokens, weights or given centers that are NaN or infinite (synchronises with the device)
            instead of containing them in their image.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses (see `backends()` and `explain`).

    Returns:
        `Clusters`; `medoids` holds the member nearest to each mean.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `backend` cannot run this, with the reason.

    Gradients (the assignment is constant): dL/dx_i = w_i / W_{a_i} * dL/dc_{a_i} and
    dL/dw_i = (x_i - c_{a_i}) . dL/dc_{a_i} / W_{a_i}. `assignment`, `mass`, `medoids` and `inertia` carry none.

    Source: Marin et al., "Token Pooling in Vision Transformers" (arXiv 2110.03860), section 3: objective and Algorithm
    (K-Means, weighted K-Means).
    """
    return _cluster("kmeans", x, num_clusters, weights, init, num_iters, mask, sort, generator, check_finite, backend)


def kmedoids(
    x: Tensor,
    num_clusters: int | Tensor,
    *,
    weights: Tensor | None = None,
    init: str | Tensor | None = None,
    num_iters: int = 5,
    mask: Tensor | None = None,
    sort: bool = False,
    generator: torch.Generator | None = None,
    check_finite: bool = False,
    backend: str | None = None,
) -> Clusters:
    """Exact weighted K-Medoids (alternating, squared Euclidean): like `kmeans`, but centers are tokens.

    The new medoid of a cluster is the member of positive weight (where one has it) with the least weighted sum of
    squared distances to the others, which is the one nearest to the cluster's weighted mean; ties go to the lowest
    index. Arguments, errors and result are those of `kmeans`, except that `init` may not be a tensor of centers, and
    `medoids` holds the (B, K) token indices with `centers[b, j] == x[b, medoids[b, j]]` bit for bit.

    Gradients: dL/dx_m += dL/dc_j for the medoid m of cluster j; weights get none (zeros).

    Source: Marin et al. (arXiv 2110.03860), section 3: K-Medoids and weighted K-Medoids.
    """
    return _cluster("kmedoids", x, num_clusters, weights, init, num_iters, mask, sort, generator, check_finite, backend)


def assign(x: Tensor, centers: Tensor, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The nearest of given centers for every token: argmin_j ||x_i - c_j||^2, a tie to the lowest j.

    For new tokens and known centers: no iteration, no repair, so a center may get no token. There may be any number of
    centers, more than tokens, too; nothing of size N x K is in memory (reference backend: 8 million numbers an image).

    Args:
        x: tokens (B, N, D) or (N, D), floating, any strides.
        centers: (B, K, D) or (K, D), floating, K >= 1; taken as acc. A center that is not finite is nearest to nothing.
        mask: (B, N) or (N,) bool, True for real tokens. Padding gets -1.
        backend: as in `kmeans`.

    Returns:
        (B, N) or (N,) int64 labels 0..K-1; -1 for padding. It carries no gradient. A token that is not finite gets some
        label in range.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    name = "assign"
    batched = check_dims(name, "x", x, 2, 3, "(B, N, D) or (N, D)") == 3
    x3 = x if batched else x[None]
    centers = check_centers(name, centers, x3, batched)
    mask = check_mask(name, mask, x3, batched)
    chain = select(name, x3, backend)
    with torch.no_grad(), no_autocast(x3):
        labels: Tensor = run(chain, name, x3.detach(), centers, mask)
    return labels if batched else labels[0]


def pool(
    x: Tensor, assignment: Tensor, num_clusters: int, *, weights: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Weighted mean of any per-token tensor over the clusters of an assignment.

    Cluster one tensor and pool another: `pool(x, kmeans(keys, K).assignment, K)`.

    Args:
        x: (B, N, D) or (N, D), floating.
        assignment: (B, N) or (N,) integers in -1..K-1; -1 is ignored. Others raise on a CPU, and are ignored on a GPU
            and where ops are recorded (torch.compile, export), where values are not looked at.
        num_clusters: K >= 1.
        weights: (B, N) or (N,), >= 0 where the assignment is; None: all ones. A cluster whose weights add up to zero
            gets its plain mean.
        backend: as in `kmeans`.

    Returns:
        (B, K, D) or (K, D) in x.dtype; zeros for a cluster without tokens. Gradients flow to x and weights.
    """
    name = "pool"
    batched = check_dims(name, "x", x, 2, 3, "(B, N, D) or (N, D)") == 3
    x3 = x if batched else x[None]
    assignment = check_assignment(name, assignment, x3, batched)
    num_clusters = check_int(name, "num_clusters", num_clusters, 1)
    check_labels(name, assignment, num_clusters)
    weights = check_weights(name, weights, x3, batched, assignment)
    chain = select("pool", x3, backend)
    if autograd.wanted(x3, weights):
        centers = autograd.pool(chain, x3, assignment, weights, num_clusters)
    else:
        with no_autocast(x3):
            centers, _ = run(chain, "pool", x3, assignment, weights, num_clusters)
    return centers if batched else centers[0]


def unpool(centers: Tensor, assignment: Tensor, *, backend: str | None = None) -> Tensor:
    """Give every token its cluster's center: the inverse of pooling, up to the reconstruction error.

    Args:
        centers: (B, K, D) or (K, D), floating.
        assignment: (B, N) or (N,) integers in -1..K-1; others: as in `pool`.
        backend: as in `kmeans`.

    Returns:
        (B, N, D) or (N, D) in centers.dtype; zeros where the assignment is -1. The gradient of a center is the sum over
        its tokens.
    """
    name = "unpool"
    batched = check_dims(name, "centers", centers, 2, 3, "(B, K, D) or (K, D)") == 3
    centers3 = centers if batched else centers[None]
    assignment = check_assignment(name, assignment, centers3, batched, same_length=False)
    check_labels(name, assignment, centers3.shape[1])
    chain = select("unpool", centers3, backend)
    tokens = autograd.unpool(chain, centers3, assignment)
    return tokens if batched else tokens[0]


def attention_received(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Significance score of every token: the softmax attention it receives, averaged over heads and queries.

    score_i = mean_{h, q} softmax_i(scale * q . k_i), from queries and keys alone; no N x N matrix is in memory, so
    models keep their fused attention.

    Args:
        q: queries (B, H, Nq, d), floating, any strides.
        k: keys (B, H, N, d), same dtype.
        scale: factor of the logits; 1/sqrt(d) when None.
        lse: (B, H, Nq) natural-log log-sum-exp of the scaled logits, as flash and memory-efficient attention return it;
            computed in an extra pass when None.
        backend: as in `kmeans`.

    Returns:
        (B, N), float32 (float64 for float64 input), summing to 1 over N. It carries no gradient.

    Source: Goyal et al., "PoWER-BERT" (arXiv 2001.08950), section 3.2, as used for weights by Marin et al.
    (arXiv 2110.03860), section 3.
    """
    return received_by(q, k, *check_attention(q, k, scale, lse), backend)


def received_by(q: Tensor, k: Tensor, scale: float, lse: Tensor | None = None, backend: str | None = None) -> Tensor:
    """`attention_received` of arguments that were checked."""
    chain = select("attention_received", q, backend)
    with torch.no_grad(), no_autocast(q):
        received: Tensor = run(chain, "attention_received", q.detach(), k.detach(), scale, lse)
    return received


def _cluster(
    name: str,
    x: Tensor,
    num_clusters: int | Tensor,
    weights: Tensor | None,
    init: str | Tensor | None,
    num_iters: int,
    mask: Tensor | None,
    sort: bool,
    generator: torch.Generator | None,
    check_finite: bool,
    backend: str | None,
) -> Clusters:
    batched = check_dims(name, "x", x, 2, 3, "(B, N, D) or (N, D)") == 3
    x3 = x if batched else x[None]
    mask = check_mask(name, mask, x3, batched)
    k, counts = check_num_clusters(name, num_clusters, x3, batched)
    weights = check_weights(name, weights, x3, batched, mask)
    num_iters = check_int(name, "num_iters", num_iters, 1)
    check_bool(name, "sort", sort)
    check_bool(name, "check_finite", check_finite)
    check_generator(name, generator, x3)
    if check_finite:
        check_finite_tokens(name, x3, weights, mask)
    chain = select(name, x3, backend)
    start = check_init(name, init, x3, k, mask, counts, batched)
    if check_finite and isinstance(start, Tensor) and start.is_floating_point():
        check_finite_centers(name, start, counts)
    found = cluster_from(chain, name, x3, weights, mask, counts, start, k, num_iters, sort, generator)
    return found if batched else Clusters(*(part[0] for part in found))


def cluster_from(
    chain: tuple[Backend, ...],
    name: str,
    x: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    counts: Tensor | None,
    start: str | Tensor,
    num_clusters: int,
    num_iters: int,
    sort: bool,
    generator: torch.Generator | None = None,
) -> Clusters:
    """`kmeans` or `kmedoids`, the `name`, of arguments that were checked; `x` (B, N, D), `weights` in acc."""
    if isinstance(start, str):
        start = starts.make(start, x, num_clusters, weights, mask, counts, generator, as_indices=name == "kmedoids")
    arguments = (x, weights, mask, counts, start, num_clusters, num_iters, sort)
    if autograd.wanted(x, weights):
        return Clusters(*(autograd.kmeans if name == "kmeans" else autograd.kmedoids)(chain, *arguments))
    with no_autocast(x):
        return Clusters(*run(chain, name, *arguments))
