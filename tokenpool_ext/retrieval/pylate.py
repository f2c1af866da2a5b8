"""K-Means for PyLate's `pool_factor`, on a model that exists.

from tokenpool_ext.retrieval.pylate import use_kmeans
model = use_kmeans(pylate.models.ColBERT(...))
model.encode(documents, pool_factor=3, protected_tokens=1, is_query=False)
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor

from .pooler import TokenPooler


def pool_embeddings_kmeans(
    self: Any, documents_embeddings: list[Tensor], pool_factor: float = 1, protected_tokens: int = 1
) -> list[Tensor]:
    """What PyLate calls `pool_embeddings_hierarchical`: the same arguments, counts and order (protected tokens first).

    Results are unit norm and stay on the device of the embeddings.
    """
    pooled: list[Tensor] = TokenPooler(pool_factor, protected_tokens=protected_tokens)(documents_embeddings)
    return pooled


def use_kmeans(model: Any) -> Any:
    """Let this model's `encode(..., pool_factor=...)` cluster by K-Means; returns the model."""
    if not hasattr(model, "pool_embeddings_hierarchical"):
        raise TypeError(
            f"use_kmeans: model must be a pylate.models.ColBERT (1.0 or newer), got {type(model).__name__}, which has "
            "no pool_embeddings_hierarchical"
        )
    model.pool_embeddings_hierarchical = types.MethodType(pool_embeddings_kmeans, model)
    return model
