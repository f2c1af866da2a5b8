"""What a schedule is found with: the user's batches and blocks, and the feature that is compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..checks import check_iterable
from ..reference_steps import wide_dtype
from . import finding, probing, schedule
from .patching import patches


class Calibration(NamedTuple):
    """What a model is tried on."""

    blocks: list[nn.Module]
    places: list[int]  # of the blocks that may pool
    batches: list[Any]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # the batches as arguments of the model's forward


def calibration(
    name: str, model: nn.Module, batches: Iterable[Any], layers: Iterable[int] | None, options: dict[str, Any]
) -> Calibration:
    """All of it checked. ``blocks`` of the options are read twice, so an iterator becomes a list there."""
    if isinstance(options.get("blocks"), Iterator):
        options["blocks"] = list(options["blocks"])
    blocks = finding.find_blocks(model, options.get("blocks"), name).blocks
    if patches(model):
        raise ValueError(f"{name}: model must not be patched; unpatch(model) first")
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name}: batches must be an iterable of inputs, got one {type(batches).__name__}; write [it]")
    listed = list(batches)
    if not listed:
        raise ValueError(f"{name}: batches must hold at least one input of the model, got none")
    places = list(range(len(blocks)) if layers is None else check_iterable(name, "layers", layers))
    if not places:
        raise ValueError(f"{name}: layers must name at least one block, got none")
    places = sorted(schedule.constant(len(blocks), 1.0, places))
    calls = [probing.as_call(batch) for batch in listed]
    for args, kwargs in calls:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{name}: a batch must hold what {type(model).__name__} takes and no more, such as [x for x, y in"
                f" loader] without the labels ({error})"
            ) from None
    return Calibration(blocks, places, listed, calls)


def feature_of(output: Any) -> Any:
    """``logits``, ``pooler_output`` or the first floating tensor, the mean over the tokens where there are some."""
    for name in ("logits", "pooler_output"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    values: Any = [output] if isinstance(output, Tensor) else output
    values = values.values() if isinstance(values, Mapping) else values
    first = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    return first.flatten(1, -2).mean(1) if first is not None and first.dim() > 2 else first


def compared(name: str, output: Any, feature: Callable[[Any], Any] = feature_of) -> Tensor:
    """(B, D) float64 feature of what a model returns."""
    value = feature(output)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: feature must give a floating tensor, got {type(value).__name__}")
    if value.dim() < 2:
        raise TypeError(
            f"{name}: feature must give a tensor (B, ...) of 2 dimensions or more, got {tuple(value.shape)}"
        )
    return value.flatten(1).to(wide_dtype(value))
