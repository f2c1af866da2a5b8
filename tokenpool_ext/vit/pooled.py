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

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..baselines import BipartiteMatching, GridPooling
from ..modules import TokenPooling
from ..positions import grid_positions
from ..reduction import TokenReduction
from ..reference import nearest_members
from . import halves, recording
from .tap import Tap, take_square

SUBMODULE = "tokenpool"
PLACE = "_tokenpool_place"
TAG = "_tokenpool_state"
COVERING = (TokenPooling, BipartiteMatching, GridPooling)  # every token is in a cluster
NAMES = ("hidden_states", "x", "src", "input", "inputs", "hidden_state", "inputs_embeds")


class State(NamedTuple):
    """Where the tokens of one forward are. B images, N tokens before any pooling, K now."""

    labels: Tensor  # (B, N) int64: the current token each original one is in; -1 if dropped
    index: Tensor  # type: ignore[assignment]  # (B, K) int64: the original token each current one stands for, a member
    sizes: Tensor | None  # (B, K) float: how many original tokens it stands for
    drops: bool  # whether a label can be -1


@dataclass
class Plan:
    """What the blocks of one patched model share; it does not change between forwards."""

    depth: int
    first: int  # the first block that pools
    prefix: int  # protected tokens in front
    suffix: int  # protected tokens at the end
    protect: tuple[int, ...]  # other protected tokens; negative: from the end
    outside: str  # "full" or "short"
    position: str  # "block" or "attention"
    cluster_on: str
    track_size: bool
    positions: Tensor | None = None  # (n, P) of the tokens that may be pooled; None: a square grid's
    schedule: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)  # arguments of `patch`, to patch again
    form: Form = field(default=None)  # type: ignore[assignment]  # how the blocks take tokens and side inputs: the probe

    @property
    def num_protected(self) -> int:
        return self.prefix + self.suffix + len(self.protect)

    def protected(self, n: int) -> list[int]:
        inner = {i % n for i in self.protect if -n <= i < n}
        return sorted({*range(self.prefix), *range(n - self.suffix, n), *inner})


class Form(NamedTuple):
    """How a block takes tokens: found by trying, see ``probing.py``."""

    layout: str = "batch first"  # or "tokens first" (N, B, D), or "packed" (N, D)
    heads: bool = True  # a table (N, d) without batch becomes (B, 1, K, d), else (B, K, d)
    square: bool = True  # biases (..., N, N) are cut outside the block, else where they meet the attention product
    folded: bool = False  # biases (X, N, N) are (B * H, N, N), else (H, N, N)
    attends: bool = True  # a tap sees its attention


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
        body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _CLASSES[base] = type(base.__name__, (PooledBlock, base), body)
    return _CLASSES[base]


def base_class(cls: type) -> type:
    """The block's own class."""
    return next((c for c, pooled in _CLASSES.items() if pooled in cls.__mro__), cls)


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


def _rebind(block: nn.Module) -> None:
    """accelerate's hooks keep the ``forward`` they found; give them the one the block has now."""
    if "_old_forward" in block.__dict__:
        block._old_forward = type(block).forward.__get__(block)


class _Run(threading.local):
    """The forward that is under way in this thread."""

    plan: Plan | None = None
    index = -1
    state: State | None = None


_RUN = _Run()


def run(block: nn.Module, place: Place, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of a patched block."""
    plan, index = place.plan, place.index
    at, given = find_tokens(args, kwargs)
    check(block, place, given)
    x = batch_first(given, plan.form.layout)
    state = None if index == plan.first else recall(plan, index, x)
    pooling = place.pooling(block)
    if pooling is not None:
        recording.entered(plan, index, x)
        if not reduces(pooling, x.shape[1] if state is None else state.index.shape[1], plan):
            pooling = None
    if state is None and pooling is None:
        return forward(*args, **kwargs)
    short = x if state is None else shorten(x, state)
    valid = None
    if pooling is not None:
        valid = valid_tokens(block, args, kwargs, x, state)
    back: list[tuple[Any, Any]] = []
    if state is not None:
        args, kwargs, back = follow_all(block, plan, args, kwargs, at, x, state)
    scored = pooling is not None and getattr(pooling, "needs_scores", True)
    keyed = pooling is not None and plan.cluster_on == "keys"
    sizes = None if state is None else state.sizes
    with_index = None if state is None else state.index
    n = x.shape[1] if state is None else state.labels.shape[1]
    packed = plan.form.layout == "packed"
    tap = Tap(short.shape[0], short.shape[1], sizes, with_index, n, scored or keyed, packed)
    reducer = Reducer(plan, index, pooling, tap, valid, state, n)

    if pooling is not None and packed:
        reducer.ends = packed_ends(block, args, kwargs, short.shape[1])

    def inner(tokens: Tensor) -> Any:
        a, k = put(args, kwargs, at, as_given(tokens, plan.form.layout))
        with tap:
            return forward(*a, **k)

    if pooling is not None and place.parts is not None:
        tokens, extra = halves.run(block, place.parts, tap, reducer, short, args, kwargs, at)
        out = (tokens, *extra) if place.parts.returns_tuple else tokens
    else:
        out = inner(short)
        tokens = batch_first(out if isinstance(out, Tensor) else out[0], plan.form.layout)
        if pooling is not None:
            tokens = reducer(tokens)
    state = reducer.state
    if pooling is not None and packed:
        tokens, state = in_order(tokens, state)
    full = plan.outside == "full"
    if full:
        tokens = spread(tokens, state, x, reducer.before)
    elif pooling is not None and plan.num_protected > plan.prefix:
        tokens, state = in_order(tokens, state)
    tokens = as_given(tokens, plan.form.layout)
    remember(plan, index, tokens, state)
    if isinstance(out, Tensor):
        return tokens
    rest = [next((whole for cut, whole in back if cut is value), value) for value in out[1:]] if back else out[1:]
    return type(out)((tokens, *rest))


class Reducer:
    """Pools the tokens of one call of a block and brings the state up to date."""

    def __init__(self, plan, index, pooling, tap, valid, state, n) -> None:
        self.plan, self.index, self.pooling, self.tap, self.valid = plan, index, pooling, tap, valid
        self.state, self.n, self.before = state, n, None
        self.ends: list[int] = []  # where the sequences packed into one end

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, T, D) to (B, K, D)."""
        plan, state, pooling = self.plan, self.state, self.pooling
        b, t, _ = tokens.shape
        scores = self.tap.scores(self.valid) if getattr(pooling, "needs_scores", True) else None
        features = self.tap.keys() if plan.cluster_on == "keys" else None
        places = self.places(b, tokens.device) if getattr(pooling, "position_weight", 0) else None
        valid = self.valid
        order: Tensor | None = None
        sizes: Tensor | None = None
        if plan.track_size:
            sizes = (
                torch.ones(b, t, device=tokens.device, dtype=torch.float32)
                if state is None or state.sizes is None
                else state.sizes
            )
        whole: Any = tokens
        if plan.num_protected > plan.prefix:  # bring the protected ones to the front
            order = self.front(b, t, tokens.device)
            tokens = take(tokens, order)
            scores, features, places, valid, sizes = (
                None if v is None else take(v, order) for v in (scores, features, places, valid, sizes)
            )
        self.before = whole
        p = plan.num_protected
        pooled, clusters, sizes = reduce(pooling, tokens, scores, features, places, valid, sizes, p, self.ends)
        recording.add(plan, self.index, clusters)
        labels = clusters.assignment
        if plan.outside == "full" and not isinstance(pooling, COVERING):  # dropped ones show as the one most like them
            labels = torch.where(labels < 0, nearest(tokens[:, p:], pooled[:, p:]), labels)
            labels = labels if valid is None else torch.where(valid[:, p:], labels, -1)
        lead = torch.arange(p, device=labels.device).expand(b, p)
        local = torch.cat([lead, torch.where(labels < 0, -1, labels + p)], dim=1) if p else labels
        rep = representatives(clusters, local, p)
        if order is not None:
            rep = order.gather(1, rep)
            local = local.gather(1, order.argsort(dim=1))
        drops = valid is not None or (plan.outside == "short" and not isinstance(pooling, COVERING))
        if state is not None:
            rep = state.index.gather(1, rep)
            drops = drops or state.drops
            old = state.labels
            local = local.gather(1, old.clamp(min=0) if drops else old)
            local = torch.where(old < 0, -1, local) if drops else local
        self.state = State(local, rep, sizes, drops)
        return pooled

    def places(self, b: int, device: torch.device) -> Tensor:
        """(B, T, P) coordinates of the tokens left; zeros of protected ones."""
        plan, n = self.plan, self.n
        free = n - plan.num_protected
        given = grid_positions(free, device) if plan.positions is None else plan.positions.to(device)
        if len(given) != free:
            raise ValueError(f"patch: positions must be of the {free} tokens that may be pooled, got {len(given)}")
        protected = set(plan.protected(n))
        places = given.new_zeros(n, given.shape[1])
        places[[i for i in range(n) if i not in protected]] = given
        return places.expand(b, -1, -1) if self.state is None else places[self.state.index]

    def front(self, b: int, t: int, device: torch.device) -> Tensor:
        """(B, T) the order that has the protected tokens first."""
        protected = torch.zeros(self.n, dtype=torch.bool, device=device)
        protected[self.plan.protected(self.n)] = True
        if self.state is not None:
            return (~protected[self.state.index]).int().argsort(dim=1, stable=True)
        return (~protected).int().argsort(stable=True).expand(b, t)


def reduce(pooling: nn.Module, tokens, scores, features, places, valid, sizes, p: int, ends=()) -> Any:
    """(pooled tokens, clusters, sizes) of a pooling module, whichever it is; of packed sequences each by itself."""
    if len(ends) > 1:
        parts, start, k = [], 0, 0
        for end in ends:
            s, f, c, v, z = (None if t is None else t[:, start:end] for t in (scores, features, places, valid, sizes))
            out, clusters, part_sizes = reduce(pooling, tokens[:, start:end], s, f, c, v, z, p)
            labels = torch.where(clusters.assignment < 0, -1, clusters.assignment + k)
            medoids = torch.where(clusters.medoids < 0, -1, clusters.medoids + start)
            parts.append((out, labels, medoids, part_sizes))
            start, k = end, k + out.shape[1]
        out, labels, medoids = (torch.cat(x, 1) for x in list(zip(*parts))[:3])
        mass = out.new_ones(out.shape[:2])
        sizes = None if sizes is None else torch.cat([x for *_, x in parts], 1)
        return out, functional.Clusters(out, labels, mass, medoids, mass.sum(1)), sizes
    if isinstance(pooling, TokenReduction):
        more = {} if places is None else {"positions": places}
        out = pooling(tokens, scores, features=features, mask=valid, sizes=sizes, **more)
        clusters = out[1]
        if clusters.medoids is None:  # of a reduction that is not ours
            medoids = nearest_members(tokens[:, p:], out[0][:, p:], clusters.assignment)
            clusters = clusters._replace(medoids=medoids)
        return out[0], clusters, None if sizes is None else out[2]
    pooled = pooling(tokens, scores, features=features, mask=valid, sizes=sizes)
    new_sizes = None
    if isinstance(pooled, tuple):
        pooled, new_sizes = pooled[0], pooled[-1]
    labels = nearest(tokens[:, p:], pooled[:, p:])  # it tells no clusters
    medoids = nearest_members(tokens[:, p:], pooled[:, p:], labels)
    unknown: Any = None
    return pooled, functional.Clusters(pooled[:, p:], labels, unknown, medoids, unknown), new_sizes


def nearest(tokens: Tensor, centers: Tensor) -> Tensor:
    """(B, N) the center (B, K, D) nearest to each token (B, N, D)."""
    tokens, centers = tokens.detach().float(), centers.detach().float()
    return (centers.square().sum(dim=2)[:, None, :] - 2 * tokens @ centers.transpose(1, 2)).argmin(dim=2)


def representatives(clusters: functional.Clusters, local: Tensor, p: int) -> Tensor:
    """(B, K) of each pooled token the member nearest to it; for an empty cluster a token that is in none."""
    medoids = clusters.medoids
    outsider = (local < 0).int().argmax(dim=1, keepdim=True)
    lead = torch.arange(p, device=medoids.device).expand(len(medoids), p)
    return torch.cat([lead, torch.where(medoids < 0, outsider, medoids + p)], dim=1)


def reduces(pooling: nn.Module, t: int, plan: Plan) -> bool:
    """Whether fewer tokens than ``t`` would be left."""
    if not isinstance(pooling, TokenReduction):
        return True
    return pooling.tokens_kept(t - plan.num_protected) < t - plan.num_protected


def shorten(x: Tensor, state: State) -> Tensor:
    """The K current tokens of what came in: themselves, or out of the N handed out before."""
    k, n = state.index.shape[1], state.labels.shape[1]
    if x.shape[1] == k and k != n:
        return x
    return take(x, state.index)


def spread(tokens: Tensor, state: State, x: Tensor, before: Tensor | None) -> Tensor:
    """(B, N, D): every original token as the one it is in; one that was dropped as it was last."""
    out = functional.unpool(tokens, state.labels)
    if not state.drops:
        return out
    last = before if before is not None and before.shape[1] == out.shape[1] else x
    if last.shape != out.shape:
        return out
    return torch.where(state.labels[:, :, None] < 0, last, out)


def in_order(tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """The tokens by what they stand for, so that a suffix is at the end again."""
    order = state.index.argsort(dim=1)
    place = order.argsort(dim=1)
    labels = torch.where(state.labels < 0, -1, place.gather(1, state.labels.clamp(min=0)))
    sizes = None if state.sizes is None else take(state.sizes, order)
    return take(tokens, order), State(labels, take(state.index, order), sizes, state.drops)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, N, ...)."""
    if x.dim() == 2:
        return x.gather(1, index)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


# --- the state of a forward -------------------------------------------------------------------------------------------


def remember(plan: Plan, index: int, tokens: Tensor, state: State) -> None:
    """Tie the state to the tokens handed out, and to the thread until the last block is through."""
    holder = tokens if torch.compiler.is_compiling() else tokens.untyped_storage()
    setattr(holder, TAG, (plan, state))
    if in_backward():
        return
    last = index == plan.depth - 1
    _RUN.plan, _RUN.index, _RUN.state = (None, -1, None) if last else (plan, index, state)


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


# --- what comes in ----------------------------------------------------------------------------------------------------


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


def batch_first(x: Tensor, layout: str) -> Tensor:
    return x.transpose(0, 1) if layout == "tokens first" else x[None] if layout == "packed" else x


def as_given(x: Tensor, layout: str) -> Tensor:
    return x.transpose(0, 1) if layout == "tokens first" else x[0] if layout == "packed" else x


def check(block: nn.Module, place: Place, x: Tensor) -> None:
    name, plan = f"block {place.index} ({type(block).__name__})", place.plan
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
    n = x.shape[1 if plan.form.layout == "batch first" else 0]
    if n <= plan.num_protected and place.pooling(block) is not None:
        raise ValueError(
            f"{name}: num_prefix_tokens = {plan.num_protected} tokens are never"
            f" pooled, but only {n} tokens came; patch with fewer prefix tokens"
        )


def named(block: nn.Module, args: tuple, kwargs: dict) -> list[tuple[int | str, str, Any]]:
    """(place, parameter's name, value) of every argument."""
    names = parameter_names(base_class(type(block)))
    listed = [(i, names[i] if i < len(names) else "", value) for i, value in enumerate(args)]
    return listed + [(name, name, value) for name, value in kwargs.items()]


_PARAMETERS: dict[type, tuple[str, ...]] = {}


def parameter_names(cls: Any) -> tuple[str, ...]:
    if cls not in _PARAMETERS:
        _PARAMETERS[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _PARAMETERS[cls]


def packed_ends(block: nn.Module, args: tuple, kwargs: dict, length: int) -> list[int]:
    """Where each of the sequences packed into one ends, as the cumulative lengths that came in say."""
    for _, name, value in named(block, args, kwargs):
        if "cu_" in name and isinstance(value, Tensor) and value.dim() == 1:
            ends = sorted(set(value.tolist()) - {0})
            return ends if len(ends) > 1 else []
    return []


def valid_tokens(block: nn.Module, args: tuple, kwargs: dict, x: Tensor, state: State | None) -> Tensor | None:
    """(B, T) True for real tokens, read off the mask that came in; None without padding masks."""
    b, n = x.shape[:2]
    n = n if state is None else state.labels.shape[1]
    for _, name, value in named(block, args, kwargs):
        if not isinstance(value, Tensor) or "mask" not in name or value.shape[-1] != n or value.dim() not in (2, 4):
            continue
        if value.dim() == 2 and value.shape[0] != b:
            continue
        if value.dtype == torch.bool:
            real = ~value if "padding" in name else value
        elif value.is_floating_point():
            real = value > -1e4
        else:
            real = value != 0
        if value.dim() == 4:
            real = real.any(dim=2).any(dim=1)
        real = real.expand(b, n)
        return real if state is None else take(real, state.index)
    return None


def follow_all(block, plan: Plan, args: tuple, kwargs: dict, at, x: Tensor, state: State):
    """The arguments beside the tokens, cut to the tokens left; and pairs of each cut and what it was cut from."""
    back: list[tuple[Any, Any]] = []
    n, cut_args, cut_kwargs = state.labels.shape[1], list(args), dict(kwargs)
    for place, name, value in named(block, args, kwargs):
        if place == at or value is None or isinstance(value, (bool, int, float, str)):
            continue
        cut = follow(value, name, plan, n, state.index, back)
        if cut is not value:
            if isinstance(place, int):
                cut_args[place] = cut
            else:
                cut_kwargs[place] = cut
    return tuple(cut_args), cut_kwargs, back


def follow(value: Any, name: str, plan: Plan, n: int, index: Tensor, back: list) -> Any:
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        parts = [follow(v, name, plan, n, index, back) for v in value]
        return value if all(a is b for a, b in zip(parts, value)) else type(value)(parts)
    if not isinstance(value, Tensor):
        return value
    if "cu_" in name and value.dim() == 1:  # cumulative lengths of packed sequences
        cut = (index[0][:, None] < value[None, :]).sum(0).to(value.dtype)
        back.append((cut, value))
        return cut
    cut = follow_tensor(value, name, plan.form, n, index)
    p = plan.prefix
    if cut is value and p and not plan.suffix:  # a table of the patch tokens alone
        cut = follow_tensor(value, name, plan.form, n - p, index[:, p:] - p)
    if cut is not value:
        back.append((cut, value))
    return cut


def follow_tensor(value: Tensor, name: str, form: Form, n: int, index: Tensor) -> Tensor:
    b, k = index.shape
    shape = value.shape
    if n not in shape:
        return value
    square = value.dim() >= 2 and shape[-1] == shape[-2] == n
    if square and (value.dim() >= 4 or "mask" in name or "bias" in name):
        if not form.square:
            return value
        if value.dim() == 3 and form.folded:
            return take_square(value.unflatten(0, (b, -1)), index).flatten(0, 1)
        return take_square(value, index)
    if form.layout == "tokens first" and value.dim() >= 2 and shape[:2] == (n, b):
        return take(value.transpose(0, 1), index).transpose(0, 1)
    if form.layout == "packed" and shape[0] == n:
        return value[index[0]]
    if value.dim() >= 2 and shape[0] in (b, 1) and n in shape[1:]:  # a batch in front, or one for all images
        axis = 1 + list(shape[1:]).index(n)
        where = index.reshape(b, *[1] * (axis - 1), k, *[1] * (value.dim() - axis - 1))
        whole = value.expand(b, *shape[1:])
        return whole.gather(axis, where.expand(*whole.shape[:axis], k, *whole.shape[axis + 1 :]))
    if shape[0] == n:
        cut = value[index]  # (B, K, ...)
        return cut[:, None] if form.heads and value.dim() == 2 else cut
    axis = list(shape).index(n)  # (H, N) and the like: a batch comes in front
    return value.movedim(axis, 0)[index].movedim(1, axis + 1)
