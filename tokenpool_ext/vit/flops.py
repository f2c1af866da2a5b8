"""Multiply-accumulates of a Vision Transformer, whole and pooled, from its structure alone.

Per block with N tokens of width M (paper: Marin et al., arXiv 2110.03860, section 3; "Gflops" there are GMACs):
queries, keys, values ``3 N M^2``, ``q k^T`` and attention times values ``N^2 M`` each, output projection ``N M^2``, MLP
``2 N M H`` (3 for SwiGLU) with hidden width H. Patch embedding ``n P^2 C M``, head ``M * classes``. Norms, softmax,
activations, attention-pooling heads and the choice of starts for the clustering are left out. A block that pools
between attention and MLP pays for its MLP only on the tokens left.

Pooling, on n patch tokens of width E (M, or the head width when keys are clustered), K kept, T iterations:
K-Means ``T n K E`` (every distance in every iteration) or, when less, ``n^2 E`` (the Gram product, after which
iterations
only add); K-Medoids ``n^2 E``; bipartite matching ``n^2 E / 4``; grid, pruning and random nothing. Significance scores:
``2 N^2 M``, a pass for the normaliser and one for the sum, which is what a pass over queries and keys costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..baselines import BipartiteMatching
from ..modules import TokenPooling
from . import finding, halves
from . import schedule as schedules

__all__ = ["Cost", "ViTSpec", "cost", "gmacs", "tokens_per_layer"]


@dataclass(frozen=True)
class ViTSpec:
    """The shape of a plain Vision Transformer. ``mlp_macs`` is the MLP's cost per token (0: the usual 8 M^2)."""

    depth: int
    width: int
    num_patches: int
    num_prefix_tokens: int = 1
    num_heads: int = 0
    patch_inputs: int = 16 * 16 * 3
    mlp_macs: int = 0
    num_classes: int = 1000

    @classmethod
    def from_model(cls, model: nn.Module, image_size: int | tuple[int, int] | None = None) -> ViTSpec:
        """Read it off a supported model. ``image_size``: pixels, a side or (height, width); None: the model's own."""
        found = finding.find_blocks(model, None, "ViTSpec.from_model")
        block, owner = found.blocks[0], _with_stem(found)
        parts = halves.find(block)
        if parts is None:
            raise TypeError(f"cost: {type(block).__name__} has no attention and MLP known here; use ViTSpec(...)")
        linear = [m for part in parts.mlp for m in getattr(block, part).modules() if isinstance(m, nn.Linear)]
        attention = list(getattr(block, parts.attention).modules())
        names = ("num_heads", "num_attention_heads")
        num_heads = next((getattr(m, n) for m in attention for n in names if hasattr(m, n)), 0)
        embedding = _patch_projection(owner)
        side = _own_size(owner) if image_size is None else image_size
        height, width = (side, side) if isinstance(side, int) else side
        patch_h, patch_w = embedding.kernel_size
        heads = list(_heads(model, owner))
        return cls(
            depth=len(found.blocks),
            width=embedding.out_channels,
            num_patches=(height // patch_h) * (width // patch_w),
            num_prefix_tokens=finding.count_prefix(found)[0],
            num_heads=num_heads,
            patch_inputs=embedding.in_channels * patch_h * patch_w,
            mlp_macs=sum(m.in_features * m.out_features for m in linear),
            num_classes=sum(m.in_features * m.out_features for m in heads) // embedding.out_channels,
        )


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one image, by part. ``gmacs`` is the sum in units of 1e9."""

    projections: int
    attention: int
    mlp: int
    scores: int
    clustering: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def gmacs(self) -> float:
        return self.total / 1e9


def tokens_per_layer(
    model: nn.Module | ViTSpec, schedule: Mapping[int, int | float] | None = None, *, image_size=None
) -> list[int]:
    """Tokens that leave each block, prefix tokens included.

    Args:
        model: a supported model, patched or not, or a :class:`ViTSpec`.
        schedule: ``{block: count or ratio}``; None: that of the patched model, or none.
        image_size: pixels, when not the model's own.
    """
    spec, poolings, _ = _inputs(model, schedule, image_size)
    left, out = spec.num_patches, []
    for layer in range(spec.depth):
        left = _kept(left, poolings.get(layer))
        out.append(left + spec.num_prefix_tokens)
    return out


def cost(
    model: nn.Module | ViTSpec,
    schedule: Mapping[int, int | float] | None = None,
    *,
    image_size=None,
    pooling: str = "kmeans",
    position: str = "attention",
    num_iters: int = 5,
    scores: bool = True,
    cluster_on: str = "tokens",
) -> Cost:
    """Multiply-accumulates of one image.

    Of a patched model nothing else need be said: schedule and pooling are read off it. For a :class:`ViTSpec`, or to
    ask
    "what if" of a model, give a ``schedule`` and the pooling by name: "kmeans", "kmedoids", "bipartite", or anything
    else for one that costs nothing; ``scores``: whether significance scores are computed.
    """
    spec, poolings, plans = _inputs(model, schedule, image_size)
    m, p = spec.width, spec.num_prefix_tokens
    mlp_macs = spec.mlp_macs or 8 * m * m
    left = spec.num_patches
    projections = attention = mlp = score = clustering = 0
    for layer in range(spec.depth):
        n = left + p
        after = _kept(left, poolings.get(layer))
        projections += 4 * n * m * m
        attention += 2 * n * n * m
        place, on = position, cluster_on
        if after < left:
            plan = plans.get(layer)
            if plan is None:
                kind, iters, scored = pooling, num_iters, scores
            else:
                place, on = plan.position, plan.cluster_on
                kind, iters, scored = _describe(poolings[layer])
            width = m // spec.num_heads if on == "keys" and spec.num_heads else m
            score += 2 * n * n * m if scored else 0
            clustering += _clustering(kind, left, after, width, iters)
        mlp += mlp_macs * (after + p if place == "attention" else n)
        left = after
    embedding = spec.num_patches * spec.patch_inputs * m
    return Cost(projections, attention, mlp, score, clustering, embedding, m * spec.num_classes)


def gmacs(model: nn.Module | ViTSpec, schedule=None, **options) -> float:
    """Giga multiply-accumulates of one image; arguments as :func:`cost`. DeiT-S at 224 pixels: 4.6."""
    return cost(model, schedule, **options).gmacs


def _clustering(kind: str, n: int, k: int, width: int, iters: int) -> int:
    if kind == "kmeans":
        return min(iters * n * k, n * n) * width
    if kind == "kmedoids":
        return n * n * width
    if kind == "bipartite":
        macs = 0
        while n > k:
            kept = max(k, n - n // 2)
            macs, n = macs + (n // 2) * (n - n // 2) * width, kept
        return macs
    return 0


def _describe(module: nn.Module) -> tuple[str, int, bool]:
    """(kind, iterations, whether it reads scores) of a pooling module."""
    scored = bool(getattr(module, "needs_scores", True))
    if isinstance(module, TokenPooling):
        return module.algorithm, module.num_iters, scored
    return ("bipartite" if isinstance(module, BipartiteMatching) else type(module).__name__), 0, scored


def _inputs(model, schedule, image_size):
    """(spec, {layer: count, ratio or module}, {layer: patched forward})."""
    if isinstance(model, ViTSpec):
        return model, schedules.normalise(model.depth, schedule) if schedule else {}, {}
    from .patching import patched_blocks, patches

    spec = ViTSpec.from_model(model, image_size)
    if schedule is not None:
        return spec, schedules.normalise(spec.depth, schedule) if schedule else {}, {}
    poolings = patched_blocks(model)
    return spec, poolings, {place.index: place.plan for _, place in patches(model) if place.index in poolings}


def _kept(left: int, entry) -> int:
    if isinstance(entry, nn.Module):
        kept: int = entry.tokens_kept(left)  # type: ignore[operator]
        return kept
    return schedules.kept(left, entry)


def _patch_projection(model: nn.Module) -> nn.Conv2d:
    stem = _child(model, "embeddings", "patch_embed")
    stem = _child(stem, "patch_embeddings") or stem
    projection = _child(stem, "projection", "proj")
    if _child(stem, "backbone") or not isinstance(projection, nn.Conv2d):
        raise ValueError(
            f"cost: the stem {type(stem).__name__} is not a plain patch projection; describe it with ViTSpec(...)"
        )
    return projection


def _with_stem(found) -> nn.Module:
    return next((m for m in found.owners if _child(m, "embeddings", "patch_embed")), found.owners[-1])


def _child(owner, *names: str) -> nn.Module | None:
    return next((m for m in (getattr(owner, name, None) for name in names) if isinstance(m, nn.Module)), None)


def _own_size(model: nn.Module):
    for owner, name in (
        (getattr(model, "config", None), "image_size"),
        (getattr(model, "patch_embed", None), "img_size"),
    ):
        size = getattr(owner, name, None)
        if size is not None:
            return size if isinstance(size, int) else tuple(size)
    raise ValueError(f"image_size must be given: {type(model).__name__} does not tell its own")


def _heads(model: nn.Module, family_model: nn.Module):
    """Linear classifiers on top: attributes by their usual names."""
    for owner in (model, family_model) if model is not family_model else (model,):
        for name in ("classifier", "head", "head_dist", "cls_classifier", "distillation_classifier"):
            head = getattr(owner, name, None)
            if isinstance(head, nn.Linear):
                yield head
