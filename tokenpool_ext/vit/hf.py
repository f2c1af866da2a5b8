"""Hugging Face transformers: ViT, DeiT, DINOv2 and DINOv2 with registers, of 4.x and 5.x.

The names differ between versions (``attention.attention.query`` became ``attention.q_proj``, ``encoder.layer`` became
``layers``, ``intermediate`` + ``output`` became ``mlp``), so parts are looked for, and no version is asked.
transformers itself is never imported.
"""

from __future__ import annotations

import inspect
from typing import Optional

from torch import Tensor, nn

from .blocks import Block, Family, first_named, modules_named, unknown_block


class HFBlock(Block):
    """``Dinov2Layer``, ``Dinov2WithRegistersLayer``, ``ViTLayer``, ``DeiTLayer``."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.norm1 = first_named(block, "norm1", "layernorm_before")
        self.norm2 = first_named(block, "norm2", "layernorm_after")
        self.attention = block.attention
        holder = first_named(self.attention, "attention") or self.attention
        self.projections = {
            "query": first_named(holder, "q_proj", "query"),
            "key": first_named(holder, "k_proj", "key"),
        }
        self.num_heads = holder.num_attention_heads
        self.head_dim = getattr(holder, "head_dim", None) or getattr(holder, "attention_head_size")
        self.scale = float(getattr(holder, "scaling", None) or self.head_dim**-0.5)
        self.two_part_mlp = first_named(block, "mlp") is None
        dropout = () if self.two_part_mlp else ("dropout",)  # in 4.x's ViT it sits inside `output`
        self.after_attention = modules_named(block, ("layer_scale1", *dropout, "drop_path"))
        self.after_mlp = modules_named(block, ("layer_scale2", *dropout, "drop_path"))
        parameters = inspect.signature(type(self.attention).forward).parameters
        self.mask_argument = "attention_mask" if "attention_mask" in parameters else None

    @staticmethod
    def matches(block: nn.Module) -> bool:
        attention = first_named(block, "attention")
        if attention is None or first_named(block, "relative_position_bias") is not None:
            return False
        holder = first_named(attention, "attention") or attention
        parts = (
            first_named(block, "norm1", "layernorm_before"),
            first_named(block, "norm2", "layernorm_after"),
            first_named(block, "mlp", "intermediate"),
            first_named(holder, "q_proj", "query"),
            first_named(holder, "k_proj", "key"),
        )
        whole = all(part is not None for part in parts) and hasattr(holder, "num_attention_heads")
        relative = first_named(holder, "relative_position_bias") is not None
        return whole and not relative and (hasattr(holder, "head_dim") or hasattr(holder, "attention_head_size"))

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.two_part_mlp:  # the output module adds the residual itself
            return self.block.output(self.block.intermediate(self.norm2(x)), x)
        return super().feed_forward(x)

    def mlp_modules(self) -> tuple[nn.Module, ...]:
        return modules_named(self.block, ("mlp", "intermediate", "output"))


def find(module: nn.Module) -> Optional[Family]:
    """The family if ``module`` directly holds patch embeddings and blocks of this kind, else None."""
    embeddings = first_named(module, "embeddings")
    if embeddings is None or first_named(embeddings, "patch_embeddings") is None:
        return None
    encoder = first_named(module, "encoder") or module
    blocks = first_named(encoder, "layer", "layers")
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not hasattr(embeddings, "cls_token"):
        return None
    for block in blocks:
        if not HFBlock.matches(block):
            raise unknown_block(module, block)
    prefix = 0
    for name in ("cls_token", "distillation_token", "register_tokens"):
        token = getattr(embeddings, name, None)
        prefix += 0 if token is None else token.shape[1]
    return Family(module, [HFBlock(block) for block in blocks], prefix)
