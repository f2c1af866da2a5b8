"""Measure token pooling inside a real model: one patched copy a method and budget, run on the same photos.

`variants` makes the copies (they share the weights), `quality` compares what they compute with the unpooled model,
`throughput` times them interleaved. All plain functions on tensors: the demo prints, tests call.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .pretrained import blocks_of

# (label, `pooling` of tokenpool_ext.patch, its options): the defaults, and nothing else.
METHODS: tuple[tuple[str, str, dict], ...] = (
    ("weighted K-Means", "kmeans", {}),
    ("weighted K-Medoids", "kmedoids", {}),
    ("bipartite (ToMe)", "bipartite", {}),
    ("grid (average)", "grid", {}),
    ("score pruning", "score", {}),
    ("random", "random", {"seed": 0}),
)
ALL_TOKENS = "all tokens"
LAYERS = (3, 6, 9)  # of 12 blocks, counted from 0: the schedule of arXiv 2308.04657


@dataclass
class Row:
    """One line of the table. Ratios are to the unpooled model; ``error`` and cosines are means over images."""

    method: str
    budget: float  # ratio of tokens kept at each pooling block; 1.0 = unpooled
    tokens: list[int] = field(default_factory=list)  # patch tokens that leave each block
    gmacs: float = float("nan")  # 1e9 multiply-adds an image, clustering included
    images_per_s: float = float("nan")  # median of interleaved repeats
    speedup: float = 1.0  # median of the ratios measured in the same round
    error: float | None = None  # see `relative_error`, at the first pooling block
    cosine_cls: float = 1.0  # final CLS feature against the unpooled one
    cosine_mean: float = 1.0  # mean of the final patch tokens, likewise
    failed: str | None = None

    def record(self) -> dict:
        return asdict(self)


@dataclass
class Variant:
    """A model to measure and the `Row` it fills."""

    row: Row
    model: torch.nn.Module
    pooling: str | None = None


def shared_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy of the modules that shares every parameter and buffer with ``model``."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def schedule(patches: int, budget: float, layers: Sequence[int] = LAYERS) -> dict[int, int]:
    """``{block: tokens left}``: each block in ``layers`` keeps the ratio ``budget`` of the tokens that enter it."""
    if not 0 < budget <= 1:
        raise ValueError(f"budgets: expected ratios in (0, 1], got {budget}")
    out = {}
    for layer in layers:
        patches = max(1, round(budget * patches))
        out[layer] = patches
    return out


def variants(
    model: torch.nn.Module, patches: int, budgets: Iterable[float], methods=METHODS, layers: Sequence[int] = LAYERS
) -> list[Variant]:
    """The unpooled model, then every method at every budget; a method that cannot be built keeps its reason."""
    from ..vit import patch

    rows = [Variant(Row(ALL_TOKENS, 1.0), model)]
    for budget in budgets:
        for label, pooling, options in methods:
            variant = Variant(Row(label, budget), model, pooling)
            try:
                variant.model = patch(
                    shared_copy(model), num_tokens=schedule(patches, budget, layers), pooling=pooling, **options
                )
            except Exception as error:
                variant.row.failed = f"{type(error).__name__}: {error}"
            rows.append(variant)
    return rows


def pooling_modules(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module]]:
    """(block index, pooling module) of a patched model, in order."""
    found = ((i, getattr(block, "tokenpool", None)) for i, block in enumerate(blocks_of(model)))
    return [(i, m) for i, m in found if m is not None]


def features(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final CLS token and mean of the other tokens, both (B, D), after the last LayerNorm."""
    out = model.forward_features(pixels) if hasattr(model, "forward_features") else model(pixels).last_hidden_state
    return out[:, 0], out[:, 1:].mean(dim=1)


def relative_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B,) squared distance of each token of ``x`` (B, N, D) to its nearest in ``y`` (B, K, D), over the variance.

    ``sum_i min_j ||x_i - y_j||^2 / sum_i ||x_i - mean||^2``: the paper's objective (section 3), 0 when nothing is
    lost and 1 when one mean token is left. One definition for every method, whatever it emits.
    """
    x, y = x.double(), y.double()
    mean = x.mean(dim=1, keepdim=True)
    x, y = x - mean, y - mean
    size = x.square().sum(dim=2)
    nearest = (size.unsqueeze(2) - 2 * x @ y.transpose(1, 2) + y.square().sum(dim=2).unsqueeze(1)).amin(dim=2)
    return nearest.clamp(min=0).sum(dim=1) / size.sum(dim=1).clamp(min=1e-300)


def costs(rows: list[Variant]) -> None:
    """Fill the GMACs of every row, counted in one forward of its model."""
    from ..cost import gmacs

    for variant in (v for v in rows if not v.row.failed):
        variant.row.gmacs = gmacs(variant.model)


class Watch:
    """Context: records what enters and leaves every block and pooling module of ``model`` during forwards.

    ``calls[block] = (module, args, kwargs, output)`` of each pooling module; ``lengths[block]``: tokens after it,
    of which the block hands out as many copies as the model expects.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.left = model, 0
        self.calls: dict[int, tuple[Any, ...]] = {}
        self.lengths: dict[int, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        for index, module in pooling_modules(self.model):

            def keep(module, args, kwargs, output, index=index):
                self.calls[index] = (module, args, kwargs, output)
                self.left = (output[0] if isinstance(output, tuple) else output).shape[1]

            self._hooks.append(module.register_forward_hook(keep, with_kwargs=True))
        for index, block in enumerate(blocks_of(self.model)):

            def measure(module, args, output, index=index):
                if index == 0 and 0 not in self.calls:
                    self.left = (output[0] if isinstance(output, tuple) else output).shape[1]
                self.lengths[index] = self.left

            self._hooks.append(block.register_forward_hook(measure))
        return self

    def __exit__(self, *exc) -> None:
        for hook in self._hooks:
            hook.remove()

    def tokens(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that entered and left the pooling at block ``index``, without the CLS token."""
        _, args, kwargs, output = self.calls[index]
        x = args[0] if args else kwargs["x"]
        y = output[0] if isinstance(output, tuple) else output
        return x[:, 1:], y[:, 1:]


@torch.no_grad()
def quality(
    rows: list[Variant], pixels: torch.Tensor, *, batch: int = 16, say: Callable[[str], None] = lambda line: None
) -> None:
    """Fill tokens, error, and cosines of every row. The first row must be the unpooled model."""
    wanted = []
    for number, variant in enumerate(rows):
        row = variant.row
        if row.failed:
            continue
        say(f"comparing features [{number + 1}/{len(rows)}] {row.method} {row.budget:g}")
        errors, cls_cosines, mean_cosines = [], [], []
        try:
            for at, start in enumerate(range(0, len(pixels), batch)):
                with Watch(variant.model) as watch:
                    cls, mean = features(variant.model, pixels[start : start + batch])
                row.tokens = [watch.lengths[i] - 1 for i in sorted(watch.lengths)]
                if number == 0:
                    wanted.append((cls, mean))
                if watch.calls:
                    errors.append(relative_error(*watch.tokens(min(watch.calls))))
                cls_cosines.append(torch.cosine_similarity(cls, wanted[at][0]))
                mean_cosines.append(torch.cosine_similarity(mean, wanted[at][1]))
        except Exception as error:
            if number == 0:
                raise
            row.failed = f"{type(error).__name__}: {error}"
            continue
        row.error = torch.cat(errors).mean().item() if errors else None
        row.cosine_cls = torch.cat(cls_cosines).mean().item()
        row.cosine_mean = torch.cat(mean_cosines).mean().item()


@torch.no_grad()
def throughput(
    rows: list[Variant],
    pixels: torch.Tensor,
    *,
    repeats: int = 4,
    limit_s: float = 50.0,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Fill images/s and speed-up: every row once a round, ``repeats`` rounds after a warm-up; medians.

    Interleaving and per-round ratios keep a machine that slows down half-way from favouring whoever ran first. No round
    is started after ``limit_s`` seconds, but one is always finished. Returns the number of rounds.
    """
    alive = [v for v in rows if not v.row.failed]
    seconds: dict[int, list[float]] = {id(v): [] for v in alive}
    for variant in alive:
        features(variant.model, pixels[:1])
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats and (rounds == 0 or time.perf_counter() - begin < limit_s):
        rounds += 1
        for number, variant in enumerate(alive):
            say(
                f"timing [round {rounds}/{repeats}, {number + 1}/{len(alive)}] {variant.row.method} "
                f"{variant.row.budget:g}"
            )
            start = time.perf_counter()
            features(variant.model, pixels)
            seconds[id(variant)].append(time.perf_counter() - start)
    base = seconds[id(alive[0])]
    for variant in alive:
        mine = seconds[id(variant)]
        variant.row.images_per_s = len(pixels) / statistics.median(mine)
        variant.row.speedup = statistics.median(b / m for b, m in zip(base, mine))
    return rounds


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; a line between budgets, and last those that failed."""
    from tabulate import SEPARATING_LINE, tabulate

    header = ("method", "tokens after pooling", "GMACs", "images/s", "speed-up", "rec. error", "cos CLS", "cos mean")
    lines: list[Any] = []
    done = [row for row in rows if not row.failed]
    for before, row in zip([None, *done], done):
        if before and row.budget != before.budget:
            lines.append(SEPARATING_LINE)
        steps = [count for i, count in enumerate(row.tokens) if i == 0 or count != row.tokens[i - 1]]
        lines.append(
            (
                row.method,
                " > ".join(map(str, steps)),
                f"{row.gmacs:.2f}",
                f"{row.images_per_s:.1f}",
                f"{row.speedup:.2f}x",
                "-" if row.error is None else f"{100 * row.error:.1f} %",
                f"{row.cosine_cls:.3f}",
                f"{row.cosine_mean:.3f}",
            )
        )
    aligned = ("left", "left", *["right"] * (len(header) - 2))
    failed = [f"{row.method}: not measured: {row.failed.splitlines()[0][:90]}" for row in rows if row.failed]
    return "\n".join([tabulate(lines, header, disable_numparse=True, colalign=aligned), *failed])
