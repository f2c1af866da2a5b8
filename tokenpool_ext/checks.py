"""Checks of the arguments of the public functions and layers; what is below them may trust its inputs.

Each check names the argument, what was expected, what came and, where it helps, the remedy: TypeError for a wrong kind,
ValueError for a wrong value. `name` is the function or layer that was called.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import values
from .backends import REGISTRY
from .ops import accumulate_dtype
from .starts import STRATEGIES, next_valid

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
LARGEST_FLOAT = sys.float_info.max
LARGEST = 2**31 - 1  # of what the kernels count in int32


def check_int(
    name: str, argument: str, value: Any, least: int, most: int | None = None, *, kind: str = "an int", hint: str = ""
) -> int:
    """An integer of any library (no bool) from `least` to `most`, as an int; where sizes are symbols, as a SymInt.

    most: None for the largest int32, in which kernels count; a symbol is not compared with that (it would be a guard).
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        value = int(value)  # NumPy's
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: {argument} must be {kind}, got {type(value).__name__}")
    above = value > most if most is not None else isinstance(value, int) and value > LARGEST
    if above or value < least:
        limit = "2^31 - 1" if most is None else f"N = {most}" if argument in ("num_clusters", "K") else most
        raise ValueError(f"{name}: {argument} must be from {least} to {limit}, got {value}{hint if above else ''}")
    return value  # type: ignore[return-value]  # a SymInt does all that an int does


def check_iterable(name: str, argument: str, value: Any) -> Any:
    """Several of something, no single one."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: {argument} must be an iterable of ints, got {type(value).__name__}")
    return value


def check_float(name: str, argument: str, value: Any, least: float, most: float, words: str) -> float:
    """A real number of any library (no bool) from `least` to `most`, which `words` says, as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {argument} must be a float, got {type(value).__name__}")
    number: Any = value  # an int may be too large for a float
    if not isinstance(value, numbers.Rational):
        number = float(value)  # NumPy compares in its own dtype, and warns
    if not least <= number <= most:
        raise ValueError(f"{name}: {argument} must be {words}, got {value}")
    return float(value)


def check_ratio(name: str, argument: str, value: Any) -> float:
    return check_float(name, argument, value, math.ulp(0.0), 1, "in (0, 1]")


def check_position_weight(name: str, value: Any) -> float:
    return check_float(name, "position_weight", value, 0, LARGEST_FLOAT, "finite and at least 0")


def check_bool(name: str, argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, got {type(value).__name__}")
    return value


def check_choice(name: str, argument: str, value: Any, choices: tuple[str | None, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_backend(name: str, backend: object) -> str | None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{name}: backend must be a str or None, got {type(backend).__name__}")
    if backend is not None:
        check_choice(name, "backend", backend, tuple(REGISTRY))
    return backend


def check_num_clusters(name: str, num_clusters: object, x3: Tensor, batched: bool) -> tuple[int, Tensor | None]:
    """(K, counts): the number of clusters in the output, and the per-image numbers or None."""
    b, n, _ = x3.shape
    if not isinstance(num_clusters, Tensor):
        most = n if b > 0 else None
        kind = "an int or a (B,) integer tensor"
        return check_int(name, "num_clusters", num_clusters, 1, most, kind=kind, hint="; ask for fewer clusters"), None
    check_tensor(name, "num_clusters", num_clusters)
    if num_clusters.dtype not in INTEGER:
        raise TypeError(
            f"{name}: num_clusters must be an int or an integer tensor, got a tensor of {num_clusters.dtype}"
        )
    expected = (b,) if batched else ()
    if tuple(num_clusters.shape) not in {expected, (b,)}:
        raise ValueError(f"{name}: num_clusters must have shape (B,) = {(b,)}, got {tuple(num_clusters.shape)}")
    check_device(name, "num_clusters", num_clusters, x3)
    check_known(name, "num_clusters", num_clusters)
    counts = num_clusters.reshape(b).to(torch.int64)
    if b == 0:
        return 1, counts
    low, high = int(counts.amin()), int(counts.amax())  # the output's shape depends on it: the one synchronisation
    if low < 1 or high > n:
        raise ValueError(
            f"{name}: num_clusters must be from 1 to N = {n}, got values from {low} to {high}"
            f"{'; ask for fewer clusters' if high > n else ''}"
        )
    return high, counts


def check_tensor(name: str, argument: str, value: Any, floating: bool = False) -> None:
    """A dense tensor; ``floating``: of a dtype that may be clustered."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name}: {argument} must be a dense tensor, got a nested one; pad it with "
            "torch.nested.to_padded_tensor and pass mask"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: {argument} must be a dense tensor, got layout {value.layout}; call .to_dense() first")
    if value.is_quantized:
        raise TypeError(f"{name}: {argument} must be a plain tensor, got a quantised one; call .dequantize() first")
    if floating and value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: {argument} must be float32, float64, bfloat16 or float16, got {value.dtype}; convert "
            "it with .float()"
        )


def check_dims(name: str, argument: str, value: Any, least: int, most: int, shape: str) -> int:
    """A floating tensor; returns how many dimensions it has."""
    check_tensor(name, argument, value, floating=True)
    if not least <= value.dim() <= most:
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(value.shape)}")
    return int(value.dim())


def check_device(name: str, argument: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(
            f"{name}: {argument} must be on the device of the tokens, {x.device}, got {value.device}; move "
            "it with .to()"
        )


def check_known(name: str, argument: str, value: Any) -> None:
    """Values that must be looked at, say for the shape of a result, are not those that `torch.vmap` maps over."""
    if not isinstance(value, Tensor):
        return
    if values.batched(value):
        raise TypeError(
            f"{name}: {argument} must not be mapped over by torch.vmap, its values are needed; call {name} on all at "
            "once"
        )
    check_not_meta(name, argument, value)


def check_not_meta(name: str, argument: str, value: Tensor) -> None:
    if value.is_meta:
        raise TypeError(f"{name}: {argument} must hold values, got a tensor on the device meta")


def _check_shape(name: str, what: str, value: Tensor, label: str, expected: tuple[int, ...], batched: bool) -> Tensor:
    """label and expected: of a batch, say "(B, N)"; beside unbatched tokens both are without B. Returns it with B."""
    expected = expected if batched else expected[1:]
    if value.shape != expected:
        label = label if batched else label.replace("(B, ", "(").replace("(N)", "(N,)").replace("(K)", "(K,)")
        raise ValueError(f"{name}: {what} {label} = {tuple(expected)}, got {tuple(value.shape)}")
    return value if batched else value[None]


def _per_token(name: str, argument: str, value: Tensor, x3: Tensor, batched: bool) -> Tensor:
    checked = _check_shape(name, f"{argument} must have shape", value, "(B, N)", x3.shape[:2], batched)
    check_device(name, argument, value, x3)
    return checked


def _converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # asking torch first takes two microseconds


def check_mask(name: str, mask: Tensor | None, x3: Tensor, batched: bool) -> Tensor | None:
    if mask is None:
        return None
    check_tensor(name, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool (True = real token), got {mask.dtype}; write mask != 0")
    return _per_token(name, "mask", mask, x3, batched)


def check_weights(
    name: str, weights: Tensor | None, x3: Tensor, batched: bool, mask: Tensor | None = None
) -> Tensor | None:
    """(B, N) weights in acc, or None; mask: as in `values.of_real`."""
    if weights is None:
        return None
    check_tensor(name, "weights", weights)
    if weights.dtype.is_complex:
        raise TypeError(f"{name}: weights must be real, got {weights.dtype}")
    return check_negative(name, "weights", _per_token(name, "weights", weights, x3, batched), x3, mask)


def check_negative(name: str, argument: str, weights: Tensor, x3: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of the right shape and device in acc; of tokens that `mask` counts (`values.of_real`) none is below 0."""
    dtype = accumulate_dtype(x3.dtype)
    if weights.dtype == torch.float64 != dtype:
        values.check_fits(name, argument, weights, dtype, mask)
    weights = weights if weights.dtype == dtype else weights.to(dtype)
    if not values.any_negative(weights):
        return weights
    negative = values.of_real(weights.detach() < 0, mask)
    if values.visible(negative) and negative.any():
        image, token = negative.nonzero()[0].tolist()
        got = f"{weights.detach()[image, token].item():g} at image {image}, token {token}"
        raise ValueError(f"{name}: {argument} must be >= 0, got {got}; clamp them with .clamp(min=0)")
    return weights


def check_finite_tokens(name: str, x3: Tensor, weights: Tensor | None, mask: Tensor | None) -> None:
    for argument, value in (("x", x3), ("weights", weights), ("mask", mask)):
        check_known(name, f"{argument} beside check_finite", value)
    for argument, value in (("x", x3), ("weights", weights)):
        if value is None:
            continue
        bad = ~(torch.isfinite(value) if value.dim() == 2 else torch.isfinite(value).all(2))
        if mask is not None:
            bad &= mask
        if bad.any():
            image, token = bad.nonzero()[0].tolist()
            found = value.detach()[image, token].flatten()
            raise ValueError(
                f"{name}: {argument} must be finite, got {found[~found.isfinite()][0].item():g} at image {image}, "
                f"token {token} ({int(bad.sum())} tokens with NaN or infinity); mask them or pass check_finite=False"
            )


def check_assignment(name: str, assignment: Tensor, values: Tensor, batched: bool, same_length: bool = True) -> Tensor:
    check_tensor(name, "assignment", assignment)
    if assignment.dtype not in INTEGER:
        raise TypeError(f"{name}: assignment must hold integers, got {assignment.dtype}")
    if assignment.dim() != (2 if batched else 1):
        raise ValueError(
            f"{name}: assignment must have shape {'(B, N)' if batched else '(N,)'} beside"
            f" {'batched' if batched else 'unbatched'} tokens, got {tuple(assignment.shape)}"
        )
    assignment = assignment if batched else assignment[None]
    expected = values.shape[:2] if same_length else values.shape[:1]
    if assignment.shape[: len(expected)] != expected:
        raise ValueError(
            f"{name}: assignment must have shape {'(B, N) = ' if same_length else '(B, N) with B = '}{tuple(expected)},"
            f" got {tuple(assignment.shape)}"
        )
    check_device(name, "assignment", assignment, values)
    return _converted(assignment, torch.int64)


def check_labels(name: str, assignment: Tensor, num_clusters: int) -> None:
    """Labels beyond the clusters are an error where values may be looked at; elsewhere they count as -1."""
    values.check_range(name, "assignment must hold labels", assignment, -1, "K-1", num_clusters - 1)


def check_init(
    name: str,
    init: str | Tensor | None,
    x3: Tensor,
    k: int,
    mask: Tensor | None,
    counts: Tensor | None,
    batched: bool,
) -> str | Tensor:
    """The name of a strategy, (B, K) int64 token indices, or (B, K, D) centers in acc."""
    b, n, d = x3.shape
    init = "farthest" if init is None else init
    if isinstance(init, str):
        if init not in STRATEGIES:
            raise ValueError(
                f"{name}: init must be one of {', '.join(map(repr, STRATEGIES))} or a tensor, got {init!r}"
            )
        if init == "bipartite" and counts is None and mask is None and 2 * k < n:
            raise ValueError(
                f"{name}: init='bipartite' needs num_clusters >= N/2 = {n / 2:g}, got {k}; use another init"
            )
        if init == "bipartite" and (counts is not None or mask is not None) and values.visible(x3) and b:
            num_valid = torch.full((b,), n, device=x3.device) if mask is None else mask.sum(1)
            fewest = torch.full((b,), k, device=x3.device) if counts is None else counts
            lacking = 2 * fewest < num_valid
            if values.visible(lacking) and lacking.any():
                raise ValueError(
                    f"{name}: init='bipartite' needs num_clusters of at least half of every image's valid "
                    "tokens; use another init"
                )
        return init
    if not isinstance(init, Tensor):
        raise TypeError(f"{name}: init must be a string, a tensor or None, got {type(init).__name__}")
    check_tensor(name, "init", init)
    check_device(name, "init", init, x3)
    if init.dtype in INTEGER:
        init = _check_shape(name, "init must hold token indices of shape", init, "(B, K)", (b, k), batched)
        init = _converted(init, torch.int64)
        used = init  # of clusters that an image does not have, anything may be given: every backend clamps
        if counts is not None and values.visible(init):
            used = torch.where(torch.arange(k, device=init.device) < counts[:, None], init, 0)
        values.check_range(name, "init must hold token indices", used, 0, "N-1", n - 1)
        return init if mask is None or n == 0 else next_valid(mask).gather(1, init.clamp(0, n - 1))
    if init.dtype not in FLOATING:
        raise TypeError(f"{name}: init must hold token indices (integers) or centers (floating), got {init.dtype}")
    if name == "kmedoids":
        raise TypeError(
            f"{name}: init must be token indices (integers) or a strategy, got {init.dtype}; medoids are tokens"
        )
    init = _check_shape(name, "init must hold centers of shape", init, "(B, K, D)", (b, k, d), batched)
    return init.detach().to(accumulate_dtype(x3.dtype))


def check_centers(name: str, centers: Tensor, x3: Tensor, batched: bool) -> Tensor:
    """(B, K, D) centers in acc, for tokens x3."""
    label = "(B, K, D)" if batched else "(K, D)"
    check_dims(name, "centers", centers, x3.dim() - (not batched), x3.dim() - (not batched), label)
    b, _, d = x3.shape
    if centers.shape[-1] != d or (batched and centers.shape[0] != b):
        expected = f"(B, K, D) = ({b}, K, {d})" if batched else f"(K, D) = (K, {d})"
        raise ValueError(f"{name}: centers must have shape {expected} beside these tokens, got {tuple(centers.shape)}")
    if centers.shape[-2] < 1:
        raise ValueError(f"{name}: centers must hold at least one, got shape {tuple(centers.shape)}")
    check_device(name, "centers", centers, x3)
    return (centers if batched else centers[None]).detach().to(accumulate_dtype(x3.dtype))


def check_finite_centers(name: str, start: Tensor, counts: Tensor | None) -> None:
    used = start if counts is None else start[torch.arange(start.shape[1], device=start.device) < counts[:, None]]
    if not torch.isfinite(used).all():
        raise ValueError(
            f"{name}: init must hold finite centers, got NaN or infinity; pass check_finite=False to allow it"
        )


def check_positions(name: str, positions: Tensor | None) -> Tensor | None:
    """(n, P) coordinates, or None."""
    if positions is None:
        return None
    check_tensor(name, "positions", positions, floating=True)
    if positions.dim() != 2 or not positions.isfinite().all():
        raise ValueError(f"{name}: positions must be finite coordinates (n, P), got shape {tuple(positions.shape)}")
    return positions


def check_generator(name: str, generator: torch.Generator | None, x3: Tensor) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != x3.device.type:
        raise ValueError(
            f"{name}: generator must be on the device of the tokens, {x3.device}, got {generator.device};"
            f" make it with torch.Generator({str(x3.device)!r})"
        )


def check_attention(q: Tensor, k: Tensor, scale: float | None, lse: Tensor | None) -> tuple[float, Tensor | None]:
    """Check the arguments of `attention_received`; returns (scale, lse in acc)."""
    name = "attention_received"
    check_dims(name, "q", q, 4, 4, "(B, H, Nq, d)")
    check_dims(name, "k", k, 4, 4, "(B, H, N, d)")
    if k.dtype != q.dtype:
        raise TypeError(f"{name}: k must have the dtype of q, {q.dtype}, got {k.dtype}; convert one of them")
    check_device(name, "k", k, q)
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"{name}: k must have the batch, heads and width of q, got k {tuple(k.shape)} for q {tuple(q.shape)};"
            " repeat grouped key heads first"
        )
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)):
        raise TypeError(f"{name}: scale must be a number or None, got {type(scale).__name__}")
    elif not torch.compiler.is_compiling() and not (
        -LARGEST_FLOAT <= scale <= LARGEST_FLOAT if isinstance(scale, int) else abs(scale) < math.inf
    ):
        raise ValueError(f"{name}: scale must be a finite float, got {scale}")
    if lse is not None:
        check_tensor(name, "lse", lse)
        _check_shape(name, "lse must have shape", lse, "(B, H, Nq)", q.shape[:3], True)
        if lse.dtype not in FLOATING:
            raise TypeError(f"{name}: lse must be floating, got {lse.dtype}")
        check_device(name, "lse", lse, q)
        lse = lse.detach().to(accumulate_dtype(q.dtype))
    return float(scale), lse
