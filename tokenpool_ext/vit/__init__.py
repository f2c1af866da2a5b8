"""Put token pooling into a Vision Transformer somebody else wrote, in one line, and take it out again.

    >>> import tokenpool_ext
    >>> tokenpool_ext.patch(model, num_tokens={3: 128, 7: 64})      # 128 patch tokens after block 3, 64 after block 7
    >>> with tokenpool_ext.vit.record(model) as r:                  # which pooled token stands for which image patch
    ...     output = model(images)
    >>> tokenpool_ext.unpatch(model)                                # bit-equal to the model before

Known families: Hugging Face ViT, DeiT, DINOv2 and DINOv2 with registers (``hf.py``); timm's ``VisionTransformer``:
ViT, DeiT (distilled too), DINOv2 with and without registers (``timm.py``). They are recognised by their structure,
never by a version number, and every block is checked numerically before it is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .flops import Cost, ViTSpec, cost, gmacs, tokens_per_layer
from .patching import apply_patch, patched_blocks, remove_patch
from .recording import Record, record

__all__ = [
    "Cost",
    "Record",
    "ViTSpec",
    "cost",
    "gmacs",
    "patch",
    "patched_blocks",
    "record",
    "tokens_per_layer",
    "unpatch",
]


def patch(
    model: nn.Module,
    *,
    num_tokens: Mapping[int, int | float] | Iterable[int] | None = None,
    keep_ratio: float | None = None,
    layers: Iterable[int] | None = None,
    pooling: str | Callable[..., nn.Module] = "kmeans",
    position: str = "attention",
    cluster_on: str | None = None,
    track_size: bool = False,
    num_prefix_tokens: int | None = None,
    **pooling_options: Any,
) -> nn.Module:
    """Make chosen blocks of a Vision Transformer pool their tokens. Changes ``model`` in place and returns it.

    Only the block *instances* named by the schedule get a new ``forward`` and a parameter-free submodule
    ``tokenpool`` (visible in ``print(model)``; it adds nothing to ``state_dict``). Classes stay as they are, nothing
    is kept on the model between forwards, and patching again replaces the earlier patch. The user's hooks stay and do
    not run while patching.

    A patched model compiles and exports (``torch.compile``, ``torch.export``); ``torch.jit.trace`` is refused. Compile
    after patching: a compiled model is patched too, but compiles anew. What needs a token for every place of a feature
    map
    (features_only and Hugging Face backbones, masked image modelling, timm's ``forward_intermediates`` in its default
    format NCHW) is refused; :func:`record` tells the assignments with which ``tokenpool_ext.unpool`` fills the map.

    Args:
        model: a Hugging Face or timm Vision Transformer, with or without a classification head.
        num_tokens: how many *patch* tokens (class, distillation and register tokens not counted, they pass through)
            are left after each pooling block. Either ``{block index: count}``, counts being an int, or a float in
            (0, 1] that is a ratio of the tokens entering the pooling; or one int per block (a list, an array), the
            paper's ``K = [K_1 .. K_L]``.  See ``tokenpool_ext.vit.schedule`` for helpers.
        keep_ratio: instead of ``num_tokens``: the ratio kept at each pooling block (nearest count, halves down, at
            least 1).
        layers: with ``keep_ratio``: the block indices (from 0) that pool. Default: the blocks at 1/4, 1/2 and 3/4 of
            the depth, so 3, 6 and 9 of 12 (the schedule of "Which Tokens to Use?", arXiv 2308.04657).
        pooling: ``"kmeans"`` (default), ``"kmedoids"``, or a baseline: ``"prune"`` (PoWER-BERT), ``"importance"``,
            ``"random"``, ``"grid"``, ``"bipartite"`` (ToMe); or a callable
            ``f(num_tokens=..., keep_ratio=..., num_prefix_tokens=..., **pooling_options) -> nn.Module`` whose module
            has ``TokenPooling``'s ``forward``. It is told to be given no scores by an attribute
            ``needs_scores = False``.
        position: ``"attention"`` pools between attention and MLP (PoWER-BERT's and ToMe's place: the MLP of the same
            block already gets cheaper); ``"block"`` after the whole block (Token Pooling, Fig. 1a).
        cluster_on: ``"tokens"`` clusters what is pooled; ``"keys"`` clusters the attention keys averaged over heads
            and pools the tokens (ToMe, Table 1). Default: tokens, but keys for ``"bipartite"``, as published.
        track_size: count how many image patches each token stands for and use ``softmax(q k^T * scale + log size)``
            from the first pooling on (ToMe's proportional attention), as a key-only bias ``(B, 1, 1, N)`` that fused
            attention accepts (not FlashAttention-2's own kernel, which takes no bias).
        num_prefix_tokens: tokens in front that are never pooled. Default: read from the model. A forward with no more
            tokens than that raises ``ValueError``.
        **pooling_options: for the pooling module, e.g. ``weighted=True``, ``num_iters=5``, ``init=None``,
            ``emit=None``, ``sort=True``, ``backend=None`` of ``TokenPooling``. Unknown names raise.

    Cost: when the pooling needs significance scores or keys, they are taken from the block's own query and key
    projections while its attention runs, so nothing is projected twice and fused attention stays; the score itself is
    one pass of ``functional.attention_received`` (``N^2 M`` multiply-adds twice, no ``N x N`` memory). Scores and
    clustering carry no gradient to the projections; pooled tokens do. A block asked for at least as many tokens as
    it has computes exactly what it did before (bit-equal).

    Raises:
        TypeError: ``model`` is not a Vision Transformer of a known family, or arranges tokens in feature maps (the
        class
            is named); a schedule of something else than numbers; an unknown keyword.
        ValueError: a schedule that is empty, outside the depth, increasing or given twice; an unknown name; a block
            whose own forward does not match what the adapter would compute (the class is named).
    """
    return apply_patch(
        model,
        num_tokens=num_tokens,
        keep_ratio=keep_ratio,
        layers=layers,
        pooling=pooling,
        position=position,
        cluster_on=cluster_on,
        track_size=track_size,
        num_prefix_tokens=num_prefix_tokens,
        pooling_options=pooling_options,
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`, in place: every block gets back its class's own ``forward``, bit-equal to before.

    A model that is not patched is returned unchanged. Returns ``model``.
    """
    return remove_patch(model)
