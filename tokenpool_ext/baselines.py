"""The layers Token Pooling is compared with, behind the same ``forward`` (see ``reduction.TokenReduction``).

Selections keep K tokens as they are and drop the others: score pruning (PoWER-BERT), importance sampling, random.
Mergers average: a regular grid (position only), and ToMe's bipartite matching. With ``return_clusters=True`` a
selection assigns -1 to the tokens it dropped; they count nothing in ``Clusters.inertia``, so that of a selection is 0.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .checks import check_bool, check_int
from .functional import Clusters, pool, unpool
from .matching import match
from .ops import accumulate_dtype, falling
from .reduction import TokenReduction, cached, take_tokens
from .reference_steps import nearest_members, sort_clusters

__all__ = ["ScorePruning", "ImportanceSampling", "RandomSelection", "GridPooling", "BipartiteMatching"]


class _Selection(TokenReduction):
    """Keep the K tokens with the largest priority, in their order of appearance."""

    def priority(self, x: Tensor, scores: Tensor | None) -> Tensor:
        """(B, n) float: larger is kept first; ties go to the lower index."""
        raise NotImplementedError

    def reduce(
        self,
        x: Tensor,
        k: int,
        scores: Tensor | None,
        features: Tensor | None,
        mask: Tensor | None,
        sizes: Tensor | None,
        want_clusters: bool,
    ) -> tuple[Tensor, Clusters | None]:
        priority = self.priority(x, scores)
        if mask is not None:  # padding comes after all real tokens
            least = torch.finfo(priority.dtype).min
            priority = torch.where(mask, priority.clamp(min=least), -torch.inf)
        index = falling(priority).index_select(1, torch.arange(k, device=x.device))  # a slice would ask if k <= n
        if mask is None:
            index = index.sort(dim=1).values
        else:  # what an image does not have or keep: zeros at the end, as after clustering
            kept, counts = mask.gather(1, index), self._counts(mask, k)
            if counts is not None:
                kept &= torch.arange(k, device=x.device) < counts[:, None]
            index = torch.where(kept, index, x.shape[1]).sort(dim=1).values
            index = torch.where(index < x.shape[1], index, -1)
        tokens = take_tokens(x, index)
        return tokens, self._clusters(x, tokens, index, self._weights(scores, sizes)) if want_clusters else None

    def _weights(self, scores: Tensor | None, sizes: Tensor | None) -> Tensor | None:
        return sizes if scores is None else scores

    def _clusters(self, x: Tensor, tokens: Tensor, index: Tensor, weights: Tensor | None) -> Clusters:
        b, n, _ = x.shape
        k = index.shape[1]
        label = torch.arange(k, device=x.device).expand(b, k)
        # Missing tokens (-1) write to an extra column that is cut off.
        assignment = torch.full((b, n + 1), -1, dtype=torch.int64, device=x.device)
        assignment = assignment.scatter(1, torch.where(index >= 0, index, n), label)[:, :n]
        mass = x.new_ones(b, n, dtype=accumulate_dtype(x.dtype)) if weights is None else weights.detach()
        mass = torch.where(index >= 0, mass.to(accumulate_dtype(x.dtype)).gather(1, index.clamp(min=0)), 0)
        return Clusters(tokens, assignment, mass, index, mass.new_zeros(b))


class _ScoredSelection(_Selection):
    @property
    def needs_scores(self) -> bool:
        return True

    def _scores(self, scores: Tensor | None) -> Tensor:
        if scores is None:
            raise ValueError(
                f"{type(self).__name__}: scores must be a (B, N) tensor, got None;"
                " tokenpool_ext.attention_received(q, k) gives them"
            )
        return scores.detach().to(accumulate_dtype(scores.dtype))


class ScorePruning(_ScoredSelection):
    """Keep the K tokens with the highest significance score.

    Source: Goyal et al., "PoWER-BERT" (arXiv 2001.08950), section 3 (hard extraction); a baseline of Token Pooling.
    """

    def priority(self, x: Tensor, scores: Tensor | None) -> Tensor:
        return self._scores(scores)


class _Seeded:
    """An optional seed: the same draw at every forward. None: torch's global generator."""

    seed: int | None

    def _check_seed(self, value: Any) -> int | None:
        return None if value is None else check_int(type(self).__name__, "seed", value, 0, 2**63 - 1)

    def _uniform(self, x: Tensor) -> Tensor:
        shape = x.shape[:2]
        if self.seed is None:
            return torch.rand(shape, device=x.device, dtype=torch.float32)
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        return torch.rand(shape, device=x.device, dtype=torch.float32, generator=generator)

    def _options(self) -> list[str]:
        return [] if self.seed is None else [f"seed={self.seed}"]


class ImportanceSampling(_Seeded, _ScoredSelection):
    """Draw K tokens without replacement with probability in proportion to their score (Gumbel top-k).

    ``seed``: None draws from torch's global generator; an int makes every forward draw the same.

    Source: the baseline "Importance Selection" of Marin et al. (arXiv 2110.03860), Fig. 3; its definition there could
    not be read, so the name is taken at its word.
    """

    def __init__(self, num_tokens: int | None = None, *, seed: int | None = None, **common: Any) -> None:
        super().__init__(num_tokens, **common)
        self.seed = seed

    def priority(self, x: Tensor, scores: Tensor | None) -> Tensor:
        exponential = -torch.log1p(-self._uniform(x))
        return (
            self._scores(scores).clamp(min=0).log() - exponential.clamp(min=torch.finfo(exponential.dtype).tiny).log()
        )


class RandomSelection(_Seeded, _Selection):
    """Keep K tokens drawn uniformly at random. ``seed`` as in :class:`ImportanceSampling`."""

    def __init__(self, num_tokens: int | None = None, *, seed: int | None = None, **common: Any) -> None:
        super().__init__(num_tokens, **common)
        self.seed = seed

    def priority(self, x: Tensor, scores: Tensor | None) -> Tensor:
        return self._uniform(x)


class GridPooling(TokenReduction):
    """Average pooling over a regular grid of exactly K cells, whatever the tokens hold.

    The image is cut into about ``sqrt(K h / w)`` horizontal bands and each band into equal cells, so K need not be a
    product; for a 16x16 image K = 64 gives plain 2x2 average pooling. Pooling again merges the cells of the layer
    before.

    Args:
        grid_size: (h, w) of the image's patches. None: a square.
    """

    def __init__(
        self, num_tokens: int | None = None, *, grid_size: tuple[int, int] | None = None, **common: Any
    ) -> None:
        super().__init__(num_tokens, **common)
        self.grid_size = grid_size

    def _check_grid_size(self, value: Any) -> tuple[int, int] | None:
        if value is None:
            return None
        name = type(self).__name__
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"{name}: grid_size must be (h, w), got {value!r}")
        height, width = (check_int(name, "grid_size", side, 1) for side in value)
        return height, width

    def reduce(
        self,
        x: Tensor,
        k: int,
        scores: Tensor | None,
        features: Tensor | None,
        mask: Tensor | None,
        sizes: Tensor | None,
        want_clusters: bool,
    ) -> tuple[Tensor, Clusters | None]:
        b, n, _ = x.shape
        n, k = operator.index(n), operator.index(k)  # cells are made in Python, so each n has its own compiled graph
        cells = grid_cells(n, k, *(self.grid_size or (1, 1)))
        assignment = torch.tensor(cells, device=x.device).expand(b, n)
        if mask is not None:
            assignment = torch.where(mask, assignment, -1)
        return _merge(self, x, assignment.contiguous(), k, sizes, want_clusters)

    def _options(self) -> list[str]:
        return [] if self.grid_size is None else [f"grid_size={self.grid_size}"]


@cached
def grid_cells(n: int, k: int, height: int, width: int) -> tuple[int, ...]:
    """The cell of each of n raster-ordered tokens when an image of that aspect is cut into k <= n cells, none empty."""
    rows = _bands(n, height, width)
    ideal = (k * height / width) ** 0.5
    for bands in sorted(range(1, min(len(rows), k) + 1), key=lambda a: (abs(a - ideal), a)):
        target = _split(k, bands)
        first = [sum(target[:band]) for band in range(bands)]
        cells = []
        for i, length in enumerate(rows):
            band = i * bands // len(rows)
            cells += [first[band] + j * target[band] // length for j in range(length)]
        if len(set(cells)) == k:
            return tuple(cells)
    return tuple(i * k // n for i in range(n))


def _bands(n: int, height: int, width: int) -> list[int]:
    """How n cells of an image are laid out: the number of cells in each band."""
    if n == height * width:
        return [width] * height
    return _split(n, max(1, min(n, round((n * height / width) ** 0.5))))


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


class BipartiteMatching(TokenReduction):
    """ToMe's merging: tokens are dealt alternately into sets A (even positions) and B, every token of A points to its
    most similar one in B (cosine), and the strongest pairs are merged into their size-weighted mean.

    One round can remove at most half of the tokens; for a smaller K further rounds follow (ToMe merges a little in
    every block instead). Give attention keys as ``features``, as its authors do. ``sort`` orders the result by each
    cluster's first token. A mask is refused.

    Source: Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3, written from the paper.
    """

    def __init__(self, num_tokens: int | None = None, *, sort: bool = True, **common: Any) -> None:
        super().__init__(num_tokens, **common)
        self.sort = sort

    def _check_sort(self, value: Any) -> bool:
        return check_bool(type(self).__name__, "sort", value)

    def reduce(
        self,
        x: Tensor,
        k: int,
        scores: Tensor | None,
        features: Tensor | None,
        mask: Tensor | None,
        sizes: Tensor | None,
        want_clusters: bool,
    ) -> tuple[Tensor, Clusters | None]:
        if mask is not None:
            raise ValueError(
                "BipartiteMatching: mask must be None, got a tensor; the matching has no notion of padding"
            )
        metric = (x if features is None else features).detach()
        weights = None if sizes is None else sizes.detach().to(accumulate_dtype(sizes.dtype))
        assignment = None
        n = x.shape[1]
        while n > k:
            kept = max(k, n - n // 2)
            with torch.no_grad():
                labels = match(metric, kept)[0]
                labels = sort_clusters(labels, kept)[0] if self.sort else labels
                assignment = labels if assignment is None else labels.gather(1, assignment)
                if kept > k:
                    ones = metric.new_ones(metric.shape[:2], dtype=torch.float32) if weights is None else weights
                    metric = pool(metric, labels, kept, weights=weights, backend=self.backend)
                    weights = ones.new_zeros(ones.shape[0], kept).scatter_add(1, labels, ones)
            n = kept
        assert assignment is not None, "k < n: at least one round"
        return _merge(self, x, assignment, k, sizes, want_clusters)

    def _options(self) -> list[str]:
        return [] if self.sort else ["sort=False"]


def _merge(
    module: TokenReduction, x: Tensor, assignment: Tensor, k: int, sizes: Tensor | None, want_clusters: bool
) -> tuple[Tensor, Clusters | None]:
    """Size-weighted means of an assignment, and its Clusters when wanted."""
    tokens = pool(x, assignment, k, weights=sizes, backend=module.backend)
    if not want_clusters:
        return tokens, None
    acc = accumulate_dtype(x.dtype)
    ones = x.new_ones(x.shape[:2], dtype=acc) if sizes is None else sizes.detach().to(acc)
    ones = torch.where(assignment >= 0, ones, 0)
    mass = ones.new_zeros(x.shape[0], k).scatter_add(1, assignment.clamp(min=0), ones)
    real = torch.where((assignment >= 0)[:, :, None], x.detach().to(acc), 0)
    means = tokens.detach()  # before they are rounded
    if x.dtype != acc:
        means = pool(real, assignment, k, weights=None if sizes is None else sizes.detach(), backend=module.backend)
    inertia = (ones * (real - unpool(means, assignment)).square().sum(2)).sum(1)
    return tokens, Clusters(tokens, assignment, mass, nearest_members(x, means, assignment, ones), inertia)
