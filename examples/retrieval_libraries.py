"""K-Means pooling in the libraries that make and search multi-vector indexes. Each part runs where its library is.

python examples/retrieval_libraries.py
"""

import torch

from tokenpool_ext.retrieval import TokenPooler

pages = [torch.nn.functional.normalize(torch.randn(n, 128), dim=-1) for n in (1030, 700, 1)]


def alone():
    pooled = TokenPooler(pool_factor=3)(pages)  # 343, 233 and 1 vectors, unit norm
    bounded = TokenPooler(max_error=0.2, max_tokens=512, protected_tokens=1)(pages)  # as few as the bound allows
    return [len(x) for x in pooled + bounded]


def with_sentence_transformers():  # 6.0 or newer; in a MultiVectorEncoder: encode_document(..., token_pooling=pooling)
    from tokenpool_ext.retrieval.sentence_transformers import KMeansTokenPooling

    pooling = KMeansTokenPooling(pool_factor=1.5, num_protected_tokens=1)  # or the last module: saved with the model
    return [len(x) for x in pooling.pool(pages)]


def with_colpali_engine():
    from tokenpool_ext.retrieval.colpali import KMeansTokenPooler

    return [len(x) for x in KMeansTokenPooler().pool_embeddings(pages, pool_factor=3)]


def with_pylate():  # of a pylate.models.ColBERT: use_kmeans(model).encode(documents, is_query=False, pool_factor=3)
    from tokenpool_ext.retrieval.pylate import pool_embeddings_kmeans

    return [len(x) for x in pool_embeddings_kmeans(None, pages, pool_factor=3)]  # what it then calls


if __name__ == "__main__":
    for part in (alone, with_sentence_transformers, with_colpali_engine, with_pylate):
        try:
            print(f"{part.__name__}: {part()}")
        except ImportError as error:
            print(f"{part.__name__}: not here ({error})")
