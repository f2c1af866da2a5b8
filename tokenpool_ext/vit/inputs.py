"""What comes into a block: its tokens among the arguments, and side inputs that follow the tokens that are left.

Masks, rotary tables, position biases and cumulative lengths are cut to the token each current one stands for.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import autograd, values
from ..backends import select
from .tap import take_square

NAMES = ("hidden_states", "x", "src", "input", "inputs", "hidden_state", "inputs_embeds")
FLEX = (
    "its flex attention is bound to masks made for one number of tokens, and shows no product; set another one,"
    " model.set_attn_implementation('sdpa')"
)
PACKED = "patched block: compiled, it cannot pool several packed images each by itself; give one image a call"
PLAIN = (bool, int, float, str, type(None))


class Form(NamedTuple):
    """How a block takes tokens: found by trying, see ``probing.py``."""

    layout: str = "batch first"  # or "tokens first" (N, B, D), or "packed" (N, D)
    heads: bool = True  # a table (N, d) without batch becomes (B, 1, K, d), else (B, K, d)
    square: bool = True  # biases (..., N, N) are cut outside the block, else where they meet the attention product
    folded: bool = False  # biases (X, N, N) are (B * H, N, N), else (H, N, N)
    attends: bool = True  # a tap sees its attention
    heads_first: bool = False  # its products are (H, B, N, d), or folded so
    shared: frozenset = frozenset()  # names of tables (H, N, ...) of all images, also where H are as many
    axes: Mapping = {}  # {(name, dimensions): those that may be the tokens', also where others are as long}
    products: tuple = ()  # of each attention product in turn, whether it is of the block's own tokens


def find_tokens(args: tuple, kwargs: dict) -> tuple[int | str, Any]:
    """Where among a block's arguments its tokens are."""
    if args and isinstance(args[0], (Tensor, torch.fx.Proxy)):
        return 0, args[0]
    for name in (*NAMES, *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name, kwargs[name]
    raise TypeError("patched block: got no tokens among its arguments")


def put(args: tuple, kwargs: dict, at: int | str, tokens: Tensor) -> tuple[tuple, dict]:
    return ((tokens, *args[1:]), kwargs) if at == 0 else (args, {**kwargs, at: tokens})


def alike(value: Any, parts: list) -> Any:
    """The parts as a tuple, a named tuple or a list like ``value``."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def batch_first(x: Tensor, layout: str) -> Tensor:
    return x.transpose(0, 1) if layout == "tokens first" else x[None] if layout == "packed" else x


def as_given(x: Tensor, layout: str) -> Tensor:
    return x.transpose(0, 1) if layout == "tokens first" else x[0] if layout == "packed" else x


def named(block: nn.Module, args: tuple, kwargs: dict, at: int | str) -> list[tuple[int | str, str, Any]]:
    """(place, parameter's name, value) of every argument beside the tokens that is more than a number or a word."""
    sides = []
    for i, value in (*enumerate(args), *kwargs.items()):
        if i != at and not isinstance(value, PLAIN):
            names = () if isinstance(i, str) else parameter_names(type(block))
            sides.append((i, i if isinstance(i, str) else names[i] if i < len(names) else "", value))
    return sides


def parameter_names(cls: type) -> tuple[str, ...]:
    """Of the ``forward`` of a block's own class; a class that pools keeps them (:func:`~.pooled.pooled_class`)."""
    kept = getattr(cls, "_tokenpool_parameters", None)
    return kept if kept is not None else tuple(inspect.signature(base_class(cls).forward).parameters)[1:]


def base_class(cls: type) -> Any:
    """A block's own class, of the one that pools or of one derived from that."""
    return getattr(cls, "_tokenpool_base", cls)


def packed_ends(sides: list, n: int) -> list[int]:
    """Where each of the sequences packed into one of ``n`` ends, by the cumulative lengths or the mask that came in.

    Tokens after the last that the lengths speak of are a sequence of their own.
    """
    for _, name, value in sides:
        if not isinstance(value, Tensor):
            continue
        if "cu_" in name and value.dim() == 1:
            ends = sorted({*value.tolist(), n} - {0})
            if ends[-1] > n:
                raise ValueError(f"patched block: {name} ends at {ends[-1]}, after the {n} tokens there are")
        elif "mask" in name and value.dim() == 4 and value.shape[:2] == (1, 1) and value.shape[2] == value.shape[3] > 1:
            ends = _ends_of_squares(value[0, 0])
        else:
            continue
        return ends if len(ends) > 1 else []
    return []


def _ends_of_squares(mask: Tensor) -> list[int]:
    """Of the squares along the diagonal that are all a mask (N, N) lets through; none where there is more or less."""
    if mask.is_meta or (values.recorded() and not torch.compiler.is_compiling()):
        return []
    seen = let_through(mask)
    last = (seen[1:] != seen[:-1]).any(dim=1)
    square = torch.cat([last.new_zeros(1), last]).cumsum(dim=0)
    squares = (seen == (square[:, None] == square)).all()
    if torch.compiler.is_compiling():  # which knows shapes, not values
        torch._assert_async(~(squares & last.any()), PACKED)
        return []
    return [i + 1 for i in last.nonzero()[:, 0].tolist()] + [len(mask)] if squares else []


def let_through(mask: Tensor) -> Tensor:
    """True where a boolean, additive or 0/1 mask is one of a real token."""
    return mask > -1e4 if mask.is_floating_point() else mask != 0


def _is_padding(mask: Tensor, name: str, b: int, n: int, form: Form) -> bool:
    """Does a mask of two dimensions tell real tokens (B, N)? Else who sees whom (N, N): as many images may be there."""
    if name in form.shared:
        return False
    return ("padding" in name or name == "attention_mask" or mask.shape[0] != n) and mask.shape[0] == b


def valid_tokens(sides: list, b: int, n: int, index: Tensor | None, form: Form) -> Tensor | None:
    """(B, T) True for real tokens, read off the mask of the N tokens that came in; None without padding masks."""
    for _, name, value in sides:
        if not isinstance(value, Tensor) or "mask" not in name or value.shape[-1] != n or value.dim() not in (2, 4):
            continue
        if value.dim() - 1 not in form.axes.get((name, value.dim()), range(4)):  # of another sequence
            continue
        if value.dim() == 2 and not _is_padding(value, name, b, n, form):
            continue
        real = let_through(value)
        if value.dtype == torch.bool and "padding" in name:
            real = ~real
        if value.dim() == 4:
            real = real.any(dim=2).any(dim=1)
        real = real.expand(b, n)
        return real if index is None else take(real, index)
    return None


def follow_all(sides: list, setup, args: tuple, kwargs: dict, n: int, index: Tensor):
    """The arguments, those of N tokens cut to ``index`` (B, K); and pairs of each cut and what it was cut from."""
    back: list[tuple[Any, Any]] = []
    cut_args, cut_kwargs = list(args), dict(kwargs)
    for place, name, value in sides:
        cut = follow(value, name, setup, n, index, back)  # not compared: dynamo of torch 2.11 cannot compare tuples
        if isinstance(place, int):
            cut_args[place] = cut
        else:
            cut_kwargs[place] = cut
    return tuple(cut_args), cut_kwargs, back


def follow(value: Any, name: str, setup, n: int, index: Tensor, back: list) -> Any:
    if isinstance(value, dict):
        return {key: follow(v, name, setup, n, index, back) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [follow(v, name, setup, n, index, back) for v in value]
        return value if all(a is b for a, b in zip(parts, value)) else alike(value, parts)
    if not isinstance(value, Tensor):
        if type(value).__name__ == "BlockMask":
            raise TypeError(f"patched block: {FLEX}")
        return value
    if "cu_" in name and value.dim() == 1:  # cumulative lengths of packed sequences
        cut = (index[0][:, None] < value[None, :]).sum(0).to(value.dtype)
        back.append((cut, value))
        return cut
    cut = follow_tensor(value, name, setup.form, n, index)
    p = setup.prefix
    if cut is value and p and not setup.suffix:  # a table of the patch tokens alone
        cut = follow_tensor(value, name, setup.form, n - p, index[:, p:] - p)
    if cut is not value:
        back.append((cut, value))
    return cut


def follow_tensor(value: Tensor, name: str, form: Form, n: int, index: Tensor) -> Tensor:
    b, k = index.shape
    shape = value.shape
    known = form.axes.get((name, value.dim()), range(value.dim()))
    axes = [i for i in known if i > 0 and shape[i] == n]
    # A look at the batch size would be a limit of an export.
    first = 0 in known and (not axes or form.layout != "batch first") and shape[0] == n
    if not axes and not first:
        return value
    square = value.dim() - 1 in axes and value.dim() - 2 in known and shape[-1] == shape[-2]
    if square and value.dim() == 2 and "mask" in name:
        square = not _is_padding(value, name, b, n, form)
    if square and (value.dim() >= 4 or "mask" in name or "bias" in name):
        if not form.square:
            return value
        if value.dim() == 3 and form.folded:
            return take_square(value.unflatten(0, (b, -1)), index).flatten(0, 1)
        return take_square(value, index)
    if form.layout == "tokens first" and first and shape[1:2] == (b,):
        return take(value.transpose(0, 1), index).transpose(0, 1)
    if form.layout == "packed" and first:
        return value[index[0]]
    if axes and (shape[0] == 1 or name not in form.shared and shape[0] == b):  # a batch in front, or one for all images
        axis = axes[0]
        where = index.reshape(b, *[1] * (axis - 1), k, *[1] * (value.dim() - axis - 1))
        whole = value.expand(b, *shape[1:])
        return whole.gather(axis, where.expand(*whole.shape[:axis], k, *whole.shape[axis + 1 :]))
    if 0 in known and shape[0] == n:
        cut = value[index]  # (B, K, ...)
        return cut[:, None] if form.heads and value.dim() == 2 else cut
    axis = axes[0]  # (H, N) and the like: a batch comes in front
    return value.movedim(axis, 0)[index].movedim(1, axis + 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, K) of ``x`` (B, N, ...); of floating tokens (B, N, D) zeros where it is -1."""
    if x.dim() == 3 and x.is_floating_point():
        return autograd.unpool(select("unpool", x), x, index)
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))
