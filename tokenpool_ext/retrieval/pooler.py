"""`TokenPooler`: ragged documents in, fewer unit-norm vectors out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import values
from ..checks import (
    INTEGER,
    LARGEST_FLOAT,
    check_backend,
    check_bool,
    check_dims,
    check_float,
    check_int,
    check_known,
    check_not_meta,
    check_tensor,
)
from ..functional import kmeans, pool, unpool
from ..ops import accumulate_dtype
from ..ragged import stacked
from ..reference_steps import power_of_two_scale
from .refine import refined, scaled

BATCH_ELEMENTS = 1 << 19  # of the padded tokens of one call of kmeans: 2 MB in float32, whatever the corpus holds
COUNTS = ("pool_factor", "num_tokens", "max_error", "distance_threshold")  # what says K; one at a time


@dataclass(repr=False, eq=False)
class TokenPooler:
    """Replaces the tokens of every document by the means of K clusters of them, for MaxSim retrieval.

    Tokens are compared by cosine (squared Euclidean distance of unit-norm tokens). Documents of any lengths go through
    together, a few megabytes at a time; a document's result does not depend on the others.

    Args:
        pool_factor: K = max(n // pool_factor, 1) of a document's n tokens; may be fractional, >= 1.
        num_tokens: exactly so many vectors a document (all its tokens, where it has fewer).
        max_error: the fewest vectors whose relative reconstruction error sum_i ||x_i - c_i||^2 / sum_i ||x_i||^2 is at
            most this, in each document; 0 to 1. c_i: the mean of token i's cluster. Found by bisection: K - 1 vectors
            miss the bound.
        distance_threshold: the fewest vectors such that no token's cosine distance (1 - cos, 0 to 2) from the one
            that stands for it is larger than this; by bisection as well.
        max_tokens: at most so many vectors a document, beside one of the four above or alone. It wins over a bound.
        protected_tokens: so many tokens in front ([CLS], say) are kept as they are. pool_factor counts the others;
            num_tokens and max_tokens count all vectors that come out.
        normalize: scale tokens and means to unit norm (in float32). False: cluster the tokens as they are and return
            plain means.
        num_iters: upper bound on K-Means' iterations.
        refine: rounds of single-token moves after them (`refine.py`): a lower loss, for time. None: 10 in a document
            with K < n / 5, where retrieval profits (docs/retrieval.md), 0 in others.
        backend: as in `kmeans`.

    A mean of zero (tokens that cancel) stays zero. Gradients flow to the tokens; the assignment is constant. Under
    torch.vmap max_error and distance_threshold are refused: their counts depend on the tokens.
    """

    pool_factor: float | None = None
    _: KW_ONLY
    num_tokens: int | None = None
    max_tokens: int | None = None
    max_error: float | None = None
    distance_threshold: float | None = None
    protected_tokens: int = 0
    normalize: bool = True
    num_iters: int = 5
    refine: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        """The attributes, also those set later."""
        name = "TokenPooler"
        given = [count for count in COUNTS if getattr(self, count) is not None]
        if len(given) > 1 or not given and self.max_tokens is None:
            raise ValueError(
                f"{name}: expected one of {', '.join(COUNTS)} (or max_tokens alone), got "
                f"{' and '.join(given) or 'none'}; pass one"
            )
        if self.num_tokens is not None and self.max_tokens is not None:
            raise ValueError(f"{name}: num_tokens and max_tokens say the same, got both; pass one")
        if self.pool_factor is not None:
            check_float(name, "pool_factor", self.pool_factor, 1, LARGEST_FLOAT, "finite and at least 1")
        if self.max_error is not None:
            check_float(name, "max_error", self.max_error, 0, 1, "from 0 to 1")
        if self.distance_threshold is not None:
            check_float(name, "distance_threshold", self.distance_threshold, 0, 2, "from 0 to 2")
        check_int(name, "protected_tokens", self.protected_tokens, 0)
        for most in ("num_tokens", "max_tokens"):
            if getattr(self, most) is not None:
                check_int(name, most, getattr(self, most), self.protected_tokens + 1)
        check_int(name, "num_iters", self.num_iters, 1)
        if self.refine is not None:
            check_int(name, "refine", self.refine, 0)
        check_bool(name, "normalize", self.normalize)
        check_backend(name, self.backend)

    def most_vectors(self, num_tokens: int) -> int:
        """How many vectors a document of `num_tokens` tokens gives: exact, or with a bound on the error the most."""
        free = max(num_tokens - self.protected_tokens, 0)
        k = free if self.pool_factor is None else min(free, max(int(free // self.pool_factor), 1))
        most = self.max_tokens if self.num_tokens is None else self.num_tokens
        if most is not None:
            k = min(k, most - self.protected_tokens)
        return num_tokens - free + k

    def __call__(
        self,
        documents: Sequence[Tensor] | Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_assignment: bool = False,
        progress: bool = False,
    ) -> Any:
        """Pool documents given as a list, padded, or packed; they come back in the same form, dtype and device.

        Args:
            documents: a list of (n_i, D) tensors, n_i >= 0; or padded (B, N, D), with `mask`; or packed (total, D),
                with `cu_seqlens`. Floating. Documents of a list may differ in dtype and device.
            mask: (B, N) bool, True for real tokens, wherever they are. None: all are.
            cu_seqlens: (B + 1,) integers: document b is the rows cu_seqlens[b] to cu_seqlens[b + 1] - 1.
            return_assignment: also say which output row stands for each token.
            progress: show a progress bar (needs tqdm).

        Returns:
            Of a list a list of (K_i, D) tensors. Of a padded tensor (B, K, D), zeros behind each document's vectors,
                and their (B, K) mask. Of a packed one (total K, D) and int64 (B + 1,) cu_seqlens. Vectors are in the
                order of their cluster's first token. With `return_assignment`, one more: int64 rows of the document's
                output, as a list of (n_i,), as (B, N) with -1 for padding, or as (total,).

        Raises:
            TypeError, ValueError: naming the argument, and the document by its index.
        """
        self._check()
        for name, value in (("return_assignment", return_assignment), ("progress", progress)):
            check_bool("TokenPooler", name, value)
        if not isinstance(documents, Tensor):
            for name, given in (("mask", mask), ("cu_seqlens", cu_seqlens)):
                if given is not None:
                    raise ValueError(f"TokenPooler: {name} must be None beside a list of documents, got one")
            pooled, assignment = self._pool(check_documents(documents), return_assignment, progress)
            return (pooled, assignment) if return_assignment else pooled
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("TokenPooler: mask must be None beside cu_seqlens, got both")
            lengths = _packed_lengths(documents, cu_seqlens)
            pooled, assignment = self._pool(list(documents.split(lengths)), return_assignment, progress)
            counts = torch.tensor([0] + [len(p) for p in pooled], device=cu_seqlens.device)
            result: tuple[Tensor, ...] = (torch.cat(pooled) if pooled else documents[:0], counts.cumsum(0))
            if return_assignment:
                result += (torch.cat(assignment) if assignment else documents.new_zeros(0, dtype=torch.int64),)
            return result
        mask = _check_padded(documents, mask)
        real = [m.nonzero()[:, 0] for m in mask]
        pooled, assignment = self._pool([x[rows] for x, rows in zip(documents, real)], return_assignment, progress)
        if not pooled:
            result = documents[:, :0], mask[:, :0]
        else:
            counts = torch.tensor([len(p) for p in pooled], device=documents.device)
            result = (
                stacked(pooled),
                torch.arange(int(counts.max()), device=counts.device) < (counts[:, None]),
            )
        if return_assignment:
            places = mask.new_full(mask.shape, -1, dtype=torch.int64)
            labels = [row.index_put((rows,), a) for row, rows, a in zip(places, real, assignment)]
            result += (torch.stack(labels) if labels else places,)
        return result

    # ----------------------------------------------------------------------------------------------------------

    def _pool(self, documents: list[Tensor], want_assignment: bool, progress: bool) -> tuple[list[Any], list[Any]]:
        pooled: list[Any] = [None] * len(documents)
        assignment: list[Any] = [None] * len(documents)
        searched = self.max_error is not None or self.distance_threshold is not None
        for argument in ("max_error", "distance_threshold"):
            for x in documents if getattr(self, argument) is not None else ():
                check_known("TokenPooler", f"documents beside {argument}", x)
        groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        for i, x in enumerate(documents):
            free = len(x) - self.protected_tokens
            if free < 2 or not searched and self.most_vectors(len(x)) == len(x):  # nothing to merge
                pooled[i] = self._finish(x.to(accumulate_dtype(x.dtype)), x.dtype).clone()
                assignment[i] = torch.arange(len(x), device=x.device) if want_assignment else None
            else:
                groups.setdefault((padded_length(free), x.dtype, x.device), []).append(i)
        rest = sum(len(group) for group in groups.values())
        bar = _progress_bar(len(documents), len(documents) - rest) if progress else None
        for (length, _, _), group in groups.items():
            step = max(1, BATCH_ELEMENTS // (length * max(documents[group[0]].shape[1], 1)))
            for start in range(0, len(group), step):
                batch = group[start : start + step]
                for i, p, a in zip(batch, *self._pool_batch([documents[i] for i in batch], length, want_assignment)):
                    pooled[i], assignment[i] = p, a
                if bar is not None:
                    bar.update(len(batch))
        if bar is not None:
            bar.close()
        return pooled, assignment

    def _pool_batch(self, documents: list[Tensor], length: int, want_assignment: bool) -> tuple[list[Any], list[Any]]:
        """Documents of one dtype and device, whose free tokens are padded to `length`."""
        first, p = documents[0], self.protected_tokens
        x = stacked([x.to(accumulate_dtype(x.dtype)) for x in documents], length=p + length)
        if self.normalize:
            x = unit(x)
        free = torch.tensor([len(x) - p for x in documents], device=x.device)
        mask = torch.arange(length, device=x.device) < free[:, None]
        counts = torch.tensor([self.most_vectors(len(x)) - p for x in documents], device=x.device)
        if self.max_error is not None or self.distance_threshold is not None:
            with torch.no_grad():
                counts = self._fewest(scaled(x[:, p:]), mask, counts)
        centers, assignment, _ = self._cluster(x[:, p:], mask, counts)
        rows = self._finish(torch.cat([x[:, :p], centers], 1), first.dtype)
        pooled = [row[: p + k].clone() for row, k in zip(rows, counts.tolist())]  # a view would keep the batch
        if not want_assignment:
            return pooled, [None] * len(pooled)
        kept = torch.arange(p, device=x.device)
        return pooled, [torch.cat([kept, a[: len(x) - p] + p]) for a, x in zip(assignment, documents)]

    def _cluster(self, x: Tensor, mask: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centers (B, K, D), assignment (B, N) and loss (B,)."""
        clusters = kmeans(
            x, counts, mask=mask, init="farthest", num_iters=self.num_iters, sort=True, backend=self.backend
        )
        centers, assignment, inertia = clusters.centers, clusters.assignment, clusters.inertia
        free = mask.sum(1).tolist()
        rounds = [
            (10 if k * 5 < n else 0) if self.refine is None else self.refine for k, n in zip(counts.tolist(), free)
        ]
        moved = torch.tensor([b for b, r in enumerate(rounds) if r], device=x.device, dtype=torch.int64)
        if len(moved):  # the other documents keep what they would have alone, to the bit
            assignment = assignment.clone()
            for b in moved.tolist():
                n = free[b]
                assignment[b, :n] = refined(x[b, :n], assignment[b, :n], int(counts[b]), rounds[b])
            tokens, labels = x[moved], assignment[moved]
            means = pool(tokens, labels, centers.shape[1], backend=self.backend)
            centers = centers.index_copy(0, moved, means)
            with torch.no_grad():
                left = (tokens - unpool(means, labels)) * mask[moved][..., None]
                inertia = inertia.index_copy(0, moved, _energy(left))
        return centers, assignment, inertia

    def _finish(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (unit(x) if self.normalize else x).to(dtype)

    def _fewest(self, x: Tensor, mask: Tensor, most: Tensor) -> Tensor:
        """(B,) the fewest clusters within the bound, by bisection of all documents at once; `most` where none is."""
        low, high = torch.zeros_like(most), most  # low misses the bound; high keeps it, or is all that is allowed
        while len(rows := (high - low > 1).nonzero()[:, 0]):
            middle = (low[rows] + high[rows]) // 2
            keeps = self._within(x[rows], mask[rows], middle)
            high = high.index_put((rows,), torch.where(keeps, middle, high[rows]))
            low = low.index_put((rows,), torch.where(keeps, low[rows], middle))
        return high

    def _within(self, x: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        """(B,) bool: do so many clusters keep the bound?"""
        centers, assignment, inertia = self._cluster(x, mask, counts)
        if self.max_error is not None:
            return inertia <= self.max_error * _energy(x)
        assert self.distance_threshold is not None, "one of the two is searched for"
        tokens, standing = unit(x), unpool(unit(centers), assignment)
        distance = (tokens - standing).square().sum(-1) / 2  # 1 - cos; of equal directions exactly 0
        distance = torch.where(tokens.any(-1) == standing.any(-1), distance, 1)  # zero has no direction
        return ((distance <= self.distance_threshold) | ~mask).all(1)

    def __repr__(self) -> str:
        options = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return f"TokenPooler({', '.join(options)})"


def _energy(x: Tensor) -> Tensor:
    """(B,) squared norms. Summed in two steps: torch splits one sum among its threads as the batch wants it."""
    return x.square().sum(2).sum(1)


def unit(x: Tensor) -> Tensor:
    """Rows of unit norm (zeros stay), also where their squares would overflow or vanish."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    result = x / norm.clamp(min=1e-12)
    strange = ((norm > 1e-12) & (norm < 1e18)).logical_not()
    if x.shape[-1] == 0 or values.visible(x) and not x[strange[..., 0]].any():  # zeros at most
        return result
    largest = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(strange, normalize(x * power_of_two_scale(largest)[0], dim=-1), result)


def padded_length(n: int) -> int:
    """The length that a document of n tokens is padded to: at most an eighth more, and a matter of n alone, so that
    what a document is computed with does not depend on the others."""
    step = max(1, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


# --------------------------------------------------------------------------------------------------------------


def check_documents(documents: Iterable[Tensor]) -> list[Tensor]:
    """The documents as a list of (n_i, D) floating tensors, or an error that names the first that is not."""
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise TypeError(
            f"TokenPooler: documents must be a list of (n, D) tensors or a tensor, got {type(documents).__name__}"
        )
    documents = list(documents)
    for i, x in enumerate(documents):
        if not isinstance(x, Tensor):
            remedy = "; convert it with torch.as_tensor" if hasattr(x, "__array__") else ""
            raise TypeError(f"TokenPooler: documents[{i}] must be a torch.Tensor, got {type(x).__name__}{remedy}")
        check_tensor("TokenPooler", f"documents[{i}]", x, floating=True)
        check_not_meta("TokenPooler", f"documents[{i}]", x)
        if x.dim() != 2:
            raise ValueError(f"TokenPooler: documents[{i}] must have shape (n, D), got {tuple(x.shape)}")
        if x.shape[1] != documents[0].shape[1]:
            raise ValueError(
                f"TokenPooler: documents[{i}] must have D = {documents[0].shape[1]} features as documents[0] has, got "
                f"{tuple(x.shape)}"
            )
    return documents


def _check_tensor(x: Tensor, dims: int, shape: str) -> None:
    if x.is_nested:
        raise TypeError("TokenPooler: documents must not be a nested tensor; pass list(documents.unbind())")
    check_dims("TokenPooler", "documents", x, dims, dims, shape)
    check_not_meta("TokenPooler", "documents", x)


def _check_padded(x: Tensor, mask: Tensor | None) -> Tensor:
    _check_tensor(x, 3, "(B, N, D), or (total, D) with cu_seqlens, or be a list")
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"TokenPooler: mask must be a bool tensor (True = real token), got {got}; write mask != 0")
    check_known("TokenPooler", "mask", mask)
    if mask.shape != x.shape[:2]:
        raise ValueError(f"TokenPooler: mask must have shape (B, N) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    return mask.to(x.device)


def _packed_lengths(x: Tensor, cu_seqlens: Tensor) -> list[int]:
    _check_tensor(x, 2, "(total, D) beside cu_seqlens")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in INTEGER or cu_seqlens.dim() != 1:
        got = (cu_seqlens.dtype, tuple(cu_seqlens.shape)) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
        raise TypeError(f"TokenPooler: cu_seqlens must be a (B + 1,) integer tensor, got {got}")
    check_known("TokenPooler", "cu_seqlens", cu_seqlens)
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != len(x):
        raise ValueError(
            f"TokenPooler: cu_seqlens must start at 0 and end at the number of tokens, {len(x)}, got {ends[:1]} to "
            f"{ends[-1:]}"
        )
    lengths = [b - a for a, b in zip(ends, ends[1:])]
    if any(n < 0 for n in lengths):
        i = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(f"TokenPooler: cu_seqlens must not fall, got {ends[i]} then {ends[i + 1]} for document {i}")
    return lengths


def _progress_bar(total: int, done: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("TokenPooler: progress=True needs tqdm; install it, or pass progress=False") from error
    return tqdm(total=total, initial=done, desc="pooling", unit="doc")
