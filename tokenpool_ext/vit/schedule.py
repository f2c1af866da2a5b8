"""How many patch tokens are left after which block: plain dicts ``{block index: count or ratio}`` for ``patch``.

An int is a number of patch tokens; a negative one removes as many, at most half (ToMe's ``r``); a float in (0, 1] is a
ratio of the tokens that enter the pooling. Integers and reals of numpy serve as well; schedules that are returned hold
Python's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

from ..checks import check_int, check_ratio
from ..reduction import as_fraction, kept_by_count, kept_by_ratio

Schedule = dict[int, int | float]
DEFAULT_RATIO = 0.7

__all__ = ["Schedule", "constant", "default_layers", "explicit", "geometric", "normalise", "tokens_after"]


def default_layers(depth: int) -> tuple[int, ...]:
    """The blocks at 1/4, 1/2 and 3/4 of the depth: 3, 6, 9 of 12 ("Which Tokens to Use?", arXiv 2308.04657)."""
    check_int("schedule", "depth", depth, 1)
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def constant(depth: int, keep_ratio: float, layers: Iterable[int] | None = None) -> Schedule:
    """The same ratio at each of ``layers``. 196 tokens at 0.7: 137, 96, 67, as published for TokenReduction."""
    layers = default_layers(depth) if layers is None else block_indices(layers)
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, Real) or not 0 < keep_ratio <= 1:
        raise ValueError(f"schedule: keep_ratio must be in (0, 1], got {keep_ratio!r}")
    return normalise(depth, dict.fromkeys(layers, float(keep_ratio)))


def geometric(depth: int, num_patches: int, last: int, layers: Iterable[int] | None = None) -> Schedule:
    """Counts that fall by a constant factor to ``last`` patch tokens, over ``layers`` (default: every block).

    The paper's own K = [K_1 .. K_L] come from PoWER-BERT's search and were not published; pooling a little after every
    block, as in its Fig. 1a, is the same in kind.
    """
    check_int("schedule", "depth", depth, 1)
    num_patches = check_int("schedule", "num_patches", num_patches, 1)
    last = check_int("schedule", "last", last, 1, num_patches)
    layers = sorted(range(depth) if layers is None else block_indices(layers))
    factor = (last / num_patches) ** (1 / max(len(layers), 1))
    return normalise(
        depth, {layer: max(last, round(num_patches * factor ** (i + 1))) for i, layer in enumerate(layers)}
    )


def explicit(counts: Sequence[int]) -> Schedule:
    """One count per block, the paper's ``K``; blocks that repeat the count before them do not pool."""
    entries = [_entry(layer, count) for layer, count in enumerate(counts)]
    schedule = {layer: count for layer, count in enumerate(entries) if layer == 0 or count != entries[layer - 1]}
    return normalise(len(entries), schedule)


def asked_for(depth: int, asked: Any) -> Schedule:
    """The schedule that the arguments of ``patch`` ask for."""
    names = ("num_tokens", "keep_ratio", "r", "budget")
    given = [f"{name}={value!r}" for name in names if (value := getattr(asked, name)) is not None]
    if len(given) > 1:
        raise ValueError(f"patch: give exactly one of num_tokens, keep_ratio, r and budget, got {', '.join(given)}")
    if asked.budget is not None:
        check_ratio("patch", "budget", asked.budget)
    num_tokens, layers = asked.num_tokens, asked.layers
    if layers is not None:
        if num_tokens is not None:
            raise ValueError("patch: layers goes with keep_ratio; with num_tokens write {block: count}")
        layers = block_indices(layers)
        if not layers:
            raise ValueError("patch: layers must name at least one block, got none")
    if asked.r is not None:
        r = check_int("patch", "r", asked.r, 1)
        return normalise(depth, dict.fromkeys(range(depth) if layers is None else layers, -r))
    if num_tokens is None:
        return constant(depth, DEFAULT_RATIO if asked.keep_ratio is None else asked.keep_ratio, layers)
    if hasattr(num_tokens, "items"):
        return normalise(depth, num_tokens)
    if (
        isinstance(num_tokens, (str, bytes))
        or not isinstance(num_tokens, Iterable)
        or not getattr(num_tokens, "ndim", 1)
    ):
        raise TypeError(
            f"patch: num_tokens must be {{block: count}} or one count per block, got {num_tokens!r}; for a single"
            " block write {block: count}"
        )
    num_tokens = list(num_tokens)
    if len(num_tokens) != depth:
        raise ValueError(f"patch: num_tokens must have one count per block, {depth}, got {len(num_tokens)}")
    return explicit(num_tokens)


def normalise(depth: int, schedule: Mapping[int, int | float]) -> Schedule:
    """Check a schedule against the number of blocks and sort it.

    Raises:
        TypeError, ValueError: naming the layer and its value.
    """
    if not schedule:
        raise ValueError("schedule: num_tokens must name at least one block, got none; write {block: count}")
    entries: Schedule = {}
    for key, given in schedule.items():
        layer = _integer(key)
        if layer is None:
            raise TypeError(f"schedule: block indices must be ints, got {key!r}")
        if not -depth <= layer < depth:
            raise ValueError(f"schedule: block index must be from 0 to {depth - 1} for {depth} blocks, got {layer}")
        layer %= depth
        if layer in entries:
            raise ValueError(f"schedule: block {layer} of {depth} is named twice, as {key} and otherwise")
        entries[layer] = value = _entry(layer, given)
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(
                f"schedule: block {layer}: a float is a ratio in (0, 1], got {value}; write an int for a count"
            )
        if value == 0:
            raise ValueError(f"schedule: block {layer} must keep at least 1 token, got {value}")
    entries = dict(sorted(entries.items()))
    counts = [(layer, value) for layer, value in entries.items() if isinstance(value, int) and value > 0]
    for (_, before), (layer, value) in pairwise(counts):
        if value > before:
            raise ValueError(f"schedule: counts must not rise with depth, got {value} at block {layer} after {before}")
    return entries


def tokens_after(depth: int, num_patches: int, schedule: Mapping[int, int | float]) -> list[int]:
    """Patch tokens left after each of ``depth`` blocks."""
    left, out = num_patches, []
    for layer in range(depth):
        left = kept(left, schedule.get(layer))
        out.append(left)
    return out


def kept(num_patches: int, value: int | float | None) -> int:
    """What one entry of a schedule leaves of ``num_patches`` tokens."""
    if value is None:
        return num_patches
    value = _entry("?", value)
    if isinstance(value, int):
        return kept_by_count(num_patches, value)
    return kept_by_ratio(num_patches, *as_fraction(value))


def block_indices(layers: Iterable[int]) -> list[int]:
    """Any iterable of block indices as a list.

    Raises:
        TypeError: it is none, or holds something else.
    """
    try:
        listed = None if isinstance(layers, (str, bytes)) else list(layers)
    except TypeError:  # not iterable
        listed = None
    if listed is None:
        raise TypeError(f"schedule: layers must be block indices like [3, 6, 9], got {layers!r}")
    found: list[Any] = [_integer(layer) for layer in listed]
    if None in found:
        wrong = listed[found.index(None)]
        raise TypeError(f"schedule: layers must be block indices (ints), got {wrong!r} among them")
    return found


def _integer(value: Any) -> int | None:
    """Anything that is an integer, as an int; None otherwise (bools are none)."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _entry(layer: int | str, value: Any) -> int | float:
    count = _integer(value)
    if count is not None:
        return count
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"schedule: block {layer} needs an int (tokens) or a float (ratio), got {value!r}")
    return float(value)
