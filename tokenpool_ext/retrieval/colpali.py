"""`KMeansTokenPooler`: K-Means in place of colpali-engine's `HierarchicalTokenPooler`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from colpali_engine.compression.token_pooling.base_token_pooling import BaseTokenPooler
except ImportError as error:
    raise ImportError(
        "tokenpool_ext.retrieval.colpali needs colpali-engine 0.3.10 or newer: pip install 'tokenpool_ext[colpali]'"
    ) from error

from .pooler import TokenPooler


class KMeansTokenPooler(BaseTokenPooler):
    """`KMeansTokenPooler().pool_embeddings(embeddings, pool_factor=3)`, as colpali-engine's poolers are called: lists,
    or 3-D tensors with `padding=True` and `padding_side`; `return_dict=True` gives `cluster_id_to_indices`.

    Documents are pooled together; one-token and empty ones are allowed. `num_workers` changes nothing: the kernels use
    torch's threads.
    """

    def _pool_embeddings_impl(
        self, embeddings: Any, num_workers: int | None = None, pool_factor: float = 1, **options: Any
    ) -> tuple[list[Tensor], list[dict[int, tuple[Tensor]]]]:
        pooler = TokenPooler(pool_factor, **options)
        pooled, assignment = pooler(list(embeddings), return_assignment=True)
        return pooled, [
            {j: (torch.where(labels == j)[0],) for j in range(len(vectors))}
            for vectors, labels in zip(pooled, assignment)
        ]
