"""What a block or model is tried with, so that the user sees nothing of it: modes, hooks, random state, precision."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import inputs, pooled


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
