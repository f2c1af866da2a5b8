"""Put token pooling into a transformer somebody else wrote, in one line, and take it out again.

    >>> import tokenpool_ext
    >>> tokenpool_ext.patch(model, num_tokens={3: 128, 7: 64})      # 128 patch tokens after block 3, 64 after block 7
    >>> with tokenpool_ext.vit.record(model) as r:                  # which pooled token stands for which image patch
    ...     output = model(images)
    >>> tokenpool_ext.unpatch(model)                                # bit-equal to the model before

The blocks are found by structure and proven by permuting their tokens (``finding.py``, ``probing.py``); their own
``forward`` runs on fewer tokens (``pooled.py``), watched by a tap on the attention product (``tap.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .learn import learn_schedule
from .patching import Support, apply_patch, patched_blocks, remove_patch, support_of
from .recording import Record, record, tokens_per_layer
from .search import search_schedule

__all__ = [
    "Record",
    "learn_schedule",
    "patch",
    "patched_blocks",
    "record",
    "search_schedule",
    "supported",
    "tokens_per_layer",
    "unpatch",
]


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
        num_prefix_tokens: tokens in front that are never pooled. Default: read from the model. A forward with no more
            tokens than that raises ``ValueError``.
        protect: indices of other tokens that are never pooled; negative ones count from the end.
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
    return apply_patch(
        model,
        blocks=blocks,
        budget=budget,
        schedule={"num_tokens": num_tokens, "keep_ratio": keep_ratio, "r": r, "layers": layers},
        pooling=pooling,
        position=position,
        outside=outside,
        cluster_on=cluster_on,
        track_size=track_size,
        num_prefix_tokens=num_prefix_tokens,
        protect=protect,
        positions=positions,
        example=example,
        pooling_options=pooling_options,
    )


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
    given = {name: value for name, value in bound.arguments.items() if name != "model"}
    schedule = {name: given.pop(name) for name in ("num_tokens", "keep_ratio", "r", "layers")}
    return support_of(model, {**given, "schedule": schedule})


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`, in place: every block gets back its class's own ``forward``, bit-equal to before.

    A model that is not patched is returned unchanged. Returns ``model``.
    """
    return remove_patch(model)
