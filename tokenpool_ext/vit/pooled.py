"""A block that pools: the class it gets, the state of one forward, and how inputs from outside follow the clusters.

A patched block keeps its parameters, hooks and children; its ``__class__`` becomes a subclass whose ``forward``

1. takes the short tokens out of the N that come from outside,
2. runs the block's own ``forward`` on them inside a :class:`~.tap.Tap`, with masks, rotary tables and biases of the N
   tokens cut to the tokens that are left,
3. pools what comes out, if the schedule names this block,
4. hands out N tokens again (``unpool``), so nothing outside the blocks can tell.

The state of a forward (:class:`State`) comes with the tokens handed out (:class:`Tag`), and is kept by the running
thread as long as a module around the blocks is being called (:class:`Run`): something between the blocks may make a new
tensor there. It is never tied to a module. A class, not an attribute, holds the new ``forward``: copies, replicas and
pickles find the module they are called on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reduction import TokenReduction
from . import halves, recording
from .inputs import (
    alike,
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
from .recording import graph_task
from .reducing import Reducer, Setup, State
from .tap import Tap

SUBMODULE = "tokenpool"
PLACE = "_tokenpool_place"
TAG = "_tokenpool_state"


@dataclass
class Place:
    """Where a block stands in its setup."""

    setup: Setup
    index: int
    parts: halves.Parts | None = None  # for position="attention"


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
        if issubclass(base, nn.Sequential):
            body["__iter__"] = _own_modules
        _CLASSES[base] = type(base.__name__, (PooledBlock, base), body)
    return _CLASSES[base]


def _own_modules(block: nn.Sequential) -> Iterator[nn.Module]:
    """What it runs one after another; the pooling is none of it."""
    return (module for name, module in block._modules.items() if name != SUBMODULE and module is not None)


def _blank(base: type) -> nn.Module:
    cls: Any = pooled_class(base)
    return cls.__new__(cls)


def install(block: nn.Module, place: Place, pooling: nn.Module | None) -> None:
    if pooling is not None:
        block.add_module(SUBMODULE, pooling)
    block.__dict__[PLACE] = place
    if not isinstance(block, PooledBlock):
        block.__class__ = pooled_class(type(block))
    _rebind(block)


def patch_of(model: nn.Module) -> Callable[[], None]:
    """What puts the patch of a model back after it was removed."""
    modules = [m for m in model.modules() if PLACE in m.__dict__]
    blocks = [(m, m.__dict__[PLACE], m._modules.get(SUBMODULE)) for m in modules]
    hooks = [(m, getattr(hook, "__self__", None)) for m in model.modules() for hook in m._forward_hooks.values()]
    owners = [(m, around.setup) for m, around in hooks if isinstance(around, Around)]

    def back() -> None:
        for block in blocks:
            install(*block)
        for owner in owners:
            surround(*owner)

    return back


def remove(block: nn.Module) -> None:
    for hooks in (block._forward_pre_hooks, block._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Around)]:
            del hooks[key]
            block._forward_hooks_always_called.pop(key, None)
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


class Run:
    """One call of a module around the blocks, or what one backward computes again: what its blocks did last."""

    def __init__(self, setup: Setup, task: int, begun: bool) -> None:
        self.setup, self.task, self.begun = setup, task, begun
        self.index = -1
        self.state: State | None = None
        self.sure = True

    def take(self, index: int) -> State | None:
        """The state that the block before left, if ``index`` goes on from there."""
        state = self.state if self.index < index else None
        self.sure = self.sure and not (self.begun and self.index == index)  # else two take turns in the blocks
        self.index, self.state = index, None
        return state if self.sure else None


class _Thread(threading.local):
    runs: tuple[Run, ...] = ()  # those under way in this thread, the innermost last


_THREAD = _Thread()


def under_way(setup: Setup) -> Run | None:
    """The run that a block of the setup is called in; None where a block is called by itself."""
    task = graph_task()
    for run in reversed(_THREAD.runs):
        if run.setup is setup and run.task == task:
            return run
    return None if task == -1 else _begin(Run(setup, task, False))


def _begin(run: Run) -> Run:
    _THREAD.runs = (*(r for r in _THREAD.runs if r.task in (-1, run.task)), run)
    return run


class Around:
    """The hooks of a module around the blocks: no state outlives its call, whichever way it ends."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def begin(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _begin(Run(self.setup, graph_task(), True))

    def end(self, module: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            runs = _THREAD.runs
            at = max((i for i, run in enumerate(runs) if run.setup is self.setup and run.begun), default=len(runs))
            _THREAD.runs = runs[:at]


def surround(module: nn.Module, setup: Setup) -> None:
    around = Around(setup)
    module.register_forward_pre_hook(around.begin)
    module.register_forward_hook(around.end, always_call=True)


def run(block: nn.Module, place: Place, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of a patched block."""
    setup, index, form = place.setup, place.index, place.setup.form
    layout = form.layout
    at, given = find_tokens(args, kwargs)
    pooling = block._modules.get(SUBMODULE)
    check(block, place, given, pooling)
    plain = layout == "batch first"
    x = given if plain else batch_first(given, layout)
    begun = None if torch.compiler.is_compiling() else under_way(setup)
    state = recall(setup, index, x, given, begun)
    records = () if pooling is None else recording.active(setup)
    for record in records:
        record.enter(index, x)
    if isinstance(pooling, TokenReduction):
        free = (x if state is None else state.index).shape[1] - setup.num_protected
        pooling = pooling if pooling.tokens_kept(free) < free else None
    if state is None and pooling is None:
        return forward(*args, **kwargs)
    sides = named(block, args, kwargs, at)
    short, n, bias, left = x, x.shape[1], None, None
    back: list[tuple[Any, Any]] = []
    if state is not None:
        n, bias, left = state.labels.shape[1], state.bias, state.index
        if setup.outside == "full":
            short = take(x, left)
        if sides:
            args, kwargs, back = follow_all(sides, setup, args, kwargs, n, left)
    scored = pooling is not None and form.attends and getattr(pooling, "needs_scores", True)
    noted = scored or (pooling is not None and setup.cluster_on == "keys")
    packed = layout == "packed"
    tap = Tap(short.shape[0], short.shape[1], bias, left, n, noted, packed, form.heads_first, form.products)
    reducer = None
    if pooling is not None:
        valid = valid_tokens(sides, x.shape[0], n, left, form) if sides else None
        ends: list[int] = []
        if packed or (sides and x.shape[0] == 1 and not setup.prefix):
            ends = packed_ends(sides if state is None else named(block, args, kwargs, at), short.shape[1])
        reducer = Reducer(setup, index, pooling, tap, valid, state, n, records, scored, ends)
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
    state = state if reducer is None else reducer.state
    assert state is not None
    if setup.outside == "full":
        tokens = unpooled(tokens, state, x if reducer is None or left is not None else reducer.before)
    tokens = tokens if plain else as_given(tokens, layout)
    mark(tokens, Tag(setup, state, None))
    if begun is not None:
        begun.state = state
    if isinstance(out, Tensor):
        return tokens
    rest = [next((whole for cut, whole in back if cut is value), value) for value in out[1:]] if back else out[1:]
    return alike(out, [tokens, *rest])


def unpooled(tokens: Tensor, state: State, last: Tensor) -> Tensor:
    """(B, N, D): every original token as the one it is in; one that was dropped as in ``last`` (B, N, D)."""
    out = take(tokens, state.labels)
    return torch.where(state.labels[:, :, None] < 0, last, out) if state.drops else out


# --- the state of a forward -------------------------------------------------------------------------------------------


class Tag(NamedTuple):
    """What tokens carry."""

    setup: Setup
    state: State | None
    run: Any  # the Run within which it holds; None: everywhere. Backward, which computes again, takes any

    def __reduce__(self):  # tokens that are saved or copied leave it behind
        return OrderedDict, ()


def mark(x: Tensor, tag: Tag) -> None:
    """On the tensor, which compiled blocks see, and on its memory, which views share."""
    setattr(x, TAG, tag)
    if not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x):
        setattr(x.untyped_storage(), TAG, tag)


def recall(setup: Setup, index: int, x: Tensor, given: Tensor, run: Run | None) -> State | None:
    """The state that came with ``x`` as ``given``; that of the run if something between blocks made a new tensor."""
    known = run is None or run.begun or run.index >= 0
    left = None if run is None else run.take(index)
    if index == setup.first:
        return None
    tag = getattr(given, TAG, None)
    if tag is None and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(given):
        tag = getattr(given.untyped_storage(), TAG, None)
    if isinstance(tag, Tag) and tag.setup is setup:
        if tag.run is None or run is not None and (tag.run is run or run.task != -1):
            return tag.state if tag.state is not None and _fits(x, tag.state, setup) else None  # None: a part of it
    if not known:
        raise RuntimeError(
            f"block {index}: run again in backward, it got a copy of its tokens without what is known of them; a"
            " patched model cannot be checkpointed while saved tensors are copied, say to the CPU: unpatch(model)"
        )
    if left is not None and not _fits(x, left, setup):
        handed = (left.labels if setup.outside == "full" else left.index).shape[1]
        raise RuntimeError(
            f"block {index}: {tuple(x.shape)} tokens came, but the block before handed out {handed} tokens of"
            f" {left.labels.shape[0]} images; something between the blocks changes their number, which a patched model"
            " cannot follow: unpatch(model)"
        )
    if not torch.compiler.is_compiling():
        mark(given, Tag(setup, left, run or False))
    return left


def _fits(x: Tensor, state: State, setup: Setup) -> bool:
    """Are there as many as the block before handed out?"""
    handed = state.labels if setup.outside == "full" else state.index
    return x.shape[:2] == handed.shape


def check(block: nn.Module, place: Place, x: Tensor, pooling: nn.Module | None) -> None:
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        what = "torch.fx" if isinstance(x, torch.fx.Proxy) else "torch.jit.trace"
        raise RuntimeError(
            f"{name(block, place)}: a patched model cannot be traced by {what}, which turns numbers of tokens into"
            " symbols; use torch.export.export, or trace before patching"
        )
    if x.is_nested:
        raise RuntimeError(
            f"{name(block, place)}: got nested tokens, which cannot be pooled; make the encoder with"
            " enable_nested_tensor=False"
        )
    if pooling is None:
        return
    n, protected = x.shape[1 if place.setup.form.layout == "batch first" else 0], place.setup.num_protected
    if isinstance(pooling, TokenReduction) and not (pooling.num_prefix_tokens == protected and pooling.return_clusters):
        raise ValueError(
            f"{name(block, place)}: its pooling layer must keep num_prefix_tokens={protected} and return_clusters=True,"
            f" got num_prefix_tokens={pooling.num_prefix_tokens} and return_clusters={pooling.return_clusters}; for"
            " other tokens that are never pooled patch again with num_prefix_tokens=... or protect=..."
        )
    if n <= protected:
        raise ValueError(
            f"{name(block, place)}: num_prefix_tokens = {protected} tokens are never"
            f" pooled, but only {n} tokens came; patch with fewer prefix tokens"
        )


def name(block: nn.Module, place: Place) -> str:
    return f"block {place.index} ({type(block).__name__})"
