"""``patch``, ``supported`` and ``unpatch``: find the blocks, prove them, give the touched ones a pooling class."""

from __future__ import annotations

import bisect
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..baselines import BipartiteMatching, GridPooling, ImportanceSampling, RandomSelection, ScorePruning
from ..checks import check_bool, check_choice, check_int, check_positions
from ..modules import TokenPooling
from ..reduction import TokenReduction
from . import finding, pooled, probing, trial
from . import schedule as schedules
from .pooled import PLACE, SUBMODULE, Place, PooledBlock
from .reducing import Setup

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


def patch(
    model: nn.Module,
    *,
    num_tokens: Mapping[int, int | float] | Iterable[int] | None = None,
    keep_ratio: float | None = None,
    r: int | None = None,
    budget: float | None = None,
    layers: Iterable[int] | None = None,
    pooling: str | Callable[..., nn.Module] = "kmeans",
    position: str = "block",
    outside: str | None = None,
    cluster_on: str | None = None,
    track_size: bool | None = None,
    num_prefix_tokens: int | None = None,
    protect: Iterable[int] | None = None,
    positions: Tensor | None = None,
    blocks: str | Iterable[nn.Module] | None = None,
    example: Any = None,
    **pooling_options: Any,
) -> nn.Module:
    """Make chosen blocks of a transformer pool their tokens. Changes ``model`` in place and returns it.

    Any model with a list of transformer blocks will do that take a sequence of tokens and do not depend on its order
    otherwise than through what they are given (masks, rotary tables, position biases): those follow the tokens. Every
    kind of block is proven by permuting its tokens; one that is windowed, causal or bound to a grid is refused by name.

    The blocks from the first pooling one on get a subclass of their class, and those that pool a parameter-free
    submodule ``tokenpool`` (visible in ``print(model)``; it adds nothing to ``state_dict``). The modules around the
    blocks get two hooks that end what a forward knows when it ends. Nothing is kept on the model between forwards, and
    patching again replaces the earlier patch. The user's hooks stay and do not run while patching.
    Outside its blocks the model sees as many tokens as ever, each being the cluster it is in. Something between the
    blocks may make new tensors of them; a block that is called by itself, outside the model's forward, takes a tensor
    that no block handed out as it is, unpooled.

    A patched model compiles and exports (``torch.compile``, ``torch.export``); ``torch.jit`` and ``torch.fx`` are
    refused. Compile after patching: a compiled model is patched too, but compiles anew.

    Args:
        model: a model of timm, transformers, torchvision, open_clip, ``torch.nn.TransformerEncoder``, or your own.
        num_tokens: how many tokens (prefix tokens not counted, they pass through) are left after each pooling block.
            Either ``{block index: count}``, a count being an int, a negative one that removes as many (at most half),
            or a float in (0, 1] that is a ratio of the tokens entering the pooling; negative indices count from the
            end. Or one int per block (a list, an array), the paper's ``K = [K_1 .. K_L]``. See
            ``tokenpool_ext.vit.schedule`` for helpers.
        keep_ratio: instead of ``num_tokens``: the ratio kept at each pooling block (nearest count, halves down, at
            least 1), of each text's or image's own tokens where there is padding. Without any schedule: 0.7.
        r: instead: tokens removed by each block (ToMe's word), at most half of them.
        budget: instead: share of the unpooled model's multiply-accumulates, in (0, 1]; the largest ratio that stays
            within is found by counting (``tokenpool_ext.cost``) on ``example`` or made-up inputs, in about seven
            forwards.
        layers: the block indices (from 0, or negative) that pool; not beside ``num_tokens``, which names them. Default
            with ``r``: all; else the blocks at 1/4, 1/2 and 3/4 of the depth, so 3, 6 and 9 of 12 (the schedule of
            "Which Tokens to Use?", arXiv 2308.04657).
        pooling: ``"kmeans"`` (default), ``"kmedoids"``, or a baseline: ``"score"`` (PoWER-BERT), ``"importance"``,
            ``"random"``, ``"grid"``, ``"bipartite"`` (ToMe); or a callable
            ``f(num_tokens=..., keep_ratio=..., num_prefix_tokens=..., **pooling_options) -> nn.Module`` whose module
            has ``TokenPooling``'s ``forward``. It is told to be given no scores by an attribute
            ``needs_scores = False``.
        position: ``"block"`` pools after the whole block (Token Pooling, Fig. 1a), which every block can;
            ``"attention"`` between attention and MLP (PoWER-BERT's and ToMe's place: the MLP of the same block already
            gets cheaper), which pre-norm blocks of timm and transformers can.
        outside: ``"full"`` (default): every block hands out as many tokens as the model expects, each pooled token in
            all the places it stands for, so that heads that average, feature maps and hidden states see what they
            always saw. ``"short"``: the pooled tokens themselves, fewer.
        cluster_on: ``"tokens"`` clusters what is pooled; ``"keys"`` clusters the attention keys averaged over heads
            and pools the tokens (ToMe, Table 1). Default: tokens, but keys for ``"bipartite"``, as published.
        track_size: count how many tokens each one stands for and use ``softmax(q k^T * scale + log size)`` from the
            first pooling on (ToMe's proportional attention), as a key-only bias ``(B, 1, 1, N)`` that fused attention
            accepts. Default: wherever an attention product is seen.
        num_prefix_tokens: tokens in front that are never pooled. Default: those that enter the first block the same
            whatever the input (class, register tokens); of texts the first.
        protect: indices of other tokens that are never pooled; negative ones count from the end. Such tokens that are
            seen at the end (a class token, detection tokens) are not pooled either.
        positions: (n, P) coordinates of the tokens that may be pooled, for ``position_weight``. Default: row and
            column in a square image.
        blocks: the block list, as a dotted path or as modules, for a model with several.
        example: inputs of the model, a tensor, tuple, list or mapping, to try its blocks on where made-up ones do not
            do.
        **pooling_options: for the pooling module, e.g. ``weighted=True``, ``num_iters=5``, ``init=None``,
            ``emit=None``, ``sort=True``, ``position_weight=0.0``, ``backend=None`` of ``TokenPooling``. Unknown names
            raise.

    Cost: significance scores and keys are taken from the block's own attention product while it runs, so nothing is
    projected twice and fused attention stays; the score itself is one pass of ``functional.attention_received``
    (twice ``N^2 D`` multiply-accumulates, no ``N x N`` memory). Scores and clustering carry no gradient to the
    projections; pooled tokens do. A block asked for at least as many tokens as it has computes exactly what it did
    before (bit-equal).

    Raises:
        TypeError: ``model`` has no list of transformer blocks, or its blocks are hierarchical, windowed, causal or
            cannot be tried (the class is named); a schedule of something else than numbers; an unknown keyword.
        ValueError: a schedule that is empty, outside the depth, increasing or given twice; an unknown name; several
            lists of blocks.
    """
    asked = SimpleNamespace(**locals())
    found, setup, parts, modules = prepare(asked)  # everything is checked before anything is changed
    if budget is not None:
        modules = within(asked, found, setup, parts, modules)
    unpatch(model)
    install(found, setup, parts, modules)
    return model


def install(found: finding.BlockList, setup: Setup, parts: Mapping[int, Any], modules: Mapping[int, nn.Module]) -> None:
    for i, part in parts.items():
        pooled.install(found.blocks[i], Place(setup, i, part), modules.get(i))
    for owner in found.owners:
        if "_orig_mod" not in owner._modules:  # not torch.compile's wrapper
            pooled.surround(owner, setup)


def within(
    asked: SimpleNamespace,
    found: finding.BlockList,
    setup: Setup,
    parts: Mapping[int, Any],
    modules: Mapping[int, nn.Module],
) -> dict[int, nn.Module]:
    """``modules`` at the largest ratio kept, in steps of 1/128, at which a forward takes the budget's MACs at most.

    The model is left as it was.
    """
    from ..cost import cost

    make = pooling_factory(asked.pooling, asked.pooling_options)
    put_back = pooled.patch_of(asked.model)
    unpatch(asked.model)

    def keeping(steps: int) -> dict[int, nn.Module]:
        return {i: make_pooling(make, steps / 128, setup, found.blocks[i]) for i in modules}

    def share(steps: int) -> float:
        install(found, setup, parts, keeping(steps))
        try:
            return cost(asked.model, *args, **kwargs).total / whole
        finally:
            unpatch(asked.model)

    try:
        args, kwargs = probing.inputs_for(found, asked.example)
        whole = cost(asked.model, *args, **kwargs).total
        steps = bisect.bisect_right(range(1, 129), asked.budget, key=share)
        if not steps:
            raise ValueError(
                f"patch: budget must be at least {share(1):.3f} for this model where these blocks pool, got"
                f" {asked.budget:g}; pool in earlier blocks with layers=..."
            )
    finally:
        put_back()
    return keeping(steps)


class Support(NamedTuple):
    """Whether ``patch`` takes a model, and what it found: false in a condition where it does not."""

    ok: bool
    reason: str
    num_prefix_tokens: int | None = None

    def __bool__(self) -> bool:
        return self.ok


def supported(model: nn.Module | None = None, **arguments: Any) -> Support | list[str]:
    """Whether :func:`patch` takes ``model`` with these arguments: true or false, with the reason. Changes nothing.

    Whether a ``budget`` can be kept only ``patch`` finds out.

        >>> tokenpool_ext.supported(model)
        Support(ok=True, reason='blocks (12 x Block); scores and sizes', num_prefix_tokens=1)

    Without a model: the names of the families of which a small model was patched, run and compared
    (``python -m tests.model_zoo --write`` makes the list, and the table in docs/models.md).
    """
    bound = inspect.signature(patch).bind(model, **arguments)
    bound.apply_defaults()
    if model is None:
        listed = (Path(__file__).parent / "supported.txt").read_text().splitlines()
        return [line for line in listed if line and not line.startswith("#")]
    try:
        found, setup, *_ = prepare(SimpleNamespace(**bound.arguments))
    except (TypeError, ValueError) as error:
        return Support(False, str(error))
    scores = "scores and sizes" if setup.form.attends else "no scores: its attention product is not seen"
    return Support(True, f"{found.name}; {scores}", setup.prefix)


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`, in place: every block gets back its class's own ``forward``, bit-equal to before.

    A model that is not patched is returned unchanged. Returns ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be an nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        pooled.remove(module)
    return model


def prepare(
    asked: SimpleNamespace,
) -> tuple[finding.BlockList, Setup, dict[int, Any], dict[int, nn.Module]]:
    """(blocks, setup, parts of the touched blocks, pooling modules) for the arguments of ``patch``; changes nothing.

    Raises:
        TypeError, ValueError: see ``patch``.
    """
    found = finding.find_blocks(asked.model, asked.blocks)
    depth = len(found.blocks)
    counts = schedules.asked_for(depth, asked)
    check_choice("patch", "position", asked.position, ("block", "attention"))
    check_choice("patch", "outside", asked.outside, ("full", "short", None))
    check_choice("patch", "cluster_on", asked.cluster_on, ("tokens", "keys", None))
    if asked.track_size is not None:
        check_bool("patch", "track_size", asked.track_size)
    trial.check_lists(asked.model, found, asked.example)
    prefix, suffix, inner, length = trial.protected_tokens(found, asked.example)
    if finding.is_mixed(found) and asked.num_prefix_tokens is None and asked.protect is None:
        raise ValueError(
            f"patch: {type(asked.model).__name__} has words and patches in one sequence, which must not be pooled"
            " together; say how many tokens in front are words with num_prefix_tokens=..., or which ones with"
            " protect=..."
        )
    if asked.num_prefix_tokens is not None:
        prefix = check_int("patch", "num_prefix_tokens", asked.num_prefix_tokens, 0)
    if asked.protect is not None:
        ends = {*range(prefix), *range(-suffix, 0)}  # which are counted
        inner, length = tuple(i for i in protected_indices(asked.protect) if i not in ends), 0
    setup = Setup(
        depth=depth,
        first=min(counts),
        prefix=prefix,
        suffix=suffix,
        protect=inner,
        length=length,
        outside=asked.outside or "full",
        position=asked.position,
        cluster_on=asked.cluster_on or ("keys" if asked.pooling == "bipartite" else "tokens"),
        positions=check_positions("patch", asked.positions),
    )
    make = pooling_factory(asked.pooling, asked.pooling_options)
    touched = list(range(setup.first, depth))
    seen: dict[nn.Module, int] = {}
    for i in touched:
        check_untouched(found.blocks[i], i)
        if seen.setdefault(found.blocks[i], i) != i:
            raise ValueError(
                f"patch: blocks {seen[found.blocks[i]]} and {i} of {found.path or 'blocks'} are one module, which has"
                " one place in a schedule; give it once with blocks=[...]: it then pools in each of its calls"
            )
    modules = {i: make_pooling(make, value, setup, found.blocks[i]) for i, value in counts.items()}
    parts = probing.probe(found, touched, setup, asked.example)
    if asked.track_size and not setup.form.attends:
        raise ValueError(
            f"patch: track_size=True adds to the logits of an attention product, but none is seen in"
            f" {found.block_name}; use track_size=False"
        )
    setup.track_size = setup.form.attends if asked.track_size is None else asked.track_size
    return found, setup, parts, modules


def make_pooling(make: Callable[..., nn.Module], value: int | float, setup: Setup, block: nn.Module) -> nn.Module:
    amount = {"num_tokens": value} if isinstance(value, int) else {"keep_ratio": value}
    module = make(**amount, num_prefix_tokens=setup.num_protected)
    if not isinstance(module, nn.Module):
        raise TypeError(f"patch: pooling must make an nn.Module, got {type(module).__name__}")
    if isinstance(module, TokenReduction):
        module.return_clusters = True
    return module.train(block.training)


def patches(model: nn.Module) -> list[tuple[nn.Module, Place]]:
    """The patched blocks of a model and their places, in order of depth."""
    found = {id(m): (m, m.__dict__[PLACE]) for m in model.modules() if PLACE in m.__dict__}
    return sorted(found.values(), key=lambda pair: pair[1].index)


def patched_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The pooling module of every pooling block by block index; empty when the model is not patched.

    Their counts may be changed between forwards: ``patched_blocks(model)[3].keep_ratio = 0.5``.
    """
    return {place.index: block.get_submodule(SUBMODULE) for block, place in patches(model) if hasattr(block, SUBMODULE)}


def protected_indices(protect: Iterable[int] | int) -> tuple[int, ...]:
    try:
        return tuple(sorted({operator.index(i) for i in ([protect] if isinstance(protect, int) else protect)}))
    except TypeError:
        raise TypeError(
            f"patch: protect must be indices of tokens that are never pooled, like range(1, 5) or [-1], got {protect!r}"
        ) from None


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
