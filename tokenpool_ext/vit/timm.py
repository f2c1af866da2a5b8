"""timm's ``VisionTransformer``: ViT, DeiT (distilled too), DINOv2 with and without registers, and their relatives.

LayerScale, stochastic depth, query/key norms, ``norm_pre``, register tokens and fused attention stay as they are,
because the model's own modules do the work. timm itself is never imported.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..modules import TokenReduction
from .blocks import SUBMODULE, Block, Family, Replacement, names_in, submodule, unknown_block


class TimmBlock(Block):
    """``timm.models.vision_transformer.Block``."""

    def __init__(self, block: nn.Module) -> None:
        attention = block.attn
        parameters = inspect.signature(type(attention).forward).parameters
        num_heads = attention.num_heads
        super().__init__(
            block,
            {"norm1": "norm1", "norm2": "norm2", "attention": "attn", "qkv": "attn.qkv"},
            # before timm 0.8 one drop_path served both halves
            after_attention=names_in(block, "ls1", "drop_path1", "drop_path"),
            after_mlp=names_in(block, "ls2", "drop_path2", "drop_path"),
            num_heads=num_heads,
            head_dim=getattr(attention, "head_dim", None) or attention.qkv.out_features // (3 * num_heads),
            scale=float(attention.scale),
            mask_argument="attn_mask" if "attn_mask" in parameters else None,
        )

    @staticmethod
    def matches(block: nn.Module) -> bool:
        attention = submodule(block, "attn")
        if attention is None or len(names_in(block, "norm1", "norm2", "mlp")) != 3:
            return False
        foreign = ("rope", "relative_position_bias_table", "rel_pos", "q_bias")
        if any(getattr(attention, name, None) is not None for name in foreign):
            return False
        return bool(names_in(attention, "qkv")) and hasattr(attention, "num_heads") and hasattr(attention, "scale")

    def queries_and_keys(self, record: dict) -> tuple[Tensor, Tensor]:
        q, k = record["qkv"].unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)[:2]
        attention = self.attention
        if names_in(attention, "q_norm", "k_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q, k


class FeatureMapGuard(Replacement):
    """``forward_intermediates`` or ``get_intermediate_layers`` of a patched model: lists of tokens, but no feature
    maps of
    blocks that have fewer tokens than the map has places (which reshaping would only notice where the counts do not
    divide).
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        parameters = list(inspect.signature(getattr(type(model), name)).parameters.values())[1:]
        self.names = [p.name for p in parameters]
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(getattr(type(self.model), self.name), self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**self.defaults, **dict(zip(self.names, args)), **kwargs}
        if "x" in given and given.get("reshape", given.get("output_fmt") == "NCHW"):
            self.check(given)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

    def check(self, given: dict) -> None:
        blocks = self.model.blocks
        indices = given.get("indices", given.get("n"))
        if indices is None or isinstance(indices, int):  # all, or the last so many
            last = len(blocks) - 1
        else:
            last = max((i % len(blocks) for i in indices), default=-1)
        stem = self.model.patch_embed
        size = tuple(given["x"].shape[-2:])
        grid = stem.dynamic_feat_size(size) if hasattr(stem, "dynamic_feat_size") else stem.grid_size
        n = left = grid[0] * grid[1]
        for index, block in enumerate(blocks):
            pooling = block._modules.get(SUBMODULE)
            if pooling is None or index > last:
                continue
            # of a module that cannot tell, the worst
            left = pooling.tokens_kept(left) if isinstance(pooling, TokenReduction) else 0
            if left < n:
                wanted = "reshape=False" if "reshape" in given else "output_fmt='NLC'"
                raise ValueError(
                    f"{type(self.model).__name__}.{self.name}: from block {index} on, this patched model "
                    "has fewer than the"
                    f" {grid[0]} x {grid[1]} tokens of a feature map; take {wanted} and spread the tokens "
                    "of block i with"
                    " tokenpool_ext.unpool(tokens, r.assignment_after(i)), where r comes from"
                    " `with tokenpool_ext.vit.record(model) as r`, or unpatch(model)"
                )


class TimmFamily(Family):
    def guard(self) -> None:
        for name in ("forward_intermediates", "get_intermediate_layers"):
            if callable(getattr(type(self.model), name, None)) and name not in self.model.__dict__:
                setattr(self.model, name, FeatureMapGuard(self.model, name))


def find(module: nn.Module) -> Family | None:
    """The family if ``module`` is such a model, else None."""
    inner = submodule(module, "model")
    if inner is not None and hasattr(module, "out_indices") and getattr(module, "output_fmt", "NLC") != "NLC":
        if find(inner) is not None:
            raise TypeError(
                f"patch: {type(module).__name__} (features_only=True) arranges the tokens of its "
                f"{type(inner).__name__} in"
                " feature maps, which pooled tokens no longer fill; patch the plain model and spread its tokens with"
                " tokenpool_ext.unpool(tokens, r.assignment), where r comes from `with "
                "tokenpool_ext.vit.record(model) as r`"
            )
    blocks = submodule(module, "blocks")
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        return None
    if submodule(module, "patch_embed") is None or not callable(getattr(module, "_pos_embed", None)):
        return None
    if submodule(module, "rope") is not None:
        raise TypeError(f"patch: {type(module).__name__} uses rotary positions, which pooled tokens do not have")
    for block in blocks:
        if not TimmBlock.matches(block):
            raise unknown_block(module, block)
    prefix = getattr(module, "num_prefix_tokens", None)
    if prefix is None:  # before timm 0.8
        prefix = getattr(module, "num_tokens", 1)
    return TimmFamily(module, [TimmBlock(block) for block in blocks], int(prefix))
