"""A block that pools: the class it gets, the state of one forward, and how inputs from outside follow the clusters.

A patched block keeps its parameters, hooks and children; its ``__class__`` becomes a subclass whose ``forward``

1. takes the short tokens out of the N that come from outside,
2. runs the block's own ``forward`` on them inside a :class:`~.tap.Tap`, with masks, rotary tables and biases of the N
   tokens cut to the tokens that are left,
3. pools what comes out, if the schedule names this block,
4. hands out N tokens again (``unpool``), so nothing outside the blocks can tell.

The state of a forward (:class:`State`) is tied to the memory of the tokens handed out, and to the running thread until
the last block is through; never to a module. A class, not an attribute, holds the new ``forward``: copies, replicas and
pickles find the module they are called on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..reduction import TokenReduction
from . import halves, recording
from .inputs import (
    as_given,
    base_class,
    batch_first,
    find_tokens,
    follow_all,
    named,
    packed_ends,
    parameter_names,
    put,
    take,
    valid_tokens,
)
from .reducing import Plan, Reducer, State, in_order
from .tap import Tap

SUBMODULE = "tokenpool"
PLACE = "_tokenpool_place"
TAG = "_tokenpool_state"


@dataclass
class Place:
    """Where a block stands in its plan."""

    plan: Plan
    index: int
    parts: halves.Parts | None = None  # for position="attention"

    def pooling(self, block: nn.Module) -> nn.Module | None:
        return block._modules.get(SUBMODULE)


class PooledBlock(nn.Module):
    """Mixed in front of a block's class by :func:`install`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place = self.__dict__.get(PLACE)
        if place is None:  # unpatched while something derived from this class
            return super().forward(*args, **kwargs)
        return run(self, place, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol):
        return _blank, (base_class(type(self)),), self.__dict__

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"{type(self).__name__}: a patched model cannot be scripted by torch.jit.script; use torch.export.export"
        )


_CLASSES: dict[type, type] = {}


def pooled_class(base: type) -> type:
    """The subclass of a block's class that pools; one a class."""
    if base not in _CLASSES:
        body: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        body |= {"_tokenpool_base": base, "_tokenpool_parameters": parameter_names(base)}
        _CLASSES[base] = type(base.__name__, (PooledBlock, base), body)
    return _CLASSES[base]


def _blank(base: type) -> nn.Module:
    cls: Any = pooled_class(base)
    return cls.__new__(cls)


def install(block: nn.Module, place: Place, pooling: nn.Module | None) -> None:
    remove(block)
    if pooling is not None:
        block.add_module(SUBMODULE, pooling)
    block.__dict__[PLACE] = place
    if not isinstance(block, PooledBlock):
        block.__class__ = pooled_class(type(block))
    _rebind(block)


def remove(block: nn.Module) -> None:
    if block.__dict__.pop(PLACE, None) is None:
        return
    block._modules.pop(SUBMODULE, None)
    if _CLASSES.get(base_class(type(block))) is type(block):  # not if something derived a class since
        block.__class__ = base_class(type(block))
    _rebind(block)


def _is_its_class_s(block: nn.Module, kept: Any) -> bool:
    """Whether a forward kept on a block is its class's, pooling or not."""
    base = base_class(type(block))
    classes = (base, _CLASSES.get(base, base), type(block))  # each may wrap its forward (transformers 5.24's layers do)
    return getattr(kept, "__self__", None) is block and kept.__func__ in [cls.forward for cls in classes]


def follows_class(block: nn.Module) -> bool:
    """Whether a call of the block ends in its class's forward, through what :func:`_rebind` can rebind."""
    kept = block.__dict__.get("_old_forward", block.__dict__.get("forward"))
    return kept is None or _is_its_class_s(block, kept)


def _rebind(block: nn.Module) -> None:
    """A forward kept on the block (by accelerate's hooks, by transformers 4.57's recording) is its new class's."""
    for name in ("_old_forward", "forward"):
        if _is_its_class_s(block, block.__dict__.get(name)):
            block.__dict__[name] = type(block).forward.__get__(block)


class _Run(threading.local):
    """The forward that is under way in this thread."""

    plan: Plan | None = None
    index = -1
    state: State | None = None


_RUN = _Run()


def run(block: nn.Module, place: Place, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of a patched block."""
    plan, index, layout = place.plan, place.index, place.plan.form.layout
    at, given = find_tokens(args, kwargs)
    pooling = block._modules.get(SUBMODULE)
    check(block, place, given, pooling)
    plain = layout == "batch first"
    x = given if plain else batch_first(given, layout)
    # torch.compile of torch 2.11 cannot guard on a plan; there the state comes with the tokens
    if not torch.compiler.is_compiling() and _RUN.plan is plan and _RUN.index >= index and not in_backward():
        forget()  # a forward begins, and the one before left out its last blocks
    state = None if index == plan.first else recall(plan, index, x)
    records = () if pooling is None else recording.active(plan)
    for record in records:
        record.enter(index, x)
    if isinstance(pooling, TokenReduction):
        free = (x if state is None else state.index).shape[1] - plan.num_protected
        pooling = pooling if pooling.tokens_kept(free) < free else None
    if state is None and pooling is None:
        return forward(*args, **kwargs)
    sides = named(block, args, kwargs, at)
    short, n, bias, left = x, x.shape[1], None, None
    back: list[tuple[Any, Any]] = []
    if state is not None:
        short, n, bias, left = shorten(x, state), state.labels.shape[1], state.bias, state.index
        if sides:
            args, kwargs, back = follow_all(sides, plan, args, kwargs, n, left)
    scored = pooling is not None and getattr(pooling, "needs_scores", True)
    noted = scored or (pooling is not None and plan.cluster_on == "keys")
    tap = Tap(short.shape[0], short.shape[1], bias, left, n, noted, layout == "packed")
    before, reducer = None, None
    if pooling is not None:
        valid = valid_tokens(sides, x.shape[0], n, left, plan.form) if sides else None
        reducer = Reducer(plan, index, pooling, tap, valid, state, n, records, scored)
        if layout == "packed" or (sides and x.shape[0] == 1 and not plan.num_protected):
            reducer.ends = packed_ends(sides if state is None else named(block, args, kwargs, at), short.shape[1])
    if reducer is not None and place.parts is not None:
        tokens, extra = halves.run(block, place.parts, tap, reducer, short, args, kwargs, at)
        out = (tokens, *extra) if place.parts.returns_tuple else tokens
    else:
        args, kwargs = put(args, kwargs, at, short if plain else as_given(short, layout))
        with tap:
            out = forward(*args, **kwargs)
        tokens = out if isinstance(out, Tensor) else out[0]
        tokens = tokens if plain else batch_first(tokens, layout)
        tokens = tokens if reducer is None else reducer(tokens)
    if reducer is not None:
        state, before = reducer.state, reducer.before
        if layout == "packed" or (plan.outside == "short" and plan.num_protected > plan.prefix):
            tokens, state = in_order(tokens, state)
    assert state is not None
    if plan.outside == "full":
        tokens = spread(tokens, state, x, before)
    tokens = tokens if plain else as_given(tokens, layout)
    remember(plan, index, tokens, state)
    if isinstance(out, Tensor):
        return tokens
    rest = [next((whole for cut, whole in back if cut is value), value) for value in out[1:]] if back else out[1:]
    return type(out)((tokens, *rest))


def shorten(x: Tensor, state: State) -> Tensor:
    """The K current tokens of what came in: themselves, or out of the N handed out before."""
    k, n = state.index.shape[1], state.labels.shape[1]
    if x.shape[1] == k and k != n:
        return x
    return take(x, state.index)


def spread(tokens: Tensor, state: State, x: Tensor, before: Tensor | None) -> Tensor:
    """(B, N, D): every original token as the one it is in; one that was dropped as it was last."""
    out = take(tokens, state.labels)
    if not state.drops:
        return out
    last = before if before is not None and before.shape[1] == out.shape[1] else x
    if last.shape != out.shape:
        last = torch.zeros_like(out)
    return torch.where(state.labels[:, :, None] < 0, last, out)


# --- the state of a forward -------------------------------------------------------------------------------------------


def remember(plan: Plan, index: int, tokens: Tensor, state: State) -> None:
    """Tie the state to the tokens handed out, and to the thread until the last block is through."""
    holder = tokens if torch.compiler.is_compiling() else tokens.untyped_storage()
    setattr(holder, TAG, (plan, state))
    if in_backward():
        return
    if index == plan.depth - 1:
        forget()
    else:
        _RUN.plan, _RUN.index, _RUN.state = plan, index, state


def forget() -> None:
    _RUN.plan, _RUN.index, _RUN.state = None, -1, None


def recall(plan: Plan, index: int, x: Tensor) -> State | None:
    """The state that came with ``x``; of this thread's forward if something between blocks made a new tensor."""
    holder = x if torch.compiler.is_compiling() else x.untyped_storage()
    tag = getattr(holder, TAG, None)
    state = tag[1] if tag is not None and tag[0] is plan else None
    if state is None and not in_backward() and _RUN.plan is plan and _RUN.index < index:
        state = _RUN.state
        if state is not None:
            setattr(holder, TAG, (plan, state))
    if state is None:
        return None
    if x.shape[0] != state.labels.shape[0] or x.shape[1] not in (state.labels.shape[1], state.index.shape[1]):
        if tag is not None:
            return None  # a part of it
        raise RuntimeError(
            f"block {index}: {tuple(x.shape)} tokens came, but the block before handed out"
            f" {state.labels.shape[1]} tokens of {state.labels.shape[0]} images; something between the blocks changes"
            " their number, which a patched model cannot follow: unpatch(model)"
        )
    return state


def in_backward() -> bool:
    """Whether gradient checkpointing runs the block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check(block: nn.Module, place: Place, x: Tensor, pooling: nn.Module | None) -> None:
    name = f"block {place.index} ({type(block).__name__})"
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        what = "torch.fx" if isinstance(x, torch.fx.Proxy) else "torch.jit.trace"
        raise RuntimeError(
            f"{name}: a patched model cannot be traced by {what}, which turns numbers of tokens into symbols; use"
            " torch.export.export, or trace before patching"
        )
    if x.is_nested:
        raise RuntimeError(
            f"{name}: got nested tokens, which cannot be pooled; make the encoder with enable_nested_tensor=False"
        )
    if pooling is None:
        return
    n, protected = x.shape[1 if place.plan.form.layout == "batch first" else 0], place.plan.num_protected
    if n <= protected:
        raise ValueError(
            f"{name}: num_prefix_tokens = {protected} tokens are never"
            f" pooled, but only {n} tokens came; patch with fewer prefix tokens"
        )
