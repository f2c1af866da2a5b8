"""The work of ``patch`` and ``unpatch``: find the blocks, check them, give the chosen instances a new ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import BipartiteMatching, GridPooling, ImportanceSampling, RandomSelection, ScorePruning
from ..checks import check_bool, check_choice, check_int
from ..functional import attention_received
from ..modules import TokenPooling, TokenReduction
from . import hf, recording, timm
from . import schedule as schedules
from .blocks import HOOKS, SUBMODULE, Block, Family, Replacement, probe, remove_own

SIZES = "_tokenpool_sizes"
POOLINGS: dict[str, Callable[..., nn.Module]] = {
    "kmeans": partial(TokenPooling, algorithm="kmeans"),
    "kmedoids": partial(TokenPooling, algorithm="kmedoids"),
    "prune": ScorePruning,
    "importance": ImportanceSampling,
    "random": RandomSelection,
    "grid": GridPooling,
    "bipartite": BipartiteMatching,
}
RESERVED = ("num_tokens", "keep_ratio", "num_prefix_tokens", "return_clusters", "algorithm")


class PooledForward(Replacement):
    """The ``forward`` of a patched block instance: its two halves with the pooling in between, or after them.

    Holds only what does not change between calls. What flows from block to block, the sizes when they are tracked, is
    an attribute of the token tensor itself.
    """

    def __init__(
        self,
        view: Block,
        index: int,
        *,
        position: str,
        cluster_on: str,
        track_size: bool,
        expects_sizes: bool,
        num_prefix_tokens: int,
        returns_tuple: bool,
    ) -> None:
        self.view = view
        self.index = index
        self.position = position
        self.cluster_on = cluster_on
        self.track_size = track_size
        self.expects_sizes = expects_sizes
        self.num_prefix_tokens = num_prefix_tokens
        self.returns_tuple = returns_tuple

    @property
    def block(self) -> nn.Module:
        return self.view.block

    @property
    def pooling(self) -> nn.Module | None:
        return self.block._modules.get(SUBMODULE)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        if self.pooling is not None:
            self.check(x)
            recording.entered(self, x)
        if not self.track_size and not self.reduces(x):
            return type(block).forward(block, x, *args, **kwargs)
        if getattr(block, "gradient_checkpointing", False) and block.training:
            # transformers 5 checkpoints inside the class's forward, which this replaces; 4.x does it in __call__.
            if type(block).__call__ is nn.Module.__call__:
                return block._gradient_checkpointing_func(partial(self.run, **kwargs), x, *args)
        return self.run(x, *args, **kwargs)

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        view = self.view
        pooling = self.pooling if self.reduces(x) else None
        sizes = self.sizes_of(x) if self.track_size else None
        if pooling is None and sizes is None:
            out = type(view.block).forward(view.block, x, *args, **kwargs)
            return self.with_sizes(out, None)
        if view.given_mask(args, kwargs) is not None:
            raise ValueError(
                f"{type(view.block).__name__}: an attention mask was given, but this block is patched to pool tokens,"
                " after which the mask fits no more; unpatch(model), or leave the mask out"
            )
        bias = None
        if sizes is not None:
            bias = sizes.log().to(x.dtype)[:, None, None, :]
        wants_scores = pooling is not None and getattr(pooling, "needs_scores", True)
        wants_keys = pooling is not None and self.cluster_on == "keys"
        record: dict | None = {} if wants_scores or wants_keys else None
        tokens, rest = view.attend(x, args, kwargs, bias, record)
        scores = features = None
        if record is not None:
            q, k = view.queries_and_keys(record)
            if wants_scores:
                scores = significance(q.detach(), k.detach(), view.scale, sizes)
            if wants_keys:
                features = k.detach().mean(dim=1)
        if self.position == "attention":
            tokens, sizes = self.pool(pooling, tokens, scores, features, sizes)
            tokens = view.feed_forward(tokens)
        else:
            tokens = view.feed_forward(tokens)
            tokens, sizes = self.pool(pooling, tokens, scores, features, sizes)
        tokens = self.with_sizes(tokens, sizes)
        return (tokens, *rest) if self.returns_tuple else tokens

    def check(self, x: Tensor) -> None:
        name = type(self.block).__name__
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"block {self.index} ({name}): a patched model cannot be traced by torch.jit.trace, which "
                "turns numbers of"
                " tokens into tensors; use torch.export.export"
            )
        if x.shape[1] <= self.num_prefix_tokens:
            raise ValueError(
                f"block {self.index} ({name}): num_prefix_tokens = {self.num_prefix_tokens} tokens in front are never"
                f" pooled, but only {x.shape[1]} tokens came; patch with fewer prefix tokens"
            )

    def reduces(self, x: Tensor) -> bool:
        """Whether this block has fewer tokens to give than it gets."""
        pooling = self.pooling
        if pooling is None:
            return False
        if not isinstance(pooling, TokenReduction):
            return True
        n = x.shape[1] - self.num_prefix_tokens
        return pooling.tokens_kept(n) < n

    def pool(self, pooling, tokens, scores, features, sizes):
        if pooling is None:
            return tokens, sizes
        records = recording.active(self)
        if records:
            pooling = partial(recording.reduce_recorded, records, self.index, pooling)
        if not self.track_size:
            return pooling(tokens, scores, features=features), None
        if sizes is None:
            sizes = torch.ones(tokens.shape[:2], device=tokens.device)
        return pooling(tokens, scores, features=features, sizes=sizes)

    def sizes_of(self, x: Tensor) -> Tensor | None:
        sizes = getattr(x, SIZES, None)
        if sizes is None and self.expects_sizes and not hasattr(x, SIZES):
            raise RuntimeError(
                f"block {self.index}: track_size=True, but the token sizes did not arrive with the tokens of the block"
                " before; something between the blocks made a new tensor (reentrant gradient checkpointing does: use"
                " use_reentrant=False), or patch with track_size=False"
            )
        return sizes

    def with_sizes(self, out, sizes):
        if self.track_size:
            setattr(out[0] if isinstance(out, tuple) else out, SIZES, sizes)
        return out


def significance(q: Tensor, k: Tensor, scale: float, sizes: Tensor | None) -> Tensor:
    """(B, N) attention received. With sizes s, that of softmax(scale q.k + log s): one more feature carries log s."""
    if sizes is None:
        # The usual scale by its default: a float attribute would become a symbol in dynamic compilation.
        return attention_received(q, k, scale=None if scale == q.shape[3] ** -0.5 else scale)
    b, h, n, _ = k.shape
    q = torch.cat([q.float() * scale, q.new_ones(q.shape[:3] + (1,), dtype=torch.float32)], dim=3)
    k = torch.cat([k.float(), sizes.float().log()[:, None, :, None].expand(b, h, n, 1)], dim=3)
    return attention_received(q, k, scale=1.0)


def apply_patch(
    model: nn.Module,
    *,
    num_tokens,
    keep_ratio,
    layers,
    pooling,
    position,
    cluster_on,
    track_size,
    num_prefix_tokens,
    pooling_options: dict,
) -> nn.Module:
    """See ``tokenpool_ext.patch``. Everything is checked before anything is changed."""
    family = find_family(model)
    blocks = family.blocks
    plan = make_schedule(len(blocks), num_tokens, keep_ratio, layers)
    check_choice("patch", "position", position, ("attention", "block"))
    if cluster_on is None:
        cluster_on = "keys" if pooling == "bipartite" else "tokens"
    check_choice("patch", "cluster_on", cluster_on, ("tokens", "keys"))
    check_bool("patch", "track_size", track_size)
    prefix = family.num_prefix_tokens
    if num_prefix_tokens is not None:
        prefix = check_int("patch", "num_prefix_tokens", num_prefix_tokens, 0)
    make = pooling_factory(pooling, pooling_options)

    first = min(plan)
    touched = [i for i in range(len(blocks)) if i in plan or (track_size and i > first)]
    prepared = []
    for i in touched:
        view = blocks[i]
        check_untouched(view, i, track_size)
        returns_tuple = probe(view, prefix)
        module = None
        if i in plan:
            value = plan[i]
            amount = {"num_tokens": value} if isinstance(value, int) else {"keep_ratio": value}
            module = make(**amount, num_prefix_tokens=prefix)
            if not isinstance(module, nn.Module):
                raise TypeError(f"patch: pooling must make an nn.Module, got {type(module).__name__}")
            module.train(view.block.training)
        forward = PooledForward(
            view,
            i,
            position=position,
            cluster_on=cluster_on,
            track_size=track_size,
            expects_sizes=i > first,
            num_prefix_tokens=prefix,
            returns_tuple=returns_tuple,
        )
        prepared.append((view, forward, module))

    remove_patch(model)
    for view, forward, module in prepared:
        if module is not None:
            view.block.add_module(SUBMODULE, module)
            if getattr(module, "needs_scores", True) or cluster_on == "keys":
                for name, projection in view.projections.items():
                    projection.register_forward_hook(HOOKS[name])
        view.block.forward = forward
    family.guard()
    return model


def remove_patch(model: nn.Module) -> nn.Module:
    """See ``tokenpool_ext.unpatch``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be an nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        if isinstance(module.__dict__.get("forward"), PooledForward):
            module._modules.pop(SUBMODULE, None)
        remove_own(module, (*HOOKS.values(), hf.drop_made_mask))
    return model


def patched_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The pooling module of every pooling block by block index; empty when the model is not patched."""
    return {forward.index: forward.pooling for forward in patches(model) if forward.pooling is not None}


def patches(model: nn.Module) -> list[PooledForward]:
    """The replaced forwards of a model, in order of depth."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return sorted((f for f in forwards if isinstance(f, PooledForward)), key=lambda f: f.index)


def find_family(model: nn.Module, caller: str = "patch") -> Family:
    """The one Vision Transformer in ``model``.

    Raises:
        TypeError: not a module, or none of a known family; the class is named.
        ValueError: more than one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    families = {}
    for module in model.modules():
        for library in (hf, timm):
            family = library.find(module)
            if family is not None:
                # torch.compile's wrapper shows its model's parts as its own: the same blocks. The model comes after it.
                families[tuple(id(view.block) for view in family.blocks)] = family
    found = list(families.values())
    if not found:
        raise TypeError(
            f"{caller}: no Vision Transformer of a known family in {type(model).__name__}; known: Hugging "
            "Face ViT, DeiT,"
            " DINOv2 (with registers), timm VisionTransformer. For other models put "
            "tokenpool_ext.TokenPooling between the"
            " blocks yourself"
        )
    if len(found) > 1:
        names = ", ".join(type(family.model).__name__ for family in found)
        raise ValueError(
            f"{caller}: model must hold one Vision Transformer, got {len(found)} ({names}); pass one of them"
        )
    return found[0]


def make_schedule(depth: int, num_tokens, keep_ratio, layers) -> schedules.Schedule:
    if (num_tokens is None) == (keep_ratio is None):
        raise ValueError(
            f"patch: give exactly one of num_tokens and keep_ratio, got num_tokens={num_tokens!r}, "
            f"keep_ratio={keep_ratio!r}"
        )
    if keep_ratio is not None:
        if layers is not None:
            layers = schedules.block_indices(layers)
            if not layers:
                raise ValueError("patch: layers must name at least one block, got none")
        return schedules.constant(depth, keep_ratio, layers)
    if layers is not None:
        raise ValueError("patch: layers goes with keep_ratio; with num_tokens write {block: count}")
    if hasattr(num_tokens, "items"):
        return schedules.normalise(depth, num_tokens)
    if isinstance(num_tokens, Iterable) and getattr(num_tokens, "ndim", 1) and not isinstance(num_tokens, (str, bytes)):
        num_tokens = list(num_tokens)
        if len(num_tokens) != depth:
            raise ValueError(f"patch: num_tokens must have one count per block, {depth}, got {len(num_tokens)}")
        return schedules.explicit(num_tokens)
    raise TypeError(
        f"patch: num_tokens must be {{block: count}} or one count per block, got {num_tokens!r}; for a "
        "single block write"
        " {block: count}"
    )


def pooling_factory(pooling, options: dict) -> Callable[..., nn.Module]:
    """``pooling`` with the user's options, which are checked against what the constructor takes."""
    if isinstance(pooling, str):
        check_choice("patch", "pooling", pooling, tuple(POOLINGS))
        make, label = POOLINGS[pooling], f"pooling={pooling!r}"
    elif callable(pooling) and not isinstance(pooling, nn.Module):
        make, label = pooling, f"pooling={getattr(pooling, '__name__', pooling)!r}"
    else:
        raise TypeError(
            f"patch: pooling must be one of {', '.join(map(repr, POOLINGS))} or a callable that makes an nn.Module, got"
            f" {type(pooling).__name__}"
        )
    accepted = accepted_options(make)
    unknown = [name for name in options if name in RESERVED or (accepted is not None and name not in accepted)]
    if unknown:
        hint = f"; {label} takes {', '.join(sorted(accepted)) or 'no options'}" if accepted is not None else ""
        raise TypeError(f"patch: unexpected keyword argument {unknown[0]!r}{hint}")
    return partial(make, **options)


def accepted_options(make: Callable[..., nn.Module]) -> set[str] | None:
    """Names a pooling's constructor takes beyond the reserved ones; None when that cannot be known."""
    target = make.func if isinstance(make, partial) else make
    owners = target.__mro__ if inspect.isclass(target) else (target,)
    names: set[str] = set()
    for owner in owners:  # follow **common up the classes
        function = owner.__dict__.get("__init__") if inspect.isclass(owner) else owner
        if function is None:
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names - set(RESERVED)
    return None


def check_untouched(view: Block, index: int, track_size: bool) -> None:
    block = view.block
    name = type(block).__name__
    forward = block.__dict__.get("forward")
    if forward is not None and not isinstance(forward, PooledForward):
        raise ValueError(
            f"patch: block {index} ({name}) already has a forward put there by something else; undo that first"
        )
    if forward is None and hasattr(block, SUBMODULE):
        raise ValueError(f"patch: block {index} ({name}) already has an attribute {SUBMODULE!r} of its own")
    if track_size and view.mask_argument is None:
        raise ValueError(
            "patch: track_size needs an attention that takes an additive mask, but "
            f"{type(view.attention).__name__} takes"
            " none; use track_size=False"
        )
