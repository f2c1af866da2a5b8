"""Exact, weighted, batched, differentiable K-Means and K-Medoids of tokens, and Token Pooling for vision transformers.

import torch, tokenpool_ext as tp
clusters = tp.kmeans(torch.randn(64, 196, 384), 98)          # centers (64, 98, 384), assignment (64, 196), ...
model = tp.patch(model, keep_ratio=0.7)                       # a timm or Hugging Face ViT, pooled between layers
"""

from ._version import __version__
from .backends import backends
from .baselines import BipartiteMatching, GridPooling, ImportanceSampling, RandomSelection, ScorePruning
from .cost import Cost, cost
from .explain import Plan, explain
from .functional import Clusters, assign, attention_received, kmeans, kmedoids, pool, unpool
from .modules import TokenPooling
from .visual import compress, select
from .vit import learn_schedule, patch, search_schedule, supported, unpatch

__all__ = [
    "BipartiteMatching",
    "Clusters",
    "Cost",
    "GridPooling",
    "ImportanceSampling",
    "Plan",
    "RandomSelection",
    "ScorePruning",
    "TokenPooling",
    "__version__",
    "assign",
    "attention_received",
    "backends",
    "compress",
    "cost",
    "explain",
    "kmeans",
    "kmedoids",
    "learn_schedule",
    "patch",
    "pool",
    "search_schedule",
    "select",
    "supported",
    "unpatch",
    "unpool",
]
