"""MACs of a plain Vision Transformer from its shape alone: what a schedule would cost, before there is a model.

Models are counted by ``tokenpool_ext.cost``, which runs them; here are the formulas of a :class:`ViTSpec`. Per block
with N tokens of width M (Marin et al., arXiv 2110.03860, section 3): queries, keys, values and output projection
``4 N M^2``, attention ``2 N^2 M``, MLP ``8 N M^2`` unless said otherwise; patch embedding ``n P^2 C M``, head
``M * classes``. A block that pools between attention and MLP pays for its MLP only on the tokens left.

Pooling n patch tokens of width E (M, or the head width when keys are clustered) to K: K-Means with T iterations
``min(T K, n) n E``, K-Medoids ``n^2 E``, a round of bipartite matching ``n^2 E / 4``, others nothing. Significance
scores: ``2 N^2 M``. The choice of starts is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..cost import Cost, example_input
from ..cost import cost as counted
from . import finding
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
        """That of a model, by counting one forward of it, unpatched. ``image_size``: pixels; None: the model's own."""
        from .patching import patched_blocks, remove_patch

        if patched_blocks(model):  # a copy that shares the weights
            model = remove_patch(copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}))
        found = finding.find_blocks(model, None, "ViTSpec.from_model")
        shapes: list[Any] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shapes.append(next(v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))

        hook = found.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            parts = counted(model, *_example(model, image_size))
        finally:
            hook.remove()
        tokens, width = shapes[0][-2:]
        prefix = finding.count_prefix(found)[0]
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
    if isinstance(model, nn.Module):
        from .patching import patched_blocks

        poolings: Mapping[int, Any] = patched_blocks(model) if schedule is None else schedule
        model = ViTSpec.from_model(model, image_size)
    else:
        poolings = schedule or {}
    spec, poolings = model, _normalised(model, poolings)
    left, out = spec.num_patches, []
    for layer in range(spec.depth):
        left = _kept(left, poolings.get(layer))
        out.append(left + spec.num_prefix_tokens)
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
    "bipartite", or anything else for one that costs nothing; ``scores``: whether significance scores are computed.
    """
    if isinstance(model, nn.Module):
        if schedule is None:
            finding.find_blocks(model, None, "cost")
            return counted(model, *_example(model, image_size))
        model = ViTSpec.from_model(model, image_size)
    m, p = model.width, model.num_prefix_tokens
    width = m // model.num_heads if cluster_on == "keys" and model.num_heads else m
    left, schedule = model.num_patches, _normalised(model, schedule or {})
    projections = attention = mlp = score = clustering = 0
    for layer in range(model.depth):
        n = left + p
        after = _kept(left, schedule.get(layer))
        projections += 4 * n * m * m
        attention += 2 * n * n * m
        mlp += (model.mlp_macs or 8 * m * m) * (after + p if position == "attention" else n)
        if after < left:
            score += 2 * n * n * m if scores else 0
            clustering += _clustering(pooling, left, after, width, num_iters)
        left = after
    return Cost(
        embedding=model.num_patches * model.patch_inputs * m,
        projections=projections,
        attention=attention,
        mlp=mlp,
        scores=score,
        clustering=clustering,
        head=m * model.num_classes,
    )


def gmacs(model: nn.Module | ViTSpec, schedule: Mapping[int, int | float] | None = None, **options: Any) -> float:
    """Giga multiply-accumulates of one image; arguments as :func:`cost`. DeiT-S at 224 pixels: 4.6."""
    return cost(model, schedule, **options).gmacs


def _clustering(kind: str, n: int, k: int, width: int, iters: int) -> int:
    if kind == "kmeans":
        return min(iters * k, n) * n * width
    if kind == "kmedoids":
        return n * n * width
    macs = 0
    while kind == "bipartite" and n > k:
        macs, n = macs + (n // 2) * (n - n // 2) * width, max(k, n - n // 2)
    return macs


def _normalised(spec: ViTSpec, schedule: Mapping[int, Any]) -> Mapping[int, Any]:
    """Of a patched model: its pooling layers, by block, as they are."""
    layers = any(isinstance(entry, nn.Module) for entry in schedule.values())
    return schedule if layers or not schedule else schedules.normalise(spec.depth, schedule)


def _kept(left: int, entry: Any) -> int:
    return int(entry.tokens_kept(left)) if hasattr(entry, "tokens_kept") else schedules.kept(left, entry)


def _example(model: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[Tensor, ...]:
    return () if image_size is None else tuple(example_input(model, image_size).values())
