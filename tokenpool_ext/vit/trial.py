"""What a block or model is tried with, so that the user sees nothing of it: modes, hooks, random state, precision."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import finding, inputs, pooled


@contextlib.contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, the random state kept, no hooks but those that make weights, nothing sharded."""
    state = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    kind = next((p.device.type for p in module.parameters()), "cpu")
    sharded = [m for m in module.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]  # by fully_shard
    try:
        for m in sharded:
            m.unshard()
        for m, *_ in state:
            m.training = False
            m._forward_hooks, m._forward_pre_hooks = _of_torch(m._forward_hooks), _of_torch(m._forward_pre_hooks)
        with torch.no_grad(), torch.random.fork_rng(_cuda(module)), torch.autocast(kind, enabled=False):
            yield
    finally:
        for m in sharded:
            m.reshard()
        for m, training, hooks, pre_hooks in state:
            m.training = training
            hooks.update(m._forward_hooks)  # a model may add its own in its first forward, once (transformers 5 does)
            pre_hooks.update(m._forward_pre_hooks)
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks


@contextlib.contextmanager
def wide(block: nn.Module, args: tuple, kwargs: dict) -> Iterator[tuple[tuple, dict]]:
    """Weights and inputs in double precision, whose rounding is no dependence on places; if the block takes no other,
    as they are.

    Weights that are zero before any training would hide what they multiply, and are made others.
    """
    kept = [(m, m._parameters, m._buffers) for m in block.modules()]
    memo: dict[int, Tensor] = {}  # what is one tensor stays one

    def double(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        if id(t) not in memo:
            memo[id(t)] = t.detach().double()
            if isinstance(t, nn.Parameter) and not t.any():
                memo[id(t)] = noise(*t.shape, like=memo[id(t)]) / 10
        return memo[id(t)]

    def back() -> None:
        for m, parameters, buffers in kept:
            m._parameters, m._buffers = parameters, buffers

    call = args, kwargs
    try:
        try:
            for m, parameters, buffers in kept:
                m._parameters, m._buffers = tree_map(double, parameters), tree_map(double, buffers)
            a, k = tree_map(double, call)
            apart(block, a, k)
            call = a, k
        except Exception:
            back()
        yield call
    finally:
        back()


def reseed(module: nn.Module) -> None:
    """The random state that :func:`quiet` restores begins anew; ``torch.manual_seed`` seeds other devices, too."""
    torch.default_generator.manual_seed(0)
    for device in _cuda(module):
        torch.cuda.default_generators[device.index].manual_seed(0)


def _cuda(module: nn.Module) -> list[torch.device]:
    return list({p.device for p in module.parameters() if p.device.type == "cuda"})


def _of_torch(hooks: OrderedDict) -> OrderedDict:
    """The hooks in which pruning, weight norms, sharding and offloading make or gather a module's weight; and ours."""
    kept = OrderedDict()
    for key, hook in hooks.items():
        module = getattr(hook, "__module__", None) or ""
        if module.startswith(("torch.nn.utils.", "torch.distributed.", pooled.__name__)):
            kept[key] = hook
    return kept


def noise(*shape: int, like: Tensor) -> Tensor:
    """Made-up tokens, without touching the random state."""
    ramp = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return (3 * (ramp * 0.7310585).sin() + (ramp * 0.01931).cos()).reshape(shape).to(like)


def pooled_free(block: nn.Module):
    """The block's own class's forward."""
    base = inputs.base_class(type(block))
    return lambda *args, **kwargs: base.forward(block, *args, **kwargs)


def apart(block: nn.Module, args: tuple, kwargs: dict) -> Any:
    """What the block gives, which may add to its tokens in place."""
    at, x = inputs.find_tokens(args, kwargs)
    args, kwargs = inputs.put(args, kwargs, at, x.clone())
    return pooled_free(block)(*args, **kwargs)


# --- what enters the blocks of a model --------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a trial forward once everything was seen."""


@contextlib.contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Nothing that ``Module.compile`` compiled is called."""
    compiled = [m for m in module.modules() if "_compiled_call_impl" in m.__dict__]
    kept = [m.__dict__.pop("_compiled_call_impl") for m in compiled]
    try:
        yield
    finally:
        for m, call in zip(compiled, kept):
            m.__dict__["_compiled_call_impl"] = call


def entering(
    blocks: list[nn.Module], owner: nn.Module, call: Any, hook: Any = None
) -> tuple[dict[nn.Module, Any], Exception | None]:
    """({block: (args, kwargs)}, the error) of a forward of ``owner``, which ends when the blocks were called.

    ``hook`` may change what the first of them gives.
    """
    seen: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[module] = args, kwargs
        if len(seen) == len(blocks):
            raise Stop

    with quiet(owner), eager(owner), contextlib.ExitStack() as hooks:
        reseed(owner)
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        if hook is not None:
            hooks.enter_context(blocks[0].register_forward_hook(hook))
        try:
            owner(*call[0], **call[1])
        except Stop:
            pass
        except Exception as error:
            return {}, error
    return seen, None


def as_call(example: Any) -> tuple[tuple, dict]:
    if isinstance(example, Mapping):  # what a processor of transformers returns is no dict
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}  # DataLoaders give lists


def inputs_of(owner: nn.Module) -> Iterator[tuple[tuple, dict]]:
    try:
        yield from finding.examples(owner)
    except Exception:  # a config that is not what it seems
        return


def trials(blocks: finding.BlockList, example: Any) -> Iterator[tuple[nn.Module, tuple[tuple, dict]]]:
    """(module, call): the model on the example, or each module around the blocks on inputs it seems to take.

    Not torch.compile's wrapper, which would compile for this; the module in it is one of them.
    """
    owners = [m for m in reversed(blocks.owners) if "_orig_mod" not in m._modules]
    if example is not None:
        yield from ((owner, as_call(example)) for owner in owners[:1])
        return
    for owner in owners:
        yield from ((owner, call) for call in inputs_of(owner))


def check_lists(model: nn.Module, blocks: finding.BlockList, example: Any) -> None:
    """Lists of blocks in a list are one after another, not each for an input of its own."""
    around = model.get_submodule(blocks.path)  # a Sequential runs them so
    lists = [m for m in around if isinstance(m, finding.LISTS)] if isinstance(around, nn.ModuleList) else []
    if len(lists) < 2 or blocks.blocks != [block for inner in lists for block in inner.children()]:
        return
    if not run_in_turn(blocks, lists, example):
        raise TypeError(
            f"patch: the {len(lists)} lists of {blocks.block_name} in {blocks.path} were not seen to run one after"
            f" another, each on what the one before hands out; name one with blocks='{blocks.path}.0', or give inputs"
            " of the model with example=..."
        )


def run_in_turn(blocks: finding.BlockList, lists: Sequence[nn.Module], example: Any) -> bool:
    """Whether what the last block of each list hands out is seen to enter the first of the next."""
    turns = [list(group.children()) for group in lists]
    for owner, call in trials(blocks, example):
        came = [entering_after(before[-1], after[0], owner, call, torch.nan) for before, after in pairwise(turns)]
        if all(came):
            return all(bool(after.isnan().any()) for _, after in came)
    return False


def sums_outside(blocks: finding.BlockList, example: Any) -> bool:
    """Whether the second block is seen to get what the first got where that gives zeros: ``x + block(x)``."""
    two = blocks.blocks[:2]
    for owner, call in trials(blocks, example) if len({*two}) == 2 else ():
        came = entering_after(two[0], two[1], owner, call, 0.0)
        if came:
            before, after = came
            return before.shape == after.shape and torch.allclose(before, after)
    return False


def entering_after(first: nn.Module, second: nn.Module, owner: nn.Module, call: Any, gives: float) -> tuple:
    """The tokens that enter two blocks in a forward in which the first gives nothing but ``gives``; () if not seen."""

    def filled(value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return torch.full_like(value, gives) if is_number else value

    seen, _ = entering([first, second], owner, call, lambda module, args, out: tree_map(filled, out))
    with contextlib.suppress(TypeError, KeyError):
        return tuple(inputs.find_tokens(*seen[block])[1] for block in (first, second))
    return ()


def protected_tokens(blocks: finding.BlockList, example: Any) -> tuple[int, int, tuple[int, ...], int]:
    """(prefix, suffix, others, N or 0): tokens that stand for no part of the input, as they are seen or named.

    ``others`` are places among N tokens.
    """
    prefix, suffix = finding.count_prefix(blocks)
    same = same_tokens(blocks, example)
    n, seen = len(same), sum(same)
    if not 0 < seen < n:
        return prefix, suffix, (), 0
    first, last = same.index(False), same[::-1].index(False)
    if seen < prefix + suffix:  # one of those named is made from the input
        first, last = max(first, prefix), max(last, suffix)
    others = tuple(i for i in range(first, n - last) if same[i])
    return first, last, others, n if others else 0


def same_tokens(blocks: finding.BlockList, example: Any) -> list[bool]:
    """Which tokens enter the first block the same whatever comes in; [] where it cannot be told.

    Class, register and detection tokens do, wherever they stand. Not told of texts, which begin as their words do.
    """
    block = blocks.blocks[0]
    if any(map(finding.is_text, blocks.owners[:2])) or any(p.is_meta for p in block.parameters()):
        return []
    for owner, call in trials(blocks, example):
        if finding.is_text(owner):
            continue
        tokens = []
        masked = any(map(is_mask, tree_leaves(call)))
        variants = [partial(changed, fill=fill) for fill in ((0, 1) if masked else (0,))]
        for given in (call, *(tree_map(variant, call) for variant in variants)):
            seen, _ = entering([block], owner, given)
            with contextlib.suppress(TypeError):
                tokens += [inputs.find_tokens(*seen[block])[1]] if seen else []
        alike = len(tokens) == 1 + len(variants) and all(t.shape == tokens[0].shape for t in tokens)
        if alike and tokens[0].dim() == 3:
            first, second, _ = tokens[0].shape
            batch = next((len(t) for t in tree_leaves(call) if isinstance(t, Tensor) and t.dim()), first)
            images = 1 if first != batch == second else 0
            equal = torch.stack([tokens[0] == other for other in tokens[1:]]).all(dim=0)
            same: list[bool] = equal.all(dim=2).all(dim=images).tolist()
            return same
    return []


def changed(value: Any, fill: int) -> Any:
    """Another image, sound or table of features; of a mask, one of ``fill`` alone."""
    if is_mask(value):
        return torch.full_like(value, fill)
    return value + noise(*value.shape, like=value) if isinstance(value, Tensor) and value.is_floating_point() else value


def is_mask(value: Any) -> bool:
    """Whether it hides some: booleans, or integers, of both kinds."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or not value.numel():
        return False
    return bool(value.min() == 0 and value.max() == 1)
