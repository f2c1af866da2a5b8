"""Fewer vectors for every document of a multi-vector index (ColBERT, ColPali): exact batched K-Means of its tokens.

    from tokenpool_ext.retrieval import TokenPooler
    pooled = TokenPooler(pool_factor=3)(documents)  # list of (n_i, D) -> list of (K_i, D), unit norm

The drop-ins for other libraries are beside it, each imported only when asked for: `.sentence_transformers`, `.colpali`,
`.pylate`.
"""

from .pooler import TokenPooler

__all__ = ["TokenPooler"]
