"""How many tokens to keep after which block, found by measuring: what each block loses, what each count costs.

1. Every block that may pool does so alone, at every count of a grid: what the model's feature loses (1 - cosine).
2. A few pooled forwards give what a block costs that m tokens enter and n leave, in MACs or seconds.
3. A dynamic program over (block, tokens left, cost so far) finds the counts of least summed loss within the budget.
4. The model pooled so is counted or timed; if it does not fit (blocks that are not alike), 3 has less to spend.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..checks import check_choice, check_int, check_iterable, check_ratio
from ..cost import counted
from ..reduction import TokenReduction
from . import trial
from .calibration import Calibration, calibration, compared, feature_of
from .inputs import batch_first, find_tokens, named, packed_ends
from .patching import patch, patched_blocks, patches, unpatch

__all__ = ["search_schedule"]

NAME = "search_schedule"
LEVELS = 12  # counts that are tried in every block
FINE = 32  # counts that are timed to find the steps
SAME = 0.02  # times that differ by less are the same
ROUNDS = 3  # turns of a measured time
UNITS = 1 << 13  # the budget in the dynamic program
HOST: Any = {"device": "cpu", "dtype": torch.float64}  # of tables, whatever the default device


def search_schedule(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float,
    target: str = "macs",
    layers: Iterable[int] | None = None,
    counts: Iterable[int] | None = None,
    feature: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> dict[int, int]:
    """Find how many tokens to keep after which block, for :func:`tokenpool_ext.patch`. The model is left as it was.

        >>> found = tokenpool_ext.search_schedule(model, [images], budget=0.6)              # {4: 171, 7: 85}
        >>> tokenpool_ext.patch(model, num_tokens=found)

    What a block loses at a count is measured with that block pooling alone, and losses of several blocks are taken to
    add up. That is an approximation: compare the found schedule on your own task.

    Args:
        model: any model that ``patch`` takes, not patched. It runs in eval mode, without gradients, autocast and hooks.
        batches: inputs of the model, each a tensor, a tuple or list, or a mapping of keywords; no labels. All with the
            same number of tokens. Cost is measured on the first.
        budget: share of the unpooled model's cost that may be used, in (0, 1].
        target: ``"macs"``: multiply-accumulates as ``tokenpool_ext.cost`` counts them, pooling's own included; the
            result depends on nothing but model and batches. ``"latency"``: median seconds of a forward on this device,
            which are stepped: of counts that take the same time only the largest is used.
        layers: block indices (from 0, or negative) that may pool. Default: all.
        counts: numbers of tokens that may be kept. Default: twelfths of all (prefix tokens not counted; with
            ``init="bipartite"`` at least half of them).
        feature: gives the (B, ...) tensor to compare of what the model returns. Default: ``logits``,
            ``pooler_output`` or the first floating tensor, the mean over the tokens if it has more than two dimensions.
        **options: of ``patch``, such as ``pooling=``, ``position=``, ``weighted=``; give the same to ``patch``.

    Returns:
        ``{block index: tokens kept}``, counts falling. One block that keeps all where nothing need be pooled.

    Cost: one forward of every batch for every block and count (132 for 12 blocks), and some 78 of the first batch; for
    latency 440.

    Raises:
        TypeError: as ``patch``; a pooling that has no number of tokens; a feature that is no floating tensor.
        ValueError: as ``patch``; a patched model; no batches, or of different numbers of tokens, or that the model does
            not run on or makes NaN of; a budget out of range or that pooling these blocks to these counts cannot come
            down to (the least is named).
    """
    budget = check_ratio(NAME, "budget", budget)
    check_choice(NAME, "target", target, ("macs", "latency"))
    given = calibration(NAME, model, batches, layers, options)
    check_batches(NAME, given)
    whole = features_of(NAME, model, given, feature or feature_of)
    try:
        patch(model, keep_ratio=1.0, layers=given.places, **{"example": given.batches[0], **options})
        with trial.quiet(model):
            search = _Search(model, given, whole, feature or feature_of, options.get("init"))
            return search.run(budget, target, counts)
    finally:
        unpatch(model)


def check_batches(name: str, given: Calibration) -> None:
    """Whether each batch is something; whether it is what the model takes, the model tells."""
    for i, (batch, call) in enumerate(zip(given.batches, given.calls)):
        leaves = tree_leaves(call)
        if all(leaf is None or isinstance(leaf, str) for leaf in leaves) or isinstance(batch, (int, float)):
            raise TypeError(
                f"{name}: batches[{i}] must be a tensor, a tuple or list, or a mapping of keywords, that holds what the"
                f" model takes, got {type(batch).__name__}{'' if leaves else ', empty'}"
            )


def features_of(name: str, model: nn.Module, given: Calibration, feature: Callable[[Any], Any]) -> list[Tensor]:
    """Of each batch the finite (B, D) float64 feature that the unpatched model gives."""
    found = []
    with trial.quiet(model):
        for i, (args, kwargs) in enumerate(given.calls):
            trial.reseed(model)
            try:
                output = model(*args, **kwargs)
            except Exception as error:
                raise ValueError(
                    f"{name}: batches[{i}] must be what {type(model).__name__} runs on, got"
                    f" {type(error).__name__}: {error}"
                ) from error
            found.append(compared(name, output, feature))
            if not found[-1].numel() or not found[-1].isfinite().all():
                numbers = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
                raise ValueError(
                    f"{name}: batches[{i}] must give a finite feature that is not empty, got shape"
                    f" {tuple(found[-1].shape)} with {int((~found[-1].isfinite()).sum())} NaN or infinite, from"
                    f" {sum(int(t.isnan().sum()) for t in numbers)} NaN in the batch"
                )
    return found


class _Search:
    """A patched model whose blocks are told between forwards how many tokens to keep.

    L blocks; the last entry of a list of costs, L + 1 long, is what is outside the blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Calibration,
        whole: list[Tensor],
        feature: Callable[[Any], Any],
        init: Any,
    ) -> None:
        self.model, self.whole, self.feature = model, whole, feature
        self.blocks, self.places, _, self.calls = given
        self.pools: dict[int, Any] = patched_blocks(model)
        for module in self.pools.values():
            if not isinstance(module, TokenReduction):
                raise TypeError(f"{NAME}: pooling must make a TokenReduction, got {type(module).__name__}")
        lengths = sorted({self.length(call) for call in self.calls})
        if len(lengths) > 1:
            raise ValueError(f"{NAME}: batches must have one number of tokens, got {lengths}")
        self.n = lengths[0]
        self.least = -(-self.n // 2) if init == "bipartite" else 1  # tokens that may be left

    def length(self, call: tuple[Any, ...]) -> int:
        """How many tokens of a batch may be pooled."""
        setup, block = patches(self.model)[0][1].setup, self.blocks[self.places[0]]
        args, kwargs = trial.entering([block], self.model, call)[0][block]
        at, tokens = find_tokens(args, kwargs)
        n = batch_first(tokens, setup.form.layout).shape[1]
        if setup.form.layout == "packed" and packed_ends(named(block, args, kwargs, at), n):
            raise ValueError(f"{NAME}: batches must hold one sequence where the model takes them packed")
        return n - setup.num_protected

    def keep(self, counts: Mapping[int, int]) -> None:
        for i, module in self.pools.items():
            module.num_tokens = counts.get(i, self.n)

    def output(self, call: tuple[Any, ...]) -> Tensor:
        """(B, D) float64 feature of one batch."""
        trial.reseed(self.model)
        return compared(NAME, self.model(*call[0], **call[1]), self.feature)

    def loss(self, counts: Mapping[int, int]) -> float:
        """Mean of 1 - cosine over all inputs."""
        self.keep(counts)
        pairs = zip(self.whole, self.calls)
        return torch.cat([1 - F.cosine_similarity(whole, self.output(call)) for whole, call in pairs]).mean().item()

    def run(self, budget: float, target: str, counts: Iterable[int] | None) -> dict[int, int]:
        levels = self.levels(counts)
        measure = self.macs if target == "macs" else self.seconds
        if target == "latency":
            levels = self.plateaus(levels if counts is not None else self.even(FINE))
        costs = self.costs(levels, measure)
        losses = torch.full((len(self.blocks), len(levels), len(levels)), torch.inf, **HOST)
        for table in losses:
            table.fill_diagonal_(0)
        for i in self.places:
            lost = torch.tensor([0.0, *(self.loss({i: n}) for n in levels[1:])], **HOST)
            lost = lost.clamp(min=0).cummax(0).values
            pools = losses.new_ones(len(levels), len(levels)).triu(1).bool()
            losses[i] = torch.where(pools, lost, losses[i])
        return self.fit(budget, levels, losses, costs, measure)

    def even(self, parts: int) -> list[int]:
        counts = {max(1, round(self.n * k / parts)) for k in range(1, parts + 1)}
        return sorted((count for count in counts if count >= self.least), reverse=True)

    def levels(self, counts: Iterable[int] | None) -> list[int]:
        """Counts, falling from all."""
        if counts is None:
            return self.even(LEVELS)
        given = {check_int(NAME, "counts", count, self.least) for count in check_iterable(NAME, "counts", counts)}
        return sorted({self.n, *(count for count in given if count < self.n)}, reverse=True)

    def fit(
        self, budget: float, levels: list[int], losses: Tensor, costs: Tensor, measure: Callable[..., Any]
    ) -> dict[int, int]:
        """The path of least loss that is within the budget when measured."""
        rest, steps = costs[-1, 0, 0].item(), costs[:-1]
        whole = rest + steps[:, 0, 0].sum().item()
        allowed, over = budget * whole, torch.inf
        for _ in range(8):
            unit = (allowed - rest) / UNITS
            path = None
            if unit > 0:
                path = cheapest(losses, (steps / unit).floor().clamp(min=0).long(), UNITS)
            if path is None:
                break
            counts, before = {}, 0
            for i, level in enumerate(path):
                if level != before:
                    counts[i] = levels[level]
                before = level
            if not counts:
                return {self.places[-1]: self.n}
            used, unpooled = (sum(values) for values in measure([counts, {}]))
            if used <= budget * unpooled:
                return counts
            over = min(over, used / unpooled)
            allowed *= 0.9998 * budget * unpooled / used
        least = over if over < torch.inf else (rest + least_cost(losses, steps)) / whole
        raise ValueError(
            f"{NAME}: budget must be at least about {least:.3f} where these blocks pool to these counts, got"
            f" {budget:g}; pool in earlier blocks or to fewer tokens"
        )

    # --------------------------------------------------------------------------------------------------------- costs

    def costs(self, levels: list[int], measure: Callable[..., Any]) -> Tensor:
        """(L + 1, G, G) what a block costs that levels[m] tokens enter and levels[n] leave.

        Blocks that pool are taken to be alike in what pooling costs: it is measured in the first, which all tokens
        enter, and in the second.
        """
        first, *later = self.places
        size = len(levels)
        pairs = [(m, n) for m in range(size) for n in range(m, size) if m == n or (m and later)]
        schedules = [{first: levels[m]} | ({} if m == n else {later[0]: levels[n]}) for m, n in pairs]
        table = {pair: torch.tensor(row, **HOST) for pair, row in zip(pairs, measure(schedules))}
        whole = table[0, 0]
        costs = torch.empty(len(self.blocks) + 1, size, size, **HOST)
        for m in range(size):
            own = torch.cat([whole[: first + 1], table[m, m][first + 1 : -1], whole[-1:]])
            costs[:, m] = own[:, None]
            for n in range(m + 1, size):
                if m == 0:
                    costs[:-1, m, n] += table[n, n][first] - whole[first]
                elif later:
                    costs[:-1, m, n] += table[m, n][later[0]] - own[later[0]]
        return costs

    def macs(self, schedules: list[dict[int, int]]) -> list[list[int]]:
        """MACs of every block and of what is outside them."""
        place = {block: i for i, block in enumerate(self.blocks)}
        rows = []
        for counts in schedules:
            self.keep(counts)
            row = [0] * (len(place) + 1)
            for event in counted(self.model, *self.calls[0]):
                row[next((place[m] for m in event.stack if m in place), -1)] += event.macs
            rows.append(row)
        return rows

    def seconds(self, schedules: list[dict[int, int]]) -> list[list[float]]:
        """Medians of the seconds of every block and of what is outside them, measured in turns."""
        rows: list[list[list[float]]] = [[] for _ in schedules]
        for turn in range(ROUNDS + 1):
            for row, counts in zip(rows, schedules):
                self.keep(counts)
                found = self.timed()
                if turn:
                    row.append(found)
        return [[statistics.median(column) for column in zip(*row)] for row in rows]

    def timed(self) -> list[float]:
        spent = [0.0] * (len(self.blocks) + 1)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))

        def now() -> float:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return time.perf_counter()

        def note(i: int, sign: int, *_: Any) -> None:
            spent[i] += sign * now()

        with ExitStack() as hooks:
            for i, block in enumerate(self.blocks):
                hooks.enter_context(block.register_forward_pre_hook(partial(note, i, -1)))
                hooks.enter_context(block.register_forward_hook(partial(note, i, 1)))
            start = now()
            self.model(*self.calls[0][0], **self.calls[0][1])
            spent[-1] = now() - start - sum(spent[:-1])
        return spent

    def plateaus(self, levels: list[int]) -> list[int]:
        """At most LEVELS of the counts, none of which takes as long as a larger one."""
        first = self.places[0]
        times = [sum(row[first:]) for row in self.seconds([{first: n} for n in levels])]
        return thinned(*steps_of(levels, times), LEVELS)


def steps_of(levels: list[int], times: list[float]) -> tuple[list[int], list[float]]:
    """Counts, falling, and their times without those that take as long as a larger count."""
    kept: list[tuple[int, float]] = []
    for count, spent in zip(levels, times):
        if not kept or spent < (1 - SAME) * kept[-1][1]:
            kept.append((count, spent))
    return [count for count, _ in kept], [spent for _, spent in kept]


def thinned(levels: list[int], times: list[float], most: int) -> list[int]:
    """Those nearest to even steps of time, the first and the last among them."""
    if len(levels) <= most:
        return levels
    aims = [times[0] + (times[-1] - times[0]) * k / (most - 1) for k in range(most)]
    return sorted({min(zip(levels, times), key=lambda pair: abs(pair[1] - aim))[0] for aim in aims}, reverse=True)


def cheapest(losses: Tensor, costs: Tensor, limit: int) -> list[int] | None:
    """The level that leaves each block, for the least summed loss at a summed cost of at most ``limit``.

    losses (L, G, G) float64, costs (L, G, G) int64: of a block that level m enters and level n leaves; level 0 enters
    the first. An infinite loss forbids. Of paths of equal loss one of the least cost. None: there is no path.
    """
    depth, size, _ = losses.shape
    best = losses.new_full((size, limit + 1), torch.inf)
    best[0, 0] = 0
    origins = []
    for i in range(depth):
        found = torch.full_like(best, torch.inf)
        origin = costs.new_zeros(size, limit + 1, dtype=torch.int16)
        for m in range(size):
            for n in range(size):
                c = int(costs[i, m, n])
                if c > limit or losses[i, m, n] == torch.inf:
                    continue
                sums = best[m, : limit + 1 - c] + losses[i, m, n]
                origin[n, c:].masked_fill_(sums < found[n, c:], m)
                torch.minimum(found[n, c:], sums, out=found[n, c:])
        best = found
        origins.append(origin)
    least = best.min()
    if least == torch.inf:
        return None
    spent = int((best == least).any(0).nonzero().min())
    level = int((best[:, spent] == least).nonzero().min())
    path = []
    for i in reversed(range(depth)):
        path.append(level)
        before = int(origins[i][level, spent])
        spent -= int(costs[i, before, level])
        level = before
    return path[::-1]


def least_cost(losses: Tensor, costs: Tensor) -> float:
    """The least summed cost of any path that no infinite loss forbids."""
    best = losses.new_full((losses.shape[1],), torch.inf)
    best[0] = 0
    for loss, cost in zip(losses, costs):
        best = (best[:, None] + torch.where(loss == torch.inf, torch.inf, cost)).amin(0)
    return best.min().item()
