"""``nn.Module`` layers that replace the N patch tokens of an image by K tokens.

:class:`TokenPooling` is the layer of Marin et al., "Token Pooling in Vision Transformers" (arXiv 2110.03860), section
3: it has no parameters and no buffers, so it adds nothing to a checkpoint, and it keeps nothing between forwards.
``reduction.py`` holds what every such layer shares; the layers it is compared with are in ``baselines.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backends import select
from .checks import check_bool, check_choice, check_init, check_int, check_negative
from .functional import Clusters, cluster_from, pool
from .reduction import Reduced, TokenReduction, take_tokens
from .starts import STRATEGIES

__all__ = ["Reduced", "TokenPooling", "TokenReduction"]


class TokenPooling(TokenReduction):
    """Replace the patch tokens by K that reconstruct them best: exact (weighted) K-Means or K-Medoids.

    Minimises ``sum_i w_i min_j ||x_i - c_j||^2`` with w the significance scores. Without a mask K is the same for every
    image. Gradients flow through the means (or the medoids' rows), the assignment is constant.

    num_tokens, keep_ratio, num_prefix_tokens, return_clusters and backend are those of :class:`TokenReduction`.

    Args:
        algorithm: ``"kmeans"`` or ``"kmedoids"``.
        weighted: use ``scores`` as weights (the paper's WK-Means, WK-Medoids). False ignores them: ``sizes``, where
            given, are the weights, as without scores.
        num_iters: upper bound on iterations; the paper: converges "usually within 5".
        init: how to start, see :func:`~tokenpool_ext.kmeans`; a name, or None for its default, "farthest".
        emit: what stands for a cluster: ``"mean"`` (weighted), or ``"medoid"``, a token of the input; the default is
            the medoid for K-Medoids and the mean for K-Means. ``"medoid"`` needs ``algorithm="kmedoids"``.
        sort: order the pooled tokens by their cluster's first token (keeps the spatial order).
        position_weight: cluster on the coordinates ``positions`` too: how far they spread, in spreads of the features
            (see ``positions.py``). 0: on the features alone.

    Source: Marin et al. (arXiv 2110.03860), section 3.
    """

    def __init__(
        self,
        num_tokens: int | None = None,
        *,
        keep_ratio: float | None = None,
        algorithm: str = "kmeans",
        weighted: bool = True,
        num_iters: int = 5,
        num_prefix_tokens: int = 1,
        init: str | None = None,
        emit: str | None = None,
        sort: bool = True,
        position_weight: float = 0.0,
        return_clusters: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_tokens,
            keep_ratio=keep_ratio,
            num_prefix_tokens=num_prefix_tokens,
            return_clusters=return_clusters,
            backend=backend,
        )
        self.algorithm = algorithm
        self.weighted = weighted
        self.num_iters = num_iters
        self.init = init
        self.emit = emit
        self.sort = sort
        self.position_weight = position_weight

    def _check_algorithm(self, value: Any) -> str:
        algorithm: str = check_choice(type(self).__name__, "algorithm", value, ("kmeans", "kmedoids"))
        self._check_together(algorithm=algorithm)
        return algorithm

    def _check_weighted(self, value: Any) -> bool:
        return check_bool(type(self).__name__, "weighted", value)

    def _check_num_iters(self, value: Any) -> int:
        return check_int(type(self).__name__, "num_iters", value, 1)

    def _check_init(self, value: Any) -> str | None:
        name = type(self).__name__
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"{name}: init must be the name of a strategy or None, got {type(value).__name__}; call"
                " tokenpool_ext.kmeans for a start given as a tensor"
            )
        if value is not None:
            check_choice(name, "init", value, STRATEGIES)
        self._check_together(init=value)
        return value

    def _check_keep_ratio(self, value: Any) -> float:
        ratio = super()._check_keep_ratio(value)
        self._check_together(keep_ratio=ratio)
        return ratio

    def _check_emit(self, value: Any) -> str | None:
        emit: str | None = (
            check_choice(type(self).__name__, "emit", value, ("mean", "medoid")) if value is not None else None
        )
        self._check_together(emit=emit)
        return emit

    def _check_sort(self, value: Any) -> bool:
        return check_bool(type(self).__name__, "sort", value)

    def _check_together(self, **new: Any) -> None:
        """What one attribute says about another, with ``new`` in place of what is set."""
        name = type(self).__name__
        value: Any = {**self.__dict__, **new}.get
        if value("init") == "bipartite" and value("keep_ratio") is not None and value("keep_ratio") < 0.5:
            raise ValueError(
                f"{name}: init='bipartite' needs keep_ratio >= 0.5, got {value('keep_ratio'):g}; use another init"
            )
        if value("emit") == "medoid" and value("algorithm") == "kmeans":
            raise ValueError(f"{name}: emit='medoid' needs algorithm='kmedoids', got 'kmeans', which emits means")

    @property
    def needs_scores(self) -> bool:
        return self.weighted

    def _weights(self, scores: Tensor | None, sizes: Tensor | None) -> Tensor | None:
        return scores if self.weighted and scores is not None else sizes

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
        weights = self._weights(scores, sizes)
        on, name = x if features is None else features.detach(), self.algorithm
        argument = "sizes" if weights is sizes else "scores"
        in_acc = None if weights is None else check_negative(type(self).__name__, argument, weights, on, mask)
        chain = select(name, on, self.backend)
        counts = None if mask is None else self._counts(mask, k)
        start = check_init(name, self.init, on, k, mask, counts, True)
        clusters = cluster_from(chain, name, on, in_acc, mask, counts, start, k, self.num_iters, self.sort)
        if name == "kmeans" or self.emit == "mean":
            if features is None and name == "kmeans":
                return clusters.centers, clusters
            return pool(x, clusters.assignment, k, weights=weights, backend=self.backend), clusters
        if features is None:
            return clusters.centers, clusters
        return take_tokens(x, clusters.medoids), clusters

    def _options(self) -> list[str]:
        options = [
            f"algorithm={self.algorithm!r}",
            f"weighted={self.weighted}",
            f"num_iters={self.num_iters}",
            f"emit={self.emit or ('medoid' if self.algorithm == 'kmedoids' else 'mean')!r}",
        ]
        if self.init is not None:
            options.append(f"init={self.init!r}")
        if not self.sort:
            options.append("sort=False")
        if self.position_weight:
            options.append(f"position_weight={self.position_weight}")
        return options
