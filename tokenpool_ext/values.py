"""Looking at the values of tensors on the CPU, for validation and simple starts: whether it is allowed, and how it is
quick.

An op of torch takes five to ten microseconds to start; the extension (csrc/values.h) looks at memory in one. No value
is looked at where ops are recorded without values, nor on another device, where it would synchronise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import loader

_Modes = torch._C._TorchDispatchModeKey
_VALUELESS_MODES = (_Modes.FAKE, _Modes.PROXY, _Modes.FUNCTIONAL)


def recorded() -> bool:
    """Are ops recorded without their values (torch.compile, export, make_fx, fake tensors)?"""
    return (
        torch.compiler.is_compiling()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        and any(torch._C._get_dispatch_mode(key) is not None for key in _VALUELESS_MODES)
    )


def visible(t: Tensor) -> bool:
    """May ops of torch look at the values?"""
    return t.is_cpu and type(t).__name__ != "FakeTensor" and not recorded() and not batched(t)


def batched(t: Tensor) -> bool:
    """Does `torch.vmap` stand for many tensors with this one?"""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    while torch._C._are_functorch_transforms_active() and wrapped(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def plain(t: Tensor) -> bool:
    """May the extension look at this tensor's memory, or write that of one made beside it? Only where no op is
    recorded or replaced, and what is in memory is the tensor's value."""
    return (
        not torch.compiler.is_compiling()
        and t.is_cpu
        and type(t) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not torch._is_functional_tensor(t)
        and not t._is_zerotensor()
        and not t.is_neg()
    )


def any_negative(t: Tensor) -> bool:
    """Is a value of a float32 or float64 tensor seen to be below 0?"""
    if loader.extension is not None and t.is_contiguous() and plain(t):
        return loader.extension.any_negative(t.data_ptr(), t.numel(), t.element_size())
    return visible(t) and bool((t < 0).any())


def extremes(t: Tensor) -> tuple[int, int]:
    """The least and the largest value of a visible int64 tensor that is not empty."""
    if loader.extension is not None and t.is_contiguous() and plain(t):
        return loader.extension.extremes(t.data_ptr(), t.numel())
    low, high = t.aminmax()
    return int(low), int(high)


def of_real(flags: Tensor, mask: Tensor | None) -> Tensor:
    """Those (B, N) flags whose tokens count: a bool mask is True for them, integer labels are not -1."""
    return flags if mask is None else flags & (mask if mask.dtype == torch.bool else mask >= 0)


def check_fits(name: str, argument: str, weights: Tensor, dtype: torch.dtype, mask: Tensor | None) -> None:
    """Whether the largest of each image's finite weights is a normal number in `dtype`, so that ratios are kept."""
    if not visible(weights) or not weights.numel():
        return
    largest = torch.where(of_real(weights.isfinite(), mask), weights.detach(), 0).amax(1)
    limits = torch.finfo(dtype)
    lost = (largest > limits.max) | (largest > 0) & (largest < limits.tiny)
    if lost.any():
        raise ValueError(
            f"{name}: {argument} must be numbers of {dtype}, as which they are taken beside these tokens, from"
            f" {limits.tiny:g} to {limits.max:g} at the largest of an image, got {float(largest[lost][0]):g}; scale"
            " them, only ratios matter"
        )


def check_range(name: str, what: str, value: Tensor, least: int, label: str, most: int) -> None:
    if visible(value) and value.numel():
        low, high = extremes(value)
        if low < least or high > most:
            raise ValueError(f"{name}: {what} from {least} to {label} = {most}, got values from {low} to {high}")
