"""Multiply-accumulates (MACs) of one forward of any model, whole or pooled, by component.

The forward is run once and its operators are counted: ``torch.utils.flop_counter`` knows most matrix products,
convolutions and fused attention; PRODUCTS has the others (with vectors, fused recurrent layers); three formulas add
this package's own operators, with N tokens of D features, K kept, T iterations:

- K-Means: ``N^2 D`` (the Gram matrix, after which iterations only add) or ``T N K D`` (all distances in every
  iteration), whichever is less; a farthest-first start adds ``N K D`` to the latter.
- K-Medoids: ``N^2 D``.
- attention received: ``N^2 D`` over all heads for the sum and as much for the normaliser, when none is given.

Norms, softmax, activations, means and sorting are left out, as in the literature, whose "GFLOPs" of transformers are
1e9 MACs (Marin et al., arXiv 2110.03860, section 3; DeiT-S: 4.6).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .ops import is_farthest
from .reduction import TokenReduction

__all__ = ["Cost", "cost", "gmacs"]


@dataclass(frozen=True)
class Cost:
    """MACs of one forward, by component; ``gmacs`` is their sum in units of 1e9.

    projections: queries, keys, values and the output of attention. attention: the two products of softmax attention.
    mlp: every other fully connected layer (or convolution) of the blocks. embedding, head: what comes before and after.
    scores: significance of tokens. clustering: what pooling layers do.
    """

    embedding: int = 0
    projections: int = 0
    attention: int = 0
    mlp: int = 0
    scores: int = 0
    clustering: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def gmacs(self) -> float:
        return self.total / 1e9

    @property
    def fully_connected(self) -> int:
        """Projections and MLP: what the paper puts above 80% of the total."""
        return self.projections + self.mlp

    def __str__(self) -> str:
        return table({"": self})


def table(costs: dict[str, Cost]) -> str:
    """Components downwards, models across: GMACs and share of that model's total."""
    names = [field.name for field in fields(Cost) if any(getattr(c, field.name) for c in costs.values())]
    lines = [f"{'GMACs':16}" + "".join(f"{name:>22}" for name in costs)]
    for name in [*names, "total", "fully_connected"]:
        values = ((getattr(c, name), max(c.total, 1)) for c in costs.values())
        lines.append(f"{name:16}" + "".join(f"{v / 1e9:>13.3f} {100 * v / t:>6.1f} %" for v, t in values))
    return "\n".join(lines)


def gmacs(model: nn.Module, *inputs: Any, **keywords: Any) -> float:
    """Giga multiply-accumulates of one forward; arguments as :func:`cost`. DeiT-S at 224 pixels: 4.6."""
    return cost(model, *inputs, **keywords).gmacs


def cost(model: nn.Module, *inputs: Any, **keywords: Any) -> Cost:
    """MACs of ``model(*inputs, **keywords)``, by component.

    The forward is run, without gradients and in eval mode (modes are restored): any model whose operators PyTorch sees,
    patched by ``tokenpool_ext.patch`` or holding ``TokenPooling`` layers. On the meta device it costs nothing; what is
    patched there is not proven to suit pooling. Compiled models: count before compiling.
    On the ``reference`` backend this package's operators are products like any other: what runs in pooling layers is
    counted as clustering, but scores count as attention.

    Args:
        model: any module.
        inputs, keywords: of its forward. None at all: :func:`example_input`, one image or sequence of the model's own
            size.

    Returns:
        :class:`Cost`. The total is exact up to what the module's docstring leaves out. The split is read off who called
        whom: products of two activations are attention; fully connected layers inside a module of which the class is
        named attention, or called by the module that computes attention itself, are projections; others that share a
        module with one attention (not with all) are MLP.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"cost: model must be an nn.Module, got {type(model).__name__}")
    return _by_component(counted(model, inputs, keywords))


def counted(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> list[_Event]:
    """Every operator of one forward that has MACs, in eval mode and without gradients; modes are restored."""
    if not inputs and not keywords:
        keywords = example_input(model)
        inputs = (keywords.pop(IMAGE),) if IMAGE in keywords else ()
    training = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator for a whole nn.TransformerEncoderLayer
    try:
        model.eval()
        counter = _Counter()
        with torch.no_grad(), counter.watching():
            model(*inputs, **keywords)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in training:
            module.training = mode
    return counter.events


IMAGE = ""  # the name under which `example_input` gives what is positional


def example_input(model: nn.Module) -> dict[str, Tensor]:
    """Keywords of a forward with one input of the model's own size; an image stands under IMAGE (positional).

    Raises:
        ValueError: the model does not tell its size.
    """
    parameter = next(model.parameters(), torch.empty(0, device="cpu"))
    device, dtype = parameter.device, parameter.dtype
    config = getattr(model, "config", None)
    sides: tuple[Any, ...] = (
        getattr(config, "image_size", None),
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
    )
    side = next((side for side in sides if side is not None), None)
    if side is not None:
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(config, "num_channels", None) or getattr(model, "in_chans", None) or 3
        return {IMAGE: torch.zeros(1, channels, height, width, device=device, dtype=dtype)}
    if config is not None and hasattr(config, "vocab_size") and hasattr(config, "max_position_embeddings"):
        length = min(config.max_position_embeddings, 512)
        return {"input_ids": torch.zeros(1, length, dtype=torch.int64, device=device)}
    raise ValueError(
        f"{type(model).__name__} does not tell the size of its input; give one after the model, such as"
        " torch.zeros(1, 3, 224, 224)"
    )


# --------------------------------------------------------------------------------------------------------- counting


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count  # which imports Triton

    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _clustering(arguments: dict[str, Any]) -> int:
    b, n, d = arguments["x"].shape
    k, start = arguments["num_clusters"], arguments["init"]
    passes = arguments["num_iters"] + is_farthest(start)
    return int(b * d * n * min(n, passes * k))


def _medoids(arguments: dict[str, Any]) -> int:
    b, n, d = arguments["x"].shape
    return int(b * n * n * d)


def _received(arguments: dict[str, Any]) -> int:
    b, h, queries, d = arguments["q"].shape
    passes = 2 if arguments["lse"] is None else 1
    return int(passes * b * h * queries * arguments["k"].shape[2] * d)


# operator of this package -> (component, MACs of its arguments by name)
OWN: dict[str, tuple[str, Callable[[dict[str, Any]], int]]] = {
    "tokenpool_ext::kmeans": ("clustering", _clustering),
    "tokenpool_ext::kmedoids": ("clustering", _medoids),
    "tokenpool_ext::attention_received": ("scores", _received),
}
_aten = torch.ops.aten
FUSED = {_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_fused_attention_overrideable}
LAYERS = {_aten.mm, _aten.addmm, _aten._scaled_mm}


def _recurrent(x: Tensor, *weights: Any) -> int:
    """Every matrix of weights times every input of every time step."""
    return x.numel() // max(x.shape[-1], 1) * sum(w.numel() for w in weights if isinstance(w, Tensor) and w.dim() == 2)


def _trilinear(*args: Any) -> int:
    """Of all products of three factors, each of which is spread over the dimensions it lacks."""
    shapes = []
    for factor, lacking in zip(args[:3], args[3:6]):
        for dim in sorted(lacking):
            factor = factor.unsqueeze(dim)
        shapes.append(factor.shape)
    return torch.Size(torch.broadcast_shapes(*shapes)).numel()


# operator -> MACs of its arguments, where ``torch.utils.flop_counter`` has no formula
PRODUCTS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, vector: matrix.numel(),
    _aten.addmv: lambda x, matrix, vector, **_: matrix.numel(),
    _aten.dot: lambda a, b: a.numel(),
    _aten.vdot: lambda a, b: a.numel(),
    _aten.addbmm: lambda x, a, b, **_: a.numel() * b.shape[2],
    _aten._trilinear: _trilinear,
    _aten.mkldnn_rnn_layer: lambda *args: _recurrent(*args[:3]),
    _aten._cudnn_rnn: lambda x, weights, *_: _recurrent(x, *weights),
}


@dataclass
class _Event:
    kind: str  # "layer" (weights), "attention" (two activations), or a component
    macs: int
    stack: tuple[nn.Module, ...]  # the modules that were running, outermost first


class _Counter(TorchDispatchMode):
    """Counts every operator that runs in it, beside the modules that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self.stack: list[nn.Module] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs inside. (``__enter__`` alone is also called for every operator that is taken apart.)"""
        hooks = [
            register_module_forward_pre_hook(lambda module, args: self.stack.append(module)),
            register_module_forward_hook(lambda module, args, output: self._leave(), always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry  # which imports Triton

        kwargs = kwargs or {}
        packet = func._overloadpacket
        name = func._schema.name
        if name in OWN:
            kind, macs_of = OWN[name]
            arguments = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
            self._count(kind, macs_of(arguments))
        elif packet in PRODUCTS:
            self._count("attention" if packet is _aten.addbmm else "layer", PRODUCTS[packet](*args, **kwargs))
        elif packet not in flop_registry and packet not in FUSED:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if packet in FUSED:
            self._count("attention", _sdpa(*args, **kwargs) // 2)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            weights = packet in LAYERS or "conv" in name
            self._count("layer" if weights else "attention", flops // 2)
        return out

    def _count(self, kind: str, macs: int) -> None:
        if any(isinstance(module, TokenReduction) for module in self.stack):
            kind = "clustering"
        self.events.append(_Event(kind, macs, tuple(self.stack)))


def _by_component(events: Iterable[_Event]) -> Cost:
    events = list(events)
    attentions = [at for at, event in enumerate(events) if event.kind == "attention"]
    host_of: dict[nn.Module, int] = {}  # module -> how many attention products ran in it
    for at in attentions:
        for module in set(events[at].stack):
            host_of[module] = host_of.get(module, 0) + 1
    direct = {events[at].stack[-1] for at in attentions if events[at].stack}
    first, last = (attentions[0], attentions[-1]) if attentions else (len(events), len(events))
    sums: dict[str, int] = {}
    shapes = set()  # classes on the stacks of MLP layers: the last block's are known by them
    for at, event in enumerate(events):
        kind = event.kind
        if kind == "layer":
            shape = tuple(type(module) for module in event.stack)
            kind = _layer(event, host_of, direct, len(attentions)) or ""
            if not kind:
                kind = "embedding" if at < first else "mlp" if at < last or shape in shapes else "head"
            if kind == "mlp":
                shapes.add(shape)
        sums[kind] = sums.get(kind, 0) + event.macs
    return Cost(**sums)


def _layer(event: _Event, host_of: dict[nn.Module, int], direct: set[nn.Module], attentions: int) -> str | None:
    """ "projections", "mlp", or None for a layer outside the blocks."""
    shared = [module for module in event.stack if module in host_of]
    if not shared:
        return None
    inner = shared[-1]
    if any("att" in type(module).__name__.lower() for module in event.stack if module is not event.stack[0]):
        return "projections"
    if inner in direct and event.stack.index(inner) >= len(event.stack) - 2:
        return "projections"
    outside = host_of[inner] == attentions and (attentions > 2 or inner is event.stack[0])
    return None if outside else "mlp"


# ------------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """``python -m tokenpool_ext cost``: whole and pooled, side by side."""
    from .models import build, whole_numbers

    parser = argparse.ArgumentParser(
        prog="python -m tokenpool_ext cost", description="MACs of one input by component, whole and pooled."
    )
    parser.add_argument(
        "--model", required=True, help="deit-s and others, FILE.py:FUNCTION, or the name of a timm model"
    )
    parser.add_argument("--keep", type=float, help="also pooled: the ratio of tokens kept at each pooling block")
    parser.add_argument(
        "--layers",
        type=whole_numbers,
        help="which blocks pool, such as 3,6,9 (default: at 1/4, 1/2 and 3/4 of the depth)",
    )
    parser.add_argument("--pooling", default="kmeans,kmedoids", help="methods as patch() names them, comma-separated")
    args = parser.parse_args(argv)
    if args.layers is not None and args.keep is None:
        parser.error("--layers needs --keep, the ratio of tokens kept there")
    try:
        costs = {"whole": cost(build(args.model, "meta" if args.keep is None else "cpu"))}
        if args.keep is not None:
            from .vit import patch

            model = build(args.model)
            for pooling in args.pooling.split(","):
                costs[pooling] = cost(patch(model, keep_ratio=args.keep, layers=args.layers, pooling=pooling))
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(costs))
    return 0
