"""A block is proven, not recognised: permute its tokens and side inputs, and its output must permute alike.

That is what lets a block run on other tokens than those it was made for. What does not commute (windows, token order,
positions made inside from the number of tokens, several frames in one batch) is refused by name. The probe runs the
very code that later runs on pooled tokens; it draws no random numbers that the user sees, and runs none of the user's
hooks.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import finding, halves, inputs, pooled
from .inputs import Form
from .reducing import Setup
from .tap import Tap
from .trial import apart, as_call, entering, inputs_of, noise, pooled_free, quiet, sums_outside, trials, wide

HARMLESS = re.compile(r"mask|output_|return_|causal|drop|kwargs|args|cache|layer_idx|need_weights|layer_head")
CACHE = re.compile("past|cache")
KEEPS = "it keeps keys and values of every token for those to come (a cache), which pooled tokens are not"


def probe(blocks: finding.BlockList, touched: list[int], setup: Setup, example: Any) -> dict:
    """Fill ``setup.form``; returns ``{block index: halves.Parts or None}``.

    Raises:
        TypeError, ValueError: a block is not supported; class and reason are named.
    """
    first = blocks.blocks[touched[0]]
    parts: dict[int, halves.Parts | None] = {}
    parameter = next(first.parameters(), None)
    if parameter is not None and parameter.device.type == "meta":
        setup.form = Form()
        return {i: halves.find(blocks.blocks[i]) if setup.position == "attention" else None for i in touched}
    if any(getattr(getattr(m, "config", 0), "_attn_implementation", 0) == "flex_attention" for m in blocks.owners):
        raise unsupported(first, inputs.FLEX)
    kinds: dict[Any, tuple[Form, halves.Parts | None]] = {}
    calls = calls_of(blocks, touched, setup, example)
    for i in touched:
        block = blocks.blocks[i]
        key = kind(block)
        if key not in kinds:
            args, kwargs = calls[i]
            refuse(block, args, kwargs)
            with quiet(block):
                with wide(block, args, kwargs) as (a, kw):
                    form = prove(block, a, kw, setup)
                kinds[key] = form, split(block, args, kwargs, form) if setup.position == "attention" else None
        form, parts[i] = kinds[key]
        before = form if setup.form is None else setup.form
        rest: dict[str, Any] = dict(attends=True, axes={}, products=())
        if form._replace(**rest) != before._replace(**rest):
            raise TypeError(f"patch: block {i} ({name(block)}) takes its tokens in another way than the blocks before")
        axes = {k: (*sorted({*before.axes.get(k, ()), *form.axes.get(k, ())}),) for k in {**before.axes, **form.axes}}
        products = form.products if form.products == before.products else ()
        setup.form = form._replace(attends=before.attends and form.attends, axes=axes, products=products)
    if sums_outside(blocks, example):
        raise unsupported(first, "its residual sum is outside of it (x + block(x)), where no token is pooled")
    return parts


def name(block: nn.Module) -> str:
    return type(block).__name__


def kind(block: nn.Module) -> Any:
    """What must be equal for two blocks to compute the same up to their weights."""
    found = []
    for path, m in block.named_modules():
        if path.split(".")[0] == pooled.SUBMODULE:
            continue
        values = ((k, repr(v)) for k, v in m.__dict__.items() if isinstance(v, (int, float, str, tuple, bool)))
        plain = sorted(pair for pair in values if pair[0] not in ("layer_idx", "training"))
        found.append((path, inputs.base_class(type(m)), *plain))
    return tuple(found)


def calls_of(
    blocks: finding.BlockList, touched: list[int], setup: Setup, example: Any
) -> dict[int, tuple[tuple, dict]]:
    """{block index: (args, kwargs)} with which the touched blocks are called: alone, or in a forward of the model."""
    first = blocks.blocks[touched[0]]
    text = any(finding.is_text(owner) for owner in blocks.owners[:2])  # whose order may come from outside
    sides = list(inspect.signature(inputs.base_class(type(first)).forward).parameters.values())[2:]
    width = finding.block_width(first)
    if example is None and not text and width and all(HARMLESS.search(p.name) for p in sides):  # tokens, masks
        x = noise(2, setup.num_protected + 11, width, like=next(first.parameters()))
        needed = (p.name for p in sides if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
        missing = dict.fromkeys(needed)
        with quiet(first), contextlib.suppress(Exception):
            out = first_of(pooled_free(first)(x, **missing))
            if isinstance(out, Tensor) and out.shape == x.shape:
                return dict.fromkeys(touched, ((x,), missing))
    return captured(blocks, touched, example)


def captured(blocks: finding.BlockList, touched: list[int], example: Any) -> dict[int, tuple[tuple, dict]]:
    """What the touched blocks get in a forward of the model on the example, or on inputs that it seems to take."""
    model: Any = blocks.owners[-1] if blocks.owners else None
    kinds: dict[Any, int] = {}
    first = {i: kinds.setdefault(kind(blocks.blocks[i]), i) for i in touched}  # of its kind, which stands for it
    reasons: list[str] = []
    for owner, call in trials(blocks, example):
        seen, error = entering([blocks.blocks[i] for i in kinds.values()], owner, call)
        if error is None and len(seen) == len(kinds):
            return {i: seen[blocks.blocks[first[i]]] for i in touched}
        if error is not None and example is not None:
            raise ValueError(f"patch: the model does not run on the example given: {error}") from error
        reasons += [] if error is None else [f"{type(error).__name__}: {error}".splitlines()[0][:120]]
    raise TypeError(
        f"patch: {name(blocks.blocks[0])} of {type(model).__name__} could not be tried: it does not run on tokens"
        " alone, and no input was found on which the model runs; give one with example=..."
        f" ({(reasons or ['no inputs'])[0]})"
    )


def inputs_for(blocks: finding.BlockList, example: Any) -> tuple[tuple, dict]:
    """Inputs on which the whole model runs: the example, or the first made-up ones that do."""
    model = blocks.owners[-1]
    if example is not None:
        return as_call(example)
    for args, kwargs in inputs_of(model):
        with quiet(model), contextlib.suppress(Exception):
            model(*args, **kwargs)
            return args, kwargs
    raise TypeError(f"patch: no input was found on which {name(model)} runs; give one with example=...")


def refuse(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """What is told by what comes in alone."""
    try:
        at, x = inputs.find_tokens(args, kwargs)
    except TypeError:
        raise unsupported(block, "none of its arguments is a tensor of tokens (B, N, D)") from None
    if x.dim() >= 4:
        raise TypeError(
            f"patch: {name(block)} takes its tokens as a feature map {tuple(x.shape)}, not as a sequence (B, N, D);"
            " pooled tokens fill no map, so this block is not supported"
        )
    sides = inputs.named(block, args, kwargs, at)
    if any(CACHE.search(side) and not isinstance(value, Tensor) for _, side, value in sides):
        raise unsupported(block, KEEPS)


def prove(block: nn.Module, args: tuple, kwargs: dict, setup: Setup) -> Form:
    """The form in which the block commutes with permutations of its tokens."""
    at, x = inputs.find_tokens(args, kwargs)
    own = pooled_free(block)
    try:
        out = apart(block, args, kwargs)
        y = first_of(out)
    except Exception as error:
        raise TypeError(f"patch: {name(block)} does not run by itself ({type(error).__name__}: {error})") from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise unsupported(block, "its output is not one token for each that came in")
    others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not x and v.dim() == 3]
    more = [v for v in out[1:] if isinstance(v, Tensor)] if isinstance(out, (tuple, list)) else []
    if any(v.shape == w.shape and v is not w for v in more for w in others):
        raise unsupported(block, "it works on two sequences of tokens at once")
    layout = layout_of(block, args, kwargs, at, x, y)
    tokens, result = inputs.batch_first(x, layout), inputs.batch_first(y, layout)
    b, n = tokens.shape[:2]
    p = setup.prefix if 0 < setup.prefix < n else 0
    sides = inputs.named(block, args, kwargs, at)
    flat = [(name, t) for _, name, v in sides for t in tree_leaves(v)]
    shared = frozenset(  # told by the shape, which the batch of a later forward may have by chance
        name
        for name, t in flat
        if isinstance(t, Tensor) and t.dim() > 1 and {n, n - p} & set(t.shape[1:]) and t.shape[0] not in (b, 1)
    )
    axes = axes_of(flat, {n, n - p})
    ends = inputs.packed_ends(sides, n) if layout == "packed" else []
    # Prefix tokens stay in front and packed sequences where they are, in use too.
    group = torch.bucketize(torch.arange(n, device="cpu"), torch.tensor(sorted([p, *ends]), device="cpu"), right=True)
    order = torch.stack([shuffled(group, 7 + i) for i in range(b)]).to(x.device)
    some, moved = order[:, : n - 2], shuffled(group[: n - 2], 3).to(x.device)
    fewer = not ends and n - p >= 5
    size = (result - tokens).float().abs().amax().clamp(min=1e-30)
    limit = {torch.float64: 3e-5, torch.float32: 2e-3}.get(x.dtype, 5e-2)  # a convolution may do little at first

    def run(x: Tensor, index: Tensor, form: Form) -> tuple[Tensor, Tap]:
        """Output (B, K, D) and tap of the tokens ``index`` (B, K)."""
        k = index.shape[1]
        inner = None if form.square and k == n else index  # else biases made inside would be cut twice
        tap = Tap(b, k, None, inner, n, note=True, packed=layout == "packed", heads_first=form.heads_first)
        a, kw, _ = inputs.follow_all(sides, replace(setup, prefix=p, form=form), args, kwargs, n, index)
        a, kw = inputs.put(a, kw, at, inputs.as_given(inputs.take(x, index), layout))
        with tap:
            return inputs.batch_first(first_of(own(*a, **kw)), layout), tap

    def alike(one: Tensor, two: Tensor) -> bool:
        return one.shape == two.shape and float((one - two).float().abs().amax() / size) <= limit

    reason = "its output does not follow its tokens when they are permuted, so it depends on their order or place"
    proven: Form | None = None
    for first, heads, square, folded in itertools.product((False, True), (True, False), (True, False), (False, True)):
        form, what = Form(layout, heads, square, folded, heads_first=first, shared=shared, axes=axes), "permuted"
        try:
            got, tap = run(tokens, order, form)
            if not alike(got, inputs.take(result, order)):
                continue
            fitting = tap.fitting
            if fewer:  # a bias made inside for as many tokens as come would not follow
                what = "fewer"
                got, less = run(tokens, some[:, moved], form)
                if not alike(run(tokens, some, form)[0][:, moved], got):
                    continue
                fitting = tuple(a and b for a, b in zip(fitting, less.fitting))
        except Exception as error:
            if not first or what == "fewer":
                reason = f"it does not run on {what} tokens ({type(error).__name__}: {error})".splitlines()[0]
            continue
        if tap.causal and any(CACHE.search(v) for v in inputs.parameter_names(type(block))):
            raise unsupported(block, KEEPS)
        form = form._replace(attends=tap.seen > 0, products=() if layout == "packed" else fitting)
        if b == 1 or by_images(partial(run, index=order, form=form), tokens, tap):
            proven = form
            break
        proven = proven or form._replace(attends=False)
    if proven is None:
        reason += ". Windowed and grid-bound attention cannot take pooled tokens"
        with contextlib.suppress(Exception):
            one = order[:1].expand(b, n)
            if alike(run(tokens, one, Form("packed"))[0], inputs.take(result, one)):
                reason = "it takes one table of places (a rotary one, say) for all images, whose pooled tokens differ"
        raise unsupported(block, reason)
    for side, t in flat if fewer else ():  # another sequence may be as long by chance
        if isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == n != t.shape[2]:
            whole = proven._replace(axes={**proven.axes, (side, 3): ()})
            with contextlib.suppress(Exception):
                if alike(run(tokens, some, whole)[0][:, moved], run(tokens, some[:, moved], whole)[0]):
                    proven = whole
    return proven


def axes_of(flat: list[tuple[str, Any]], lengths: set[int]) -> dict[tuple[str, int], tuple[int, ...]]:
    """{(name, dimensions): those as long as the tokens} of the tensors that came in beside them."""
    axes: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, t in flat:
        if isinstance(t, Tensor):
            found = {i for i, length in enumerate(t.shape) if length in lengths}
            axes[name, t.dim()] = tuple(sorted(found.union(axes.get((name, t.dim()), ()))))
    return axes


def unsupported(block: nn.Module, reason: str) -> TypeError:
    return TypeError(f"patch: {name(block)} is not supported: {reason}")


def shuffled(group: Tensor, seed: int) -> Tensor:
    """A random order of the tokens, ``group`` (N,) by group; the first group stays as it is."""
    order = torch.randperm(len(group), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    order = order[group[order].argsort(stable=True)]
    return torch.where(group == 0, torch.arange(len(group), device="cpu"), order)


def by_images(run: Callable[[Tensor], tuple[Tensor, Tap]], tokens: Tensor, tap: Tap) -> bool:
    """Whether the scores of the first image, which ``tap`` has after ``run`` of the tokens, are of its own tokens."""
    moved = torch.cat([tokens[:1], tokens[1:].flip(2) + 1])
    try:
        own, beside = tap.scores(), run(moved)[1].scores()
    except RuntimeError:  # shapes that do not fit
        return False
    return own is None or beside is None or torch.allclose(own[:1], beside[:1], rtol=1e-2, atol=1e-6)


def first_of(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


def layout_of(block: nn.Module, args: tuple, kwargs: dict, at, x: Tensor, y: Tensor) -> str:
    """Which dimension holds the tokens: the one along which they see each other."""
    if x.dim() == 2:
        return "packed"

    def alone(dim: int) -> bool:
        """Whether the first along ``dim`` leaves the others as they are."""
        moved = x.clone()
        moved.select(dim, 0).copy_(x.select(dim, 0).flip(-1) + 1)
        a, k = inputs.put(args, kwargs, at, moved)
        other = first_of(pooled_free(block)(*a, **k))
        one, two = (t.narrow(dim, 1, t.shape[dim] - 1) for t in (other, y))
        return bool((one - two).abs().amax() <= 1e-4 * (y - x).abs().amax())

    if x.shape[0] == 1 or alone(0):
        return "batch first"
    if x.shape[1] > 1 and alone(1):
        return "tokens first"
    raise unsupported(block, "it mixes the images (or frames) of a batch")


def split(block: nn.Module, args: tuple, kwargs: dict, form: Form) -> halves.Parts:
    """The block's halves, which give what its forward gives."""
    parts = halves.find(block) if form.layout == "batch first" else None
    why = "its parts are not those of a pre-norm block with attention and MLP"
    if parts is not None:
        at, x = inputs.find_tokens(args, kwargs)
        own = apart(block, args, kwargs)
        y = first_of(own)
        try:
            ours, _ = halves.run(block, parts, contextlib.nullcontext(), lambda tokens: tokens, x, args, kwargs, at)
            if ours.shape == y.shape and bool((ours - y).abs().amax() <= 1e-3 * (y - x).abs().amax()):
                return parts._replace(returns_tuple=isinstance(own, tuple))
            why = "its forward computes something else than x + attention, x + MLP with the parts found by name"
        except Exception as error:
            why = f"its parts do not take what it gets ({type(error).__name__})"
    raise ValueError(f"patch: {name(block)} cannot pool between attention and MLP: {why}; use position='block'")
