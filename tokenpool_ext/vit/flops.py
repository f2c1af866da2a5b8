"""What a schedule would cost, before there is a model: MACs of a plain Vision Transformer from its shape alone.

Models are counted by ``tokenpool_ext.cost``, which runs them; here are the formulas of a :class:`ViTSpec` (Marin et
al., arXiv 2110.03860, section 3), a line each in :func:`cost`. A block that pools between attention and MLP pays for
its MLP only on the tokens left. The choice of starts is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..cost import Cost, example_input
from ..cost import cost as counted
from . import finding, probing
from . import schedule as schedules
from .inputs import find_tokens
from .patching import patched_blocks, patches, remove_patch

__all__ = ["Cost", "ViTSpec", "cost", "gmacs", "tokens_per_layer"]


@dataclass(frozen=True)
class ViTSpec:
    """The shape of a plain Vision Transformer.

    ``num_prefix_tokens``: those that are never pooled. ``mlp_macs``: the MLP's cost per token (0: the usual 8 M^2).
    """

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
        """That of a model, by counting one forward of it, unpatched. ``image_size``: pixels; None: the model's own."""
        places = patches(model)
        if places:  # a copy that shares the weights
            model = remove_patch(copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}))
        found = finding.find_blocks(model, None, "ViTSpec.from_model")
        example = _example(model, image_size)
        parts = counted(model, *example)
        tokens, width = find_tokens(*probing.captured(found, [0], example)[0])[1].shape[-2:]
        prefix = places[0][1].plan.num_protected if places else sum(finding.count_prefix(found))
        names = ("num_heads", "num_attention_heads")
        heads = (getattr(m, name) for m in found.blocks[0].modules() for name in names if hasattr(m, name))
        return cls(
            depth=len(found.blocks),
            width=width,
            num_patches=tokens - prefix,
            num_prefix_tokens=prefix,
            num_heads=next(heads, 0),
            patch_inputs=parts.embedding // ((tokens - prefix) * width),
            mlp_macs=parts.mlp // (tokens * len(found.blocks)),
            num_classes=parts.head // width,
        )


def tokens_per_layer(
    model: nn.Module | ViTSpec,
    schedule: Mapping[int, int | float] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
) -> list[int]:
    """Tokens that leave each block, prefix tokens included.

    Args:
        model: a supported model, patched or not, or a :class:`ViTSpec`.
        schedule: ``{block: count or ratio}``; None: that of the patched model, or none.
        image_size: pixels, when not the model's own.
    """
    layers: dict[int, Any] = {}
    if isinstance(model, nn.Module):
        layers = patched_blocks(model) if schedule is None else {}
        model = ViTSpec.from_model(model, image_size)
    schedule = schedules.normalise(model.depth, schedule) if schedule else {}
    left, out = model.num_patches, []
    for i in range(model.depth):
        left = layers[i].tokens_kept(left) if i in layers else schedules.kept(left, schedule.get(i))
        out.append(left + model.num_prefix_tokens)
    return out


def cost(
    model: nn.Module | ViTSpec,
    schedule: Mapping[int, int | float] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    pooling: str = "kmeans",
    position: str = "attention",
    num_iters: int = 5,
    scores: bool = True,
    cluster_on: str = "tokens",
) -> Cost:
    """Multiply-accumulates of one image.

    A model, patched or not, is counted as it is (``tokenpool_ext.cost``) when no ``schedule`` is given. With one, and
    for a :class:`ViTSpec`, it is "what if", by the formulas above: name the ``pooling``: "kmeans", "kmedoids",
    "bipartite", or anything else for one that costs nothing; ``scores``: whether significance scores are computed. They
    are a plain Vision Transformer's: of a model with other blocks, patch a copy and count that.
    """
    if isinstance(model, nn.Module):
        if schedule is None:
            finding.find_blocks(model, None, "cost")
            return counted(model, *_example(model, image_size))
        model = ViTSpec.from_model(model, image_size)
    m, p, out = model.width, model.num_prefix_tokens, tokens_per_layer(model, schedule)
    into = [model.num_patches + p, *out[:-1]]
    pooled = [(n, k) for n, k in zip(into, out) if k < n]
    features = m // model.num_heads if cluster_on == "keys" and model.num_heads else m
    return Cost(
        embedding=model.num_patches * model.patch_inputs * m,
        projections=4 * m * m * sum(into),  # queries, keys, values and output
        attention=2 * m * sum(n * n for n in into),
        mlp=(model.mlp_macs or 8 * m * m) * sum(out if position == "attention" else into),
        scores=2 * m * sum(n * n for n, _ in pooled) if scores else 0,
        clustering=features * sum(_products(pooling, n - p, k - p, num_iters) for n, k in pooled),
        head=m * model.num_classes,
    )


def gmacs(model: nn.Module | ViTSpec, schedule: Mapping[int, int | float] | None = None, **options: Any) -> float:
    """Giga multiply-accumulates of one image; arguments as :func:`cost`. DeiT-S at 224 pixels: 4.6."""
    return cost(model, schedule, **options).gmacs


def _products(kind: str, n: int, k: int, iters: int) -> int:
    """Inner products that pooling n patch tokens to k takes."""
    if kind == "bipartite":  # rounds that halve at most
        half = n // 2
        return 0 if n <= k else half * (n - half) + _products(kind, max(k, n - half), k, iters)
    return {"kmeans": min(iters * k, n) * n, "kmedoids": n * n}.get(kind, 0)


def _example(model: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[Tensor, ...]:
    return tuple(example_input(model, image_size).values())
