"""Hugging Face transformers: ViT, DeiT, DINOv2 and DINOv2 with registers, of 4.x and 5.x.

The names differ between versions (``attention.attention.query`` became ``attention.q_proj``, ``encoder.layer`` became
``layers``, ``intermediate`` + ``output`` became ``mlp``), so parts are looked for, and no version is asked.
transformers itself is never imported.
"""

from __future__ import annotations

import inspect
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, Family, Replacement, first_in, names_in, submodule, unknown_block

NO_MASK = "tokenpool_no_mask"


class HFBlock(Block):
    """``Dinov2Layer``, ``Dinov2WithRegistersLayer``, ``ViTLayer``, ``DeiTLayer``."""

    def __init__(self, block: nn.Module) -> None:
        attention = block.attention
        inside = "attention.attention" if names_in(attention, "attention") else "attention"
        holder = submodule(attention, "attention") or attention
        names = {
            "norm1": first_in(block, "norm1", "layernorm_before"),
            "norm2": first_in(block, "norm2", "layernorm_after"),
            "attention": "attention",
            "query": f"{inside}.{first_in(holder, 'q_proj', 'query')}",
            "key": f"{inside}.{first_in(holder, 'k_proj', 'key')}",
        }
        self.two_part_mlp = not names_in(block, "mlp")
        dropout = () if self.two_part_mlp else ("dropout",)  # in 4.x's ViT it sits inside `output`
        head_dim = getattr(holder, "head_dim", None) or holder.attention_head_size
        parameters = inspect.signature(type(attention).forward).parameters
        super().__init__(
            block,
            names,
            after_attention=names_in(block, "layer_scale1", *dropout, "drop_path"),
            after_mlp=names_in(block, "layer_scale2", *dropout, "drop_path"),
            num_heads=holder.num_attention_heads,
            head_dim=head_dim,
            scale=float(getattr(holder, "scaling", None) or head_dim**-0.5),
            mask_argument="attention_mask" if "attention_mask" in parameters else None,
        )

    @staticmethod
    def matches(block: nn.Module) -> bool:
        attention = submodule(block, "attention")
        if attention is None:
            return False
        holder = submodule(attention, "attention") or attention
        parts = (
            names_in(block, "norm1", "layernorm_before"),
            names_in(block, "norm2", "layernorm_after"),
            names_in(block, "mlp", "intermediate"),
            names_in(holder, "q_proj", "query"),
            names_in(holder, "k_proj", "key"),
        )
        relative = any(names_in(owner, "relative_position_bias") for owner in (block, attention, holder))
        sized = hasattr(holder, "head_dim") or hasattr(holder, "attention_head_size")
        return all(parts) and not relative and sized and hasattr(holder, "num_attention_heads")

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.two_part_mlp:  # the output module adds the residual itself
            return self.block.output(self.block.intermediate(self.part("norm2")(x)), x)
        return super().feed_forward(x)

    def mlp_modules(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self.block, name) for name in names_in(self.block, "mlp", "intermediate", "output"))


class MaskFreeForward(Replacement):
    """The model's ``forward``, which tells its blocks when the user gave no attention mask.

    While a model is exported (under torch 2.11: compiled, too) transformers 5 makes a mask of ones for the tokens that
    came
    from the embedding. It masks nothing, but does not fit pooled tokens, and nobody can look at its values then. So
    that it
    can be told from the user's own, a keyword travels down to the blocks, where a hook drops it together with the mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.position = list(self.__signature__.parameters).index("attention_mask")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    @property
    def __code__(self) -> CodeType:  # torch.export reads it of the model it is given
        return type(self.model).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and kwargs.get("attention_mask") is None:
            if all(value is None for value in args[self.position : self.position + 1]):
                kwargs[NO_MASK] = True
        return type(self.model).forward(self.model, *args, **kwargs)


def drop_made_mask(block: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    """Forward pre-hook of every block: no mask where the user gave none."""
    if NO_MASK not in kwargs:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name not in (NO_MASK, "attention_mask")}
    return args[:1] + (None,) * len(args[1:2]) + args[2:], kwargs


class HFFamily(Family):
    def guard(self) -> None:
        parameters = inspect.signature(type(self.model).forward).parameters
        takes_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "attention_mask" not in parameters or not takes_keywords or "forward" in self.model.__dict__:
            return
        self.model.forward = MaskFreeForward(self.model)
        for view in self.blocks:
            view.block.register_forward_pre_hook(drop_made_mask, prepend=True, with_kwargs=True)


def find(module: nn.Module) -> Family | None:
    """The family if ``module`` directly holds patch embeddings and blocks of this kind, else None."""
    decoder = submodule(module, "decoder")
    if decoder is not None and any(isinstance(part, nn.PixelShuffle) for part in decoder.modules()):
        if any(find(child) is not None for child in module.children()):
            raise TypeError(
                f"patch: {type(module).__name__} arranges its tokens in an image again, which pooled tokens "
                "no longer fill;"
                " patch the plain model"
            )
    embeddings = submodule(module, "embeddings")
    if embeddings is None or submodule(embeddings, "patch_embeddings") is None:
        return None
    encoder = submodule(module, "encoder") or module
    blocks = submodule(encoder, "layer", "layers")
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not hasattr(embeddings, "cls_token"):
        return None
    if hasattr(module, "out_features"):
        raise TypeError(
            f"patch: {type(module).__name__} is a backbone that arranges its tokens in a feature map, which "
            "pooled tokens"
            " no longer fill; patch the plain model and spread its tokens with "
            "tokenpool_ext.unpool(tokens, r.assignment),"
            " where r comes from `with tokenpool_ext.vit.record(model) as r`"
        )
    for block in blocks:
        if not HFBlock.matches(block):
            raise unknown_block(module, block)
    prefix = 0
    for name in ("cls_token", "distillation_token", "register_tokens"):
        token = getattr(embeddings, name, None)
        prefix += 0 if token is None else token.shape[1]
    return HFFamily(module, [HFBlock(block) for block in blocks], prefix)
