"""The work of ``patch`` and ``unpatch``: find the blocks, prove them, give the touched ones a pooling class."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..baselines import BipartiteMatching, GridPooling, ImportanceSampling, RandomSelection, ScorePruning
from ..checks import check_bool, check_choice, check_int, check_positions, check_ratio
from ..modules import TokenPooling
from ..reduction import TokenReduction
from . import finding, pooled, probing
from . import schedule as schedules
from .pooled import PLACE, SUBMODULE, Place, PooledBlock
from .reducing import Plan

POOLINGS: dict[str, Callable[..., nn.Module]] = {
    "kmeans": partial(TokenPooling, algorithm="kmeans"),
    "kmedoids": partial(TokenPooling, algorithm="kmedoids"),
    "score": ScorePruning,
    "importance": ImportanceSampling,
    "random": RandomSelection,
    "grid": GridPooling,
    "bipartite": BipartiteMatching,
}
RESERVED = ("num_tokens", "keep_ratio", "num_prefix_tokens", "return_clusters", "algorithm")
DEFAULT_RATIO = 0.7


def apply_patch(
    model: nn.Module, *, schedule: dict[str, Any], budget: float | None = None, **arguments: Any
) -> nn.Module:
    """See ``tokenpool_ext.patch``. Everything is checked before anything is changed."""
    if budget is not None:
        schedule = {**schedule, "keep_ratio": ratio_for(model, budget, schedule, arguments)}
    found, plan, parts, modules = prepare(model, schedule=schedule, **arguments)
    remove_patch(model)
    for i, part in parts.items():
        pooled.install(found.blocks[i], Place(plan, i, part), modules.get(i))
    for owner in found.owners:
        if "_orig_mod" not in owner._modules:  # not torch.compile's wrapper
            pooled.surround(owner, plan)
    return model


def ratio_for(model: nn.Module, budget: float, schedule: dict[str, Any], arguments: dict[str, Any]) -> float:
    """The largest ratio kept, in steps of 1/128, at which a forward takes at most ``budget`` of the unpooled MACs."""
    from ..cost import cost

    check_budget(budget, schedule)
    found, *_ = prepare(model, schedule=schedule, **arguments)
    remove_patch(model)
    args, kwargs = probing.inputs_for(found, arguments["example"])
    whole = cost(model, *args, **kwargs).total

    def share(steps: int) -> float:
        apply_patch(model, schedule={**schedule, "keep_ratio": steps / 128}, **arguments)
        try:
            return cost(model, *args, **kwargs).total / whole
        finally:
            remove_patch(model)

    low, high = 1, 128
    if share(low) > budget:
        raise ValueError(
            f"patch: budget must be at least {share(low):.3f} for this model where these blocks pool, got {budget:g};"
            " pool in earlier blocks with layers=..."
        )
    while low < high:
        middle = (low + high + 1) // 2
        if share(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low / 128


def check_budget(budget: float, schedule: dict[str, Any]) -> None:
    check_ratio("patch", "budget", budget)
    given = [f"{name}={schedule[name]!r}" for name in ("num_tokens", "keep_ratio", "r") if schedule[name] is not None]
    if given:
        raise ValueError(
            f"patch: give exactly one of num_tokens, keep_ratio, r and budget, got {given[0]} and {budget=}"
        )


class Support(NamedTuple):
    """Whether ``patch`` takes a model, and what it found: false in a condition where it does not."""

    ok: bool
    reason: str
    num_prefix_tokens: int | None = None

    def __bool__(self) -> bool:
        return self.ok


def support_of(model: nn.Module | None, arguments: dict[str, Any]) -> Support | list[str]:
    """See ``tokenpool_ext.supported``."""
    if model is None:
        listed = (Path(__file__).parent / "supported.txt").read_text().splitlines()
        return [line for line in listed if line and not line.startswith("#")]
    budget = arguments.pop("budget")
    try:
        if budget is not None:
            check_budget(budget, arguments["schedule"])
        found, plan, *_ = prepare(model, **arguments)
    except (TypeError, ValueError) as error:
        return Support(False, str(error))
    scores = "scores and sizes" if plan.form.attends else "no scores: its attention product is not seen"
    return Support(True, f"{found.name}; {scores}", plan.prefix)


def prepare(
    model: nn.Module,
    *,
    blocks: Any,
    schedule: dict[str, Any],
    pooling: str | Callable[..., nn.Module],
    position: str,
    outside: str | None,
    cluster_on: str | None,
    track_size: bool | None,
    num_prefix_tokens: int | None,
    protect: Iterable[int] | int | None,
    positions: Any,
    example: Any,
    pooling_options: dict[str, Any],
) -> tuple[finding.BlockList, Plan, dict[int, Any], dict[int, nn.Module]]:
    """(blocks, plan, parts of the touched blocks, pooling modules); changes nothing.

    Raises:
        TypeError, ValueError: see ``tokenpool_ext.patch``.
    """
    found = finding.find_blocks(model, blocks)
    depth = len(found.blocks)
    counts = make_schedule(depth, **schedule)
    allowed: tuple[tuple[str, str | None, tuple[str | None, ...]], ...] = (
        ("position", position, ("block", "attention")),
        ("outside", outside, ("full", "short", None)),
        ("cluster_on", cluster_on, ("tokens", "keys", None)),
    )
    for name, value, choices in allowed:
        check_choice("patch", name, value, choices)
    if track_size is not None:
        check_bool("patch", "track_size", track_size)
    prefix, suffix = finding.count_prefix(found)
    if finding.is_mixed(found) and num_prefix_tokens is None and protect is None:
        raise ValueError(
            f"patch: {type(model).__name__} has words and patches in one sequence, which must not be pooled together;"
            " say how many tokens in front are words with num_prefix_tokens=..., or which ones with protect=..."
        )
    if num_prefix_tokens is not None:
        prefix = check_int("patch", "num_prefix_tokens", num_prefix_tokens, 0)
    plan = Plan(
        depth=depth,
        first=min(counts),
        prefix=prefix,
        suffix=suffix,
        protect=protected_indices(protect),
        outside=outside or "full",
        position=position,
        cluster_on=cluster_on or ("keys" if pooling == "bipartite" else "tokens"),
        track_size=False,
        positions=check_positions("patch", positions),
    )
    make = pooling_factory(pooling, pooling_options)
    touched = list(range(plan.first, depth))
    seen: dict[nn.Module, int] = {}
    for i in touched:
        check_untouched(found.blocks[i], i)
        if seen.setdefault(found.blocks[i], i) != i:
            raise ValueError(
                f"patch: blocks {seen[found.blocks[i]]} and {i} of {found.path or 'blocks'} are one module, which has"
                " one place in a schedule; give it once with blocks=[...]: it then pools in each of its calls"
            )
    modules = {i: make_pooling(make, value, plan, found.blocks[i]) for i, value in counts.items()}
    parts = probing.probe(found, touched, plan, example, position)
    if track_size and not plan.form.attends:
        raise ValueError(
            f"patch: track_size=True adds to the logits of an attention product, but none is seen in"
            f" {found.block_name}; use track_size=False"
        )
    plan.track_size = plan.form.attends if track_size is None else track_size
    return found, plan, parts, modules


def make_pooling(make: Callable[..., nn.Module], value: int | float, plan: Plan, block: nn.Module) -> nn.Module:
    amount = {"num_tokens": value} if isinstance(value, int) else {"keep_ratio": value}
    module = make(**amount, num_prefix_tokens=plan.num_protected)
    if not isinstance(module, nn.Module):
        raise TypeError(f"patch: pooling must make an nn.Module, got {type(module).__name__}")
    if isinstance(module, TokenReduction):
        module.return_clusters = True
    return module.train(block.training)


def remove_patch(model: nn.Module) -> nn.Module:
    """See ``tokenpool_ext.unpatch``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be an nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        pooled.remove(module)
    return model


def patches(model: nn.Module) -> list[tuple[nn.Module, Place]]:
    """The patched blocks of a model and their places, in order of depth."""
    found = {id(m): (m, m.__dict__[PLACE]) for m in model.modules() if PLACE in m.__dict__}
    return sorted(found.values(), key=lambda pair: pair[1].index)


def patched_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The pooling module of every pooling block by block index; empty when the model is not patched.

    Their ``num_tokens`` or ``keep_ratio`` may be changed between forwards:
    ``patched_blocks(model)[3].keep_ratio = 0.5``.
    """
    pools = ((place.index, place.pooling(block)) for block, place in patches(model))
    return {index: module for index, module in pools if module is not None}


def protected_indices(protect: Iterable[int] | int | None) -> tuple[int, ...]:
    if protect is None:
        return ()
    try:
        return tuple(sorted({operator.index(i) for i in ([protect] if isinstance(protect, int) else protect)}))
    except TypeError:
        raise TypeError(
            f"patch: protect must be indices of tokens that are never pooled, like range(1, 5) or [-1], got {protect!r}"
        ) from None


def make_schedule(
    depth: int, num_tokens: Any = None, keep_ratio: Any = None, r: Any = None, layers: Any = None
) -> schedules.Schedule:
    given = {"num_tokens": num_tokens, "keep_ratio": keep_ratio, "r": r}
    if sum(value is not None for value in given.values()) > 1:
        told = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise ValueError(f"patch: give exactly one of num_tokens, keep_ratio, r and budget, got {told}")
    if r is not None:
        r = check_int("patch", "r", r, 1)
        layers = range(depth) if layers is None else schedules.block_indices(layers)
        return schedules.normalise(depth, dict.fromkeys(layers, -r))
    if num_tokens is None:
        keep_ratio = DEFAULT_RATIO if keep_ratio is None else keep_ratio
        if layers is not None:
            layers = schedules.block_indices(layers)
            if not layers:
                raise ValueError("patch: layers must name at least one block, got none")
        return schedules.constant(depth, keep_ratio, layers)
    if layers is not None:
        raise ValueError("patch: layers goes with keep_ratio; with num_tokens write {block: count}")
    if hasattr(num_tokens, "items"):
        return schedules.normalise(depth, num_tokens)
    if (
        isinstance(num_tokens, Iterable)
        and getattr(num_tokens, "ndim", True)
        and not isinstance(num_tokens, (str, bytes))
    ):
        num_tokens = list(num_tokens)
        if len(num_tokens) != depth:
            raise ValueError(f"patch: num_tokens must have one count per block, {depth}, got {len(num_tokens)}")
        return schedules.explicit(num_tokens)
    raise TypeError(
        f"patch: num_tokens must be {{block: count}} or one count per block, got {num_tokens!r}; for a "
        "single block write"
        " {block: count}"
    )


def pooling_factory(pooling: Any, options: dict[str, Any]) -> Callable[..., nn.Module]:
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


def check_untouched(block: nn.Module, index: int) -> None:
    name = type(block).__name__
    if not pooled.follows_class(block):
        raise ValueError(
            f"patch: block {index} ({name}) already has a forward put there by something else; undo that first"
        )
    if not isinstance(block, PooledBlock) and hasattr(block, SUBMODULE):
        raise ValueError(f"patch: block {index} ({name}) already has an attribute {SUBMODULE!r} of its own")
