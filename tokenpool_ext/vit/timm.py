"""timm's ``VisionTransformer``: ViT, DeiT (distilled too), DINOv2 with and without registers, and their relatives.

LayerScale, stochastic depth, query/key norms, ``norm_pre``, register tokens and fused attention stay as they are, because
the model's own modules do the work. timm itself is never imported.
"""

from __future__ import annotations

import inspect
from typing import Optional

from torch import Tensor, nn

from .blocks import Block, Family, first_named, modules_named, unknown_block


class TimmBlock(Block):
    """``timm.models.vision_transformer.Block``."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attention = block.attn
        self.projections = {"qkv": block.attn.qkv}
        self.num_heads = block.attn.num_heads
        self.head_dim = getattr(block.attn, "head_dim", None) or block.attn.qkv.out_features // (3 * self.num_heads)
        self.scale = float(block.attn.scale)
        # before timm 0.8 one drop_path served both halves
        self.after_attention = modules_named(block, ("ls1", "drop_path1", "drop_path"))
        self.after_mlp = modules_named(block, ("ls2", "drop_path2", "drop_path"))
        parameters = inspect.signature(type(block.attn).forward).parameters
        self.mask_argument = "attn_mask" if "attn_mask" in parameters else None

    @staticmethod
    def matches(block: nn.Module) -> bool:
        attention = first_named(block, "attn")
        if attention is None or len(modules_named(block, ("norm1", "norm2", "mlp"))) != 3:
            return False
        foreign = ("rope", "relative_position_bias_table", "rel_pos", "q_bias")
        if any(getattr(attention, name, None) is not None for name in foreign):
            return False
        return first_named(attention, "qkv") is not None and hasattr(attention, "num_heads") and hasattr(attention, "scale")

    def queries_and_keys(self, record: dict) -> tuple[Tensor, Tensor]:
        q, k = record["qkv"].unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)[:2]
        for module in modules_named(self.attention, ("q_norm",)):
            q = module(q)
        for module in modules_named(self.attention, ("k_norm",)):
            k = module(k)
        return q, k


def find(module: nn.Module) -> Optional[Family]:
    """The family if ``module`` is such a model, else None."""
    blocks = first_named(module, "blocks")
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        return None
    if first_named(module, "patch_embed") is None or not callable(getattr(module, "_pos_embed", None)):
        return None
    if first_named(module, "rope") is not None:
        raise TypeError(f"patch: {type(module).__name__} uses rotary positions, which pooled tokens do not have")
    for block in blocks:
        if not TimmBlock.matches(block):
            raise unknown_block(module, block)
    prefix = getattr(module, "num_prefix_tokens", None)
    if prefix is None:  # before timm 0.8
        prefix = getattr(module, "num_tokens", 1)
    return Family(module, [TimmBlock(block) for block in blocks], int(prefix))
