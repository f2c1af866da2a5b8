"""timm's ``VisionTransformer``: ViT, DeiT (distilled too), DINOv2 with and without registers, and their relatives.

LayerScale, stochastic depth, query/key norms, ``norm_pre``, register tokens and fused attention stay as they are, because
the model's own modules do the work. timm itself is never imported.
"""

from __future__ import annotations

import inspect
from typing import Optional

from torch import Tensor, nn

from .blocks import Block, Family, names_in, submodule, unknown_block


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


def find(module: nn.Module) -> Optional[Family]:
    """The family if ``module`` is such a model, else None."""
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
    return Family(module, [TimmBlock(block) for block in blocks], int(prefix))
