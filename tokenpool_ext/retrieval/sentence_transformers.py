"""`KMeansTokenPooling`: K-Means in place of sentence-transformers' `HierarchicalTokenPooling` (6.0 or newer)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling
except ImportError as error:
    raise ImportError(
        "tokenpool_ext.retrieval.sentence_transformers needs sentence-transformers 6 or newer:"
        " pip install 'tokenpool_ext[sentence-transformers]'"
    ) from error

from .pooler import TokenPooler


class KMeansTokenPooling(BaseTokenPooling):
    """Module of a `MultiVectorEncoder`, `token_pooling=` of its encode calls, or standalone by `pool`. Saved in the
    checkpoint and loaded again.

    Args:
        pool_factor: keep n // pool_factor of a document's n unprotected tokens, at least one; may be fractional.
            1.0: all.
        num_protected_tokens: tokens in front that are kept ([CLS]).
        normalize_embeddings: scale all that comes out to unit norm, in float32.
        max_tokens, max_error, distance_threshold: as in `TokenPooler`; the last two want pool_factor at 1.0.
        tasks: the tasks it applies to; ["document"] when None.
    """

    config_keys = [
        "pool_factor",
        "num_protected_tokens",
        "normalize_embeddings",
        "max_tokens",
        "max_error",
        "distance_threshold",
        "tasks",
    ]

    def __init__(
        self,
        pool_factor: float = 1.0,
        *,
        num_protected_tokens: int = 1,
        normalize_embeddings: bool = True,
        max_tokens: int | None = None,
        max_error: float | None = None,
        distance_threshold: float | None = None,
        tasks: str | list[str] | None = None,
    ) -> None:
        super().__init__(tasks=tasks)
        self.pool_factor = pool_factor
        self.num_protected_tokens = num_protected_tokens
        self.normalize_embeddings = normalize_embeddings
        self.max_tokens = max_tokens
        self.max_error = max_error
        self.distance_threshold = distance_threshold
        self._pooler()  # checks them

    def _pooler(self) -> TokenPooler:
        """What the attributes say now: they may be set after construction."""
        bounded = self.max_error is not None or self.distance_threshold is not None
        return TokenPooler(
            None if bounded and self.pool_factor == 1 else self.pool_factor,
            max_tokens=self.max_tokens,
            max_error=self.max_error,
            distance_threshold=self.distance_threshold,
            protected_tokens=self.num_protected_tokens,
            normalize=self.normalize_embeddings,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved; numbers of NumPy as Python's."""
        config = super().get_config_dict()
        return {key: value.item() if hasattr(value, "item") else value for key, value in config.items()}

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        if not self.applies_to(task) or features["token_embeddings"].shape[0] == 0:
            return features
        embeddings, mask = self._pooler()(features["token_embeddings"], features["attention_mask"].bool())
        features["token_embeddings"], features["attention_mask"] = embeddings, mask
        return features

    def pool(
        self, embeddings: Any, *, task: str | None = None, attention_mask: Any = None, padding_side: str = "right"
    ) -> Any:
        if isinstance(embeddings, list) and self.applies_to(task):
            return self._pooler()(embeddings)  # all at once
        return super().pool(embeddings, task=task, attention_mask=attention_mask, padding_side=padding_side)

    def pool_one(self, embedding: Tensor, **kwargs: Any) -> Tensor:
        pooled: list[Tensor] = self._pooler()([embedding])
        return pooled[0]
