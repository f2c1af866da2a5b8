"""The public functions. All validation of arguments lives here; what is below may trust its inputs.

Shapes: B images, N tokens an image, D features a token, K clusters. Statistics and sums are float32, or float64 for
float64 tokens ("acc" below).
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd, registry, values
from .init import STRATEGIES, initial, without_ops
from .reference import accumulate_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Clusters(NamedTuple):
    """What `kmeans` and `kmedoids` return. For tokens of shape (N, D) the leading B is absent.

    centers     (B, K, D) in x.dtype. K-Means: the weighted mean of exactly the tokens with that assignment.
                K-Medoids: rows of x. Zeros where the cluster does not exist (per-image K, padding). Differentiable.
    assignment  (B, N) int64 in 0..K-1; -1 for padding.
    mass        (B, K) acc: summed weights of the members (their number, without weights).
    medoids     (B, K) int64 token indices (-1 where the cluster does not exist) for K-Medoids; None for K-Means.
    inertia     (B,) acc: sum_i w_i ||x_i - c_{a_i}||^2 of this assignment and these centers (before they are rounded to
                x.dtype). Saturates at the largest finite number.
    """

    centers: Tensor
    assignment: Tensor
    mass: Tensor
    medoids: Tensor | None
    inertia: Tensor


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
        init: where to start. "topk": the K heaviest tokens (default with weights); "strided": evenly spaced tokens
            (default without); "random"; "kmeans++"; "farthest"; "bipartite" (the clusters of ToMe's matching, K >=
            N/2);
            a (B, K) integer tensor of token indices (one of padding means the next valid token); or a (B, K, D) tensor
            of centers. A tie in "farthest" that rounding breaks may fall differently on another backend.
        num_iters: upper bound on iterations, >= 1. The paper: converges "usually within 5".
        mask: (B, N) bool, True for real tokens. Padding is assigned -1 and never influences anything, even NaN.
        sort: order clusters by their smallest token index (keeps spatial order) instead of by `init`.
        generator: for "random" and "kmeans++".
        check_finite: raise on NaN or infinite tokens or weights (synchronises with the device) instead of containing
            them in their image.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses (see `backends()` and `explain`).

    Returns:
        `Clusters`; `medoids` is None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `backend` cannot run this, with the reason.

    Gradients (the assignment is constant): dL/dx_i = w_i / W_{a_i} * dL/dc_{a_i} and
    dL/dw_i = (x_i - c_{a_i}) . dL/dc_{a_i} / W_{a_i}. `assignment`, `mass` and `inertia` carry none.

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

    The new medoid of a cluster is the member with the least weighted sum of squared distances to the others, which is
    the member nearest to the cluster's weighted mean; ties go to the lowest index. Arguments, errors and result are
    those
    of `kmeans`, except that `init` may not be a tensor of centers, and `medoids` holds the (B, K) token indices with
    `centers[b, j] == x[b, medoids[b, j]]` bit for bit.

    Gradients: dL/dx_m += dL/dc_j for the medoid m of cluster j; weights get none (zeros).

    Source: Marin et al. (arXiv 2110.03860), section 3: K-Medoids and weighted K-Medoids.
    """
    return _cluster("kmedoids", x, num_clusters, weights, init, num_iters, mask, sort, generator, check_finite, backend)


def pool(
    x: Tensor, assignment: Tensor, num_clusters: int, *, weights: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Weighted mean of any per-token tensor over the clusters of an assignment.

    Cluster one tensor and pool another: `pool(x, kmeans(keys, K).assignment, K)`.

    Args:
        x: (B, N, D) or (N, D), floating.
        assignment: (B, N) or (N,) integers in -1..K-1; -1 is ignored. Others raise on a CPU, and are ignored on a GPU
        and
            where ops are recorded (torch.compile, export), where values are not looked at.
        num_clusters: K >= 1.
        weights: (B, N) or (N,), >= 0; None: all ones. A cluster whose weights add up to zero gets its plain mean.

    Returns:
        (B, K, D) or (K, D) in x.dtype; zeros for a cluster without tokens. Gradients flow to x and weights.
    """
    name = "pool"
    _check_floating(name, "x", x)
    batched = _check_dims(name, "x", x, 2, 3, "(B, N, D) or (N, D)") == 3
    x3 = x if batched else x[None]
    assignment = _check_assignment(name, assignment, x3, batched)
    num_clusters = _check_count(name, "num_clusters", num_clusters)
    _check_labels(name, assignment, num_clusters)
    weights = _check_weights(name, weights, x3, batched)
    chain = registry.select("pool", x3, backend)
    if autograd.wanted(x3, weights):
        centers = autograd.Pool.apply(chain, x3, assignment, weights, num_clusters)
    else:
        with registry.no_autocast(x3):
            centers, _ = registry.call(chain, "pool", x3, assignment, weights, num_clusters)
    return centers if batched else centers[0]


def unpool(centers: Tensor, assignment: Tensor, *, backend: str | None = None) -> Tensor:
    """Give every token its cluster's center: the inverse of pooling, up to the reconstruction error.

    Args:
        centers: (B, K, D) or (K, D), floating.
        assignment: (B, N) or (N,) integers in -1..K-1; others: as in `pool`.

    Returns:
        (B, N, D) or (N, D) in centers.dtype; zeros where the assignment is -1. The gradient of a center is the sum over
        its tokens.
    """
    name = "unpool"
    _check_floating(name, "centers", centers)
    batched = _check_dims(name, "centers", centers, 2, 3, "(B, K, D) or (K, D)") == 3
    centers3 = centers if batched else centers[None]
    assignment = _check_assignment(name, assignment, centers3, batched, same_length=False)
    _check_labels(name, assignment, centers3.shape[1])
    chain = registry.select("unpool", centers3, backend)
    if autograd.wanted(centers3):
        tokens = autograd.Unpool.apply(chain, centers3, assignment)
    else:
        tokens = registry.call(chain, "unpool", centers3, assignment)
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

    Returns:
        (B, N), float32 (float64 for float64 input), summing to 1 over N. It carries no gradient.

    Source: Goyal et al., "PoWER-BERT" (arXiv 2001.08950), section 3.2, as used for weights by Marin et al.
    (arXiv 2110.03860), section 3.
    """
    name = "attention_received"
    _check_floating(name, "q", q)
    _check_floating(name, "k", k)
    _check_dims(name, "q", q, 4, 4, "(B, H, Nq, d)")
    _check_dims(name, "k", k, 4, 4, "(B, H, N, d)")
    if k.dtype != q.dtype:
        raise TypeError(f"{name}: k must have the dtype of q, {q.dtype}, got {k.dtype}; convert one of them")
    _check_device(name, "k", k, q)
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"{name}: k must have the batch, heads and width of q, got k {tuple(k.shape)} for q {tuple(q.shape)};"
            " repeat grouped key heads first"
        )
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)):
        raise TypeError(f"{name}: scale must be a number or None, got {type(scale).__name__}")
    elif not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"{name}: scale must be finite, got {scale}")
    if lse is not None:
        _check_tensor(name, "lse", lse)
        if lse.shape != q.shape[:3]:
            raise ValueError(f"{name}: lse must have shape (B, H, Nq) = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
        if lse.dtype not in FLOATING:
            raise TypeError(f"{name}: lse must be floating, got {lse.dtype}")
        _check_device(name, "lse", lse, q)
        lse = lse.detach().to(accumulate_dtype(q.dtype))
    chain = registry.select("attention_received", q, backend)
    with torch.no_grad(), registry.no_autocast(q):
        return registry.call(chain, "attention_received", q.detach(), k.detach(), float(scale), lse)


# --------------------------------------------------------------------------------------------------------------


def _cluster(name, x, num_clusters, weights, init, num_iters, mask, sort, generator, check_finite, backend) -> Clusters:
    _check_floating(name, "x", x)
    batched = _check_dims(name, "x", x, 2, 3, "(B, N, D) or (N, D)") == 3
    x3 = x if batched else x[None]
    b, n, _ = x3.shape
    mask = _check_mask(name, mask, x3, batched)
    k, counts = _check_num_clusters(name, num_clusters, x3, batched)
    weights = _check_weights(name, weights, x3, batched, mask)
    num_iters = _check_count(name, "num_iters", num_iters)
    for flag, value in (("sort", sort), ("check_finite", check_finite)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {flag} must be a bool, got {type(value).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != x3.device.type:
        raise ValueError(
            f"{name}: generator must be on the device of the tokens, {x3.device}, got {generator.device};"
            f" make it with torch.Generator({str(x3.device)!r})"
        )
    if check_finite:
        _check_finite(name, x3, weights, mask)
    chain = registry.select(name, x3, backend)
    start = _check_init(name, init, x3, k, weights, mask, counts, generator, batched, chain)
    if check_finite and start.is_floating_point():
        used = start if counts is None else start[torch.arange(k, device=x3.device) < counts[:, None]]
        if not torch.isfinite(used).all():
            raise ValueError(
                f"{name}: init must hold finite centers, got NaN or infinity; pass check_finite=False to allow it"
            )
    arguments = (x3, weights, mask, counts, start, k, num_iters, sort)
    if autograd.wanted(x3, weights):
        result = (autograd.KMeans if name == "kmeans" else autograd.KMedoids).apply(chain, *arguments)
    else:
        with registry.no_autocast(x3):
            result = registry.call(chain, name, *arguments)
    centers, assignment, mass = result[:3]
    medoids, inertia = (None, result[3]) if name == "kmeans" else result[3:]
    if batched:
        return Clusters(centers, assignment, mass, medoids, inertia)
    return Clusters(centers[0], assignment[0], mass[0], None if medoids is None else medoids[0], inertia[0])


def _check_tensor(name: str, argument: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name}: {argument} must be a dense tensor, got a nested one; pad it with "
            "torch.nested.to_padded_tensor and pass mask"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: {argument} must be a dense tensor, got layout {value.layout}; call .to_dense() first")


def _check_floating(name: str, argument: str, value) -> None:
    _check_tensor(name, argument, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: {argument} must be float32, float64, bfloat16 or float16, got {value.dtype}; convert "
            "it with .float()"
        )


def _check_dims(name: str, argument: str, value: Tensor, least: int, most: int, shape: str) -> int:
    if not least <= value.dim() <= most:
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(value.shape)}")
    return value.dim()


def _check_device(name: str, argument: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(
            f"{name}: {argument} must be on the device of the tokens, {x.device}, got {value.device}; move "
            "it with .to()"
        )


def _check_count(name: str, argument: str, value):
    value = values.as_int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    if value < 1 or (isinstance(value, int) and value >= 2**31):
        raise ValueError(f"{name}: {argument} must be from 1 to 2^31 - 1, got {value}")
    return value


def _per_token(name: str, argument: str, value: Tensor, x3: Tensor, batched: bool) -> Tensor:
    """Check the shape (B, N), or (N,) beside unbatched tokens, and return it as (B, N)."""
    expected = x3.shape[:2] if batched else x3.shape[1:2]
    if value.shape != expected:
        label = "(B, N)" if batched else "(N,)"
        raise ValueError(f"{name}: {argument} must have shape {label} = {tuple(expected)}, got {tuple(value.shape)}")
    _check_device(name, argument, value, x3)
    return value if batched else value[None]


def _converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # asking torch first takes two microseconds


def _check_mask(name: str, mask, x3: Tensor, batched: bool) -> Tensor | None:
    if mask is None:
        return None
    _check_tensor(name, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool (True = real token), got {mask.dtype}; write mask != 0")
    return _per_token(name, "mask", mask, x3, batched)


def _check_weights(name: str, weights, x3: Tensor, batched: bool, mask: Tensor | None = None) -> Tensor | None:
    if weights is None:
        return None
    _check_tensor(name, "weights", weights)
    if weights.dtype.is_complex:
        raise TypeError(f"{name}: weights must be real, got {weights.dtype}")
    weights = _converted(_per_token(name, "weights", weights, x3, batched), accumulate_dtype(x3.dtype))
    if values.visible(weights) and values.any_negative(weights, mask):
        negative = weights < 0 if mask is None else (weights < 0) & mask
        least = float(weights.detach()[negative].amin())
        raise ValueError(f"{name}: weights must be >= 0, got {least:g}; clamp them with .clamp(min=0)")
    return weights


def _check_num_clusters(name: str, num_clusters, x3: Tensor, batched: bool):
    """(K, counts): the number of clusters in the output, and the per-image numbers or None."""
    b, n, _ = x3.shape
    if not isinstance(num_clusters, Tensor):
        num_clusters = values.as_int(num_clusters)
        if isinstance(num_clusters, bool) or not isinstance(num_clusters, (int, torch.SymInt)):
            raise TypeError(
                f"{name}: num_clusters must be an int or a (B,) integer tensor, got {type(num_clusters).__name__}"
            )
        if num_clusters < 1 or (num_clusters > n and b > 0):
            raise ValueError(
                f"{name}: num_clusters must be from 1 to N = {n}, got {num_clusters}{_clusters_hint(num_clusters, n)}"
            )
        return num_clusters, None
    if num_clusters.dtype not in INTEGER:
        raise TypeError(
            f"{name}: num_clusters must be an int or an integer tensor, got a tensor of {num_clusters.dtype}"
        )
    expected = (b,) if batched else ()
    if tuple(num_clusters.shape) not in {expected, (b,)}:
        raise ValueError(f"{name}: num_clusters must have shape (B,) = {(b,)}, got {tuple(num_clusters.shape)}")
    _check_device(name, "num_clusters", num_clusters, x3)
    counts = num_clusters.reshape(b).to(torch.int64)
    if b == 0:
        return 1, counts
    low, high = int(counts.amin()), int(counts.amax())  # the output's shape depends on it: the one synchronisation
    if low < 1 or high > n:
        raise ValueError(
            f"{name}: num_clusters must be from 1 to N = {n}, got values from {low} to {high}{_clusters_hint(high, n)}"
        )
    return high, counts


def _clusters_hint(num_clusters, n: int) -> str:
    return "; x has no tokens" if not n else "; ask for fewer clusters" if num_clusters > n else ""


def _check_init(name, init, x3, k, weights, mask, counts, generator, batched, chain) -> Tensor:
    b, n, d = x3.shape
    if init is None:
        init = "strided" if weights is None else "topk"
    if isinstance(init, str):
        if init not in STRATEGIES:
            raise ValueError(
                f"{name}: init must be one of {', '.join(map(repr, STRATEGIES))} or a tensor, got {init!r}"
            )
        if init == "bipartite" and counts is None and mask is None and 2 * k < n:
            raise ValueError(
                f"{name}: init='bipartite' needs num_clusters >= N/2 = {n / 2:g}, got {k}; use another init"
            )
        if init == "bipartite" and (counts is not None or mask is not None) and values.visible(x3) and b:
            num_valid = torch.full((b,), n) if mask is None else mask.sum(1)
            fewest = torch.full((b,), k) if counts is None else counts
            if (2 * fewest < num_valid).any():
                raise ValueError(
                    f"{name}: init='bipartite' needs num_clusters of at least half of every image's valid "
                    "tokens; use another init"
                )
        if all(init in registry.REGISTRY[backend].starts for backend in chain):
            return x3.new_empty(b, 0, dtype=torch.int64)  # no indices: the op chooses this start itself
        start = without_ops(init, x3, k, weights, mask, counts)
        if start is not None:
            return start
        with torch.no_grad(), registry.no_autocast(x3):
            return initial(init, x3, k, weights, mask, counts, generator, as_indices=name == "kmedoids")
    if not isinstance(init, Tensor):
        raise TypeError(f"{name}: init must be a string, a tensor or None, got {type(init).__name__}")
    _check_tensor(name, "init", init)
    _check_device(name, "init", init, x3)
    if init.dtype in INTEGER:
        expected = (b, k) if batched else (k,)
        if init.shape != expected:
            label = "(B, K)" if batched else "(K,)"
            raise ValueError(
                f"{name}: init must hold token indices of shape {label} = {expected}, got {tuple(init.shape)}"
            )
        init = _converted(init if batched else init[None], torch.int64)
        if init.numel() and values.visible(init):
            # Entries of clusters that an image does not have may be anything: every backend clamps what it reads.
            used = init if counts is None else torch.where(torch.arange(k) < counts[:, None], init, 0)
            low, high = values.extremes(used)
            if low < 0 or high >= n:
                raise ValueError(
                    f"{name}: init must hold token indices from 0 to N-1 = {n - 1}, got values from {low} to {high}"
                )
        return init if mask is None or n == 0 else _next_valid(mask).gather(1, init.clamp(0, n - 1))
    if init.dtype not in FLOATING:
        raise TypeError(f"{name}: init must hold token indices (integers) or centers (floating), got {init.dtype}")
    if name == "kmedoids":
        raise TypeError(
            f"{name}: init must be token indices (integers) or a strategy, got {init.dtype}; medoids are tokens"
        )
    expected = (b, k, d) if batched else (k, d)
    if init.shape != expected:
        label = "(B, K, D)" if batched else "(K, D)"
        raise ValueError(f"{name}: init must hold centers of shape {label} = {expected}, got {tuple(init.shape)}")
    return init.detach().reshape(b, k, d).to(accumulate_dtype(x3.dtype))


def _next_valid(mask: Tensor) -> Tensor:
    """(B, N): the first valid token from each place on, or the last valid one; 0 in an image of padding alone."""
    n = mask.shape[1]
    index = torch.arange(n, device=mask.device).expand_as(mask)
    after = torch.where(mask, index, n).flip(1).cummin(1).values.flip(1)
    last = torch.where(mask, index, 0).amax(1, keepdim=True)
    return torch.where(after < n, after, last)


def _check_finite(name: str, x3: Tensor, weights: Tensor | None, mask: Tensor | None) -> None:
    bad = ~torch.isfinite(x3).all(2)
    if mask is not None:
        bad &= mask
    if bad.any():
        image, token = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: x must be finite, got NaN or infinity at image {image}, token {token} "
            f"({int(bad.sum())} tokens in all);"
            " mask them or pass check_finite=False"
        )
    if weights is not None:
        bad = ~torch.isfinite(weights) if mask is None else ~torch.isfinite(weights) & mask
        if bad.any():
            image, token = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{name}: weights must be finite, got {float(weights[image, token].detach()):g} at image "
                f"{image}, token {token};"
                " replace it or pass check_finite=False"
            )


def _check_assignment(name: str, assignment, values: Tensor, batched: bool, same_length: bool = True) -> Tensor:
    _check_tensor(name, "assignment", assignment)
    if assignment.dtype not in INTEGER:
        raise TypeError(f"{name}: assignment must hold integers, got {assignment.dtype}")
    if assignment.dim() != (2 if batched else 1):
        raise ValueError(
            f"{name}: assignment must have shape {'(B, N)' if batched else '(N,)'} beside"
            f" {'batched' if batched else 'unbatched'} tokens, got {tuple(assignment.shape)}"
        )
    assignment = assignment if batched else assignment[None]
    expected = values.shape[:2] if same_length else values.shape[:1]
    if assignment.shape[: len(expected)] != expected:
        raise ValueError(
            f"{name}: assignment must have shape {'(B, N) = ' if same_length else '(B, N) with B = '}{tuple(expected)},"
            f" got {tuple(assignment.shape)}"
        )
    _check_device(name, "assignment", assignment, values)
    return _converted(assignment, torch.int64)


def _check_labels(name: str, assignment: Tensor, num_clusters) -> None:
    """Labels beyond the clusters are an error where values may be looked at; elsewhere they count as -1."""
    if values.visible(assignment) and assignment.numel():
        low, high = values.extremes(assignment)
        if low < -1 or high >= num_clusters:
            raise ValueError(
                f"{name}: assignment must hold labels from -1 to K-1 = {num_clusters - 1}, got values from "
                f"{low} to {high}"
            )
