"""What the patcher needs to know of one transformer block, whatever library wrote it.

A :class:`Block` view names the parts of a pre-norm block and runs its two residual halves,

    x = x + after_attention(attention(norm1(x)))        attend
    x = x + after_mlp(mlp(norm2(x)))                    feed_forward

through the block's *own* submodules, so that something can happen in between. Nothing of a library's attention is
reimplemented: queries and keys are recorded as the model's own projections produce them, by a forward hook that writes
to a dict carried by the very tensor that is being projected. That dict lives for one call, so no state is left on the
model and threads do not meet.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

RECORD = "_tokenpool_record"
SUBMODULE = "tokenpool"


def record_query(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of a query projection."""
    _record("query", args, output)


def record_key(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of a key projection."""
    _record("key", args, output)


def record_qkv(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of a fused query-key-value projection."""
    _record("qkv", args, output)


HOOKS = {"query": record_query, "key": record_key, "qkv": record_qkv}


def _record(name: str, args: tuple, output: Tensor) -> None:
    record = getattr(args[0], RECORD, None) if args else None
    if record is not None:
        record[name] = output


class Replacement:
    """A callable that stands on a module's instance in place of a method of its class, until ``unpatch``."""


def remove_own(module: nn.Module, hooks: tuple) -> None:
    """Take off one module the hooks named and every :class:`Replacement`."""
    for registered in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in registered.items() if hook in hooks]:
            del registered[key]
            if registered is module._forward_pre_hooks:
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    for name in [name for name, value in module.__dict__.items() if isinstance(value, Replacement)]:
        delattr(module, name)


class Block:
    """View of one block; a subclass says under which names the parts are found.

    Parts are looked up at every call, so a module that was replaced after patching (by an adapter, a quantised layer)
    is the one that runs.

    Args:
        block: the block itself.
        names: where its parts are: "norm1", "attention", "norm2", and the projections "query" and "key", or "qkv". Dots
            lead into submodules.
        after_attention, after_mlp: names of what is applied to the branch before the residual sum (layer scale, drop
            path, dropout).
        num_heads, head_dim, scale: attention heads, their width, the factor of the logits.
        mask_argument: the attention's parameter that takes an additive key bias, or None if it has none.
    """

    def __init__(
        self,
        block: nn.Module,
        names: dict[str, str],
        after_attention: tuple[str, ...],
        after_mlp: tuple[str, ...],
        num_heads: int,
        head_dim: int,
        scale: float,
        mask_argument: str | None,
    ) -> None:
        self.block = block
        self.names = names
        self.after_attention = after_attention
        self.after_mlp = after_mlp
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.mask_argument = mask_argument

    def part(self, name: str) -> nn.Module:
        module = self.block
        for step in self.names[name].split("."):
            module = getattr(module, step)
        return module

    @property
    def attention(self) -> nn.Module:
        return self.part("attention")

    @property
    def projections(self) -> dict[str, nn.Module]:
        return {name: self.part(name) for name in HOOKS if name in self.names}

    @property
    def width(self) -> int:
        """M, features a token. The norm tells it; a projection may be wrapped by something without ``in_features``."""
        norm = self.part("norm1")
        shape = getattr(norm, "normalized_shape", None) or getattr(getattr(norm, "weight", None), "shape", ())
        widths = [*shape, *(getattr(module, "in_features", None) for module in self.projections.values())]
        width = next((width for width in widths if width is not None), None)
        if width is None:
            raise ValueError(
                f"patch: neither {type(norm).__name__} nor the projections of {type(self.block).__name__} "
                "tell how wide a"
                " token is (normalized_shape, weight, in_features); this block is not supported"
            )
        return width

    def attend(
        self, x: Tensor, args: tuple, kwargs: dict, bias: Tensor | None = None, record: dict | None = None
    ) -> tuple[Tensor, tuple]:
        """First half: (B, N, M) -> (B, N, M), and whatever else the attention returned.

        ``record`` is filled with the outputs of the projections. ``bias`` (B, 1, 1, N) is added to the logits.
        """
        if bias is not None:
            args, kwargs = args[1:], {**kwargs, self.mask_argument: bias}
        normed = self.part("norm1")(x)
        if record is not None:
            setattr(normed, RECORD, record)
        out = self.attention(normed, *args, **kwargs)
        if record is not None:
            setattr(normed, RECORD, None)
            for name, module in self.projections.items():
                if name not in record:  # the attention projected another tensor object: project again
                    record[name] = module(normed)
        rest: tuple[Any, ...] = ()
        if isinstance(out, tuple):
            out, rest = out[0], out[1:]
        for name in self.after_attention:
            out = getattr(self.block, name)(out)
        return x + out, rest

    def feed_forward(self, x: Tensor) -> Tensor:
        """Second half: (B, N, M) -> (B, N, M)."""
        out = self.block.mlp(self.part("norm2")(x))
        for name in self.after_mlp:
            out = getattr(self.block, name)(out)
        return x + out

    def mlp_modules(self) -> tuple[nn.Module, ...]:
        return (self.block.mlp,)

    def queries_and_keys(self, record: dict) -> tuple[Tensor, Tensor]:
        """(B, H, N, d) queries and keys as they enter the attention product."""
        return self._heads(record["query"]), self._heads(record["key"])

    def given_mask(self, args: tuple, kwargs: dict) -> Any:
        """The attention mask the caller passed to the block, or None."""
        if args and args[0] is not None:
            return args[0]
        masks = (kwargs.get(name) for name in ("attention_mask", "attn_mask", "head_mask"))
        return next((mask for mask in masks if mask is not None), None)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def names_in(owner: nn.Module | None, *names: str) -> tuple[str, ...]:
    """Those of ``names`` that are submodules of ``owner``, in the order given."""
    return tuple(name for name in names if isinstance(getattr(owner, name, None), nn.Module))


def first_in(owner: nn.Module | None, *names: str) -> str | None:
    return next(iter(names_in(owner, *names)), None)


def submodule(owner: nn.Module, *names: str) -> nn.Module | None:
    """The first of ``names`` that is a submodule of ``owner``, or None."""
    name = first_in(owner, *names)
    return None if name is None else getattr(owner, name)


class Family:
    """One library's Vision Transformer.

    Attributes:
        model: the module that holds the blocks.
        blocks: a view of each block, in order.
        num_prefix_tokens: class, distillation and register tokens.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], num_prefix_tokens: int) -> None:
        self.model = model
        self.blocks = blocks
        self.num_prefix_tokens = num_prefix_tokens

    def guard(self) -> None:
        """What patching has to change on the model itself, beside its blocks."""


def unknown_block(model: nn.Module, block: nn.Module) -> TypeError:
    return TypeError(
        f"patch: {type(model).__name__} looks like a Vision Transformer, but its block "
        f"{type(block).__name__} has parts that"
        " are not known here (expected a pre-norm block with separate attention and MLP and absolute positions)"
    )


def _of_torch(hooks: OrderedDict) -> OrderedDict:
    """The hooks in which pruning, weight norms and sharding make or gather a module's weight."""
    kept = OrderedDict()
    for key, hook in hooks.items():
        if (getattr(hook, "__module__", None) or "").startswith(("torch.nn.utils.", "torch.distributed.")):
            kept[key] = hook
    return kept


def probe(view: Block, num_prefix_tokens: int) -> bool:
    """Check that the halves reproduce the class's own forward on made-up tokens; returns whether it gives a tuple.

    Runs the block once each way on one image of a few tokens, in evaluation mode, without touching the random state.
    Hooks do not run, for made-up tokens are not for them, but those by which torch itself makes a module's weight.

    Raises:
        ValueError: they differ, naming the block's class.
    """
    block = view.block
    weight = next(block.parameters())
    if weight.device.type == "meta":
        return False
    n, width = num_prefix_tokens + 3, view.width
    ramp = torch.arange(n * width, dtype=torch.float32, device=weight.device)
    x = (3 * (ramp * 0.7310585).sin()).reshape(1, n, width).to(weight.dtype)
    state = [(module, module.training, module._forward_hooks, module._forward_pre_hooks) for module in block.modules()]
    try:
        for module, *_ in state:
            module.training = False
            module._forward_hooks = _of_torch(module._forward_hooks)
            module._forward_pre_hooks = _of_torch(module._forward_pre_hooks)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            own = type(block).forward(block, x)
            ours = view.feed_forward(view.attend(x, (), {})[0])
    finally:
        for module, training, hooks, pre_hooks in state:
            module.training = training
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks
    is_tuple = isinstance(own, tuple)
    own = own[0] if is_tuple else own
    # Equal to the bit as a rule. Otherwise small against what the block adds, which layer scale can make tiny.
    same = own.shape == ours.shape and (
        torch.allclose(own, ours, rtol=0, atol=0, equal_nan=True)
        or bool((own - ours).abs().amax() <= 1e-3 * (own - x).abs().amax())
    )
    if not same:
        raise ValueError(
            f"patch: the forward of {type(block).__name__} computes something else than x + attention, x + MLP with the"
            " parts found by name; this block is not supported"
        )
    return is_tuple
