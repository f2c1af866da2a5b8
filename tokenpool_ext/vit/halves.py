"""``position="attention"``: the two residual halves of a pre-norm block of timm or transformers, by their parts' names.

    x = x + after_attention(attention(norm1(x)))
    x = x + after_mlp(mlp(norm2(x)))

The block's own submodules do the work, looked up at every call. A probe has shown that both halves together give what
the block's own ``forward`` gives; blocks with other parts pool after the block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

ATTENTION = (("norm1", "attn"), ("norm1", "attention"), ("layernorm_before", "attention"), ("layer_norm1", "self_attn"))
NORM2 = ("norm2", "layernorm_after", "layer_norm2")
MLP = (("mlp",), ("intermediate", "output"))


class Parts(NamedTuple):
    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: tuple[str, ...]
    after_mlp: tuple[str, ...]
    returns_tuple: bool = False


def find(block: nn.Module) -> Parts | None:
    """The names of a block's parts, or None where they are others."""
    have = {name for name, _ in block.named_children()}
    first = next((names for names in ATTENTION if set(names) <= have), None)
    second = next((name for name in NORM2 if name in have), None)
    mlp = next((names for names in MLP if set(names) <= have), None)
    if first is None or second is None or mlp is None:
        return None
    dropout = () if len(mlp) == 2 else ("dropout",)

    def present(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in have)

    after_attention = present("ls1", "layer_scale1", *dropout, "drop_path1", "drop_path")
    after_mlp = present("ls2", "layer_scale2", *dropout, "drop_path2", "drop_path")
    return Parts(*first, after_attention, second, mlp, after_mlp)


def run(block, parts: Parts, tap, middle, x: Tensor, args: tuple, kwargs: dict, at) -> tuple[Tensor, Any]:
    """Tokens (B, N, D) to (B, K, D), ``middle`` in between; and what else the attention returned."""
    rest = args[1:] if at == 0 else args
    kwargs = {name: value for name, value in kwargs.items() if name != at}
    normed = getattr(block, parts.norm1)(x)
    with tap:
        out = getattr(block, parts.attention)(normed, *rest, **kwargs)
    extra: tuple = ()
    if isinstance(out, tuple):
        out, extra = out[0], out[1:]
    for name in parts.after_attention:
        out = getattr(block, name)(out)
    x = middle(x + out)
    out = getattr(block, parts.norm2)(x)
    if len(parts.mlp) == 2:  # the output module adds the residual itself
        return getattr(block, parts.mlp[1])(getattr(block, parts.mlp[0])(out), x), extra
    out = getattr(block, parts.mlp[0])(out)
    for name in parts.after_mlp:
        out = getattr(block, name)(out)
    return x + out, extra
