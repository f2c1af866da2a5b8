"""``learn_schedule``: how many tokens to keep after which block, by the configuration search of PoWER-BERT.

Goyal et al., arXiv 2001.08950, section 3.3, which Token Pooling took its counts from: no token is removed yet, but
each has a retention that is learned for its rank by significance; an L1 penalty, growing with depth, draws them to
zero; what is left of them in sum is the number of tokens to keep. There the retention multiplies the token. Before a
LayerNorm that is next to invisible until it is zero, so here it multiplies the token's weight in all later attention
(as a size does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import LARGEST_FLOAT, check_float, check_int
from ..reduction import TokenReduction, _identity
from . import trial
from .calibration import calibration, compared, feature_of
from .patching import patch, patched_blocks, unpatch
from .search import check_batches, features_of

__all__ = ["learn_schedule"]

NAME = "learn_schedule"
LEAST = 1e-3  # of a retention: its logarithm is added in attention; at 0 it would have no gradient and stay there


def own(output: Any, whole: Any) -> Tensor:
    return 1 - F.cosine_similarity(compared(NAME, output), whole).mean()


class SoftExtract(TokenReduction):
    """All tokens; their sizes times the retention of their rank by significance, the most significant first."""

    needs_scores = True
    retention: Tensor | None = None  # (n,) in [LEAST, 1]; ones from the first forward on

    def tokens_kept(self, num_patches: int) -> int:
        """Fewer than come, so that a patched block calls it."""
        return num_patches - 1

    def forward(
        self,
        x: Tensor,
        scores: Tensor | None = None,
        *,
        features: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Any, ...]:
        p = self.num_prefix_tokens
        n = x.shape[1] - p
        if scores is None or sizes is None:
            raise TypeError(f"{NAME}: the blocks show no attention product (or track_size=False), which it works on")
        if self.retention is None:
            self.retention = torch.ones(n, device=x.device, requires_grad=True)
        if len(self.retention) != n:
            raise ValueError(f"{NAME}: batches must have one number of tokens, got {sorted((len(self.retention), n))}")
        scores = scores[:, p:] if mask is None else scores[:, p:].masked_fill(~mask[:, p:], -1)
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        sizes = torch.cat([sizes[:, :p], sizes[:, p:] * self.retention[ranks]], dim=1)
        return x, _identity(x[:, p:], None, None if mask is None else mask[:, p:]), sizes


def learn_schedule(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    penalty: float,
    steps: int,
    loss: Callable[[Any, Any], Tensor] | None = None,
    lr: float = 0.01,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> dict[int, int]:
    """Learn how many tokens to keep after which block, for :func:`tokenpool_ext.patch`. The model is left as it was.

        >>> found = tokenpool_ext.learn_schedule(model, batches, penalty=1e-4, steps=200)
        >>> tokenpool_ext.patch(model, num_tokens=found)

    Only the retentions are learned (by Adam, clipped to [0, 1], from 1); the model's parameters stay. PoWER-BERT trains
    both; to do as it does, fine-tune the patched model afterwards.

    Args:
        model: any model that ``patch`` takes, not patched, whose attention is seen (``supported(model)`` says). It runs
            in eval mode, without autocast and hooks. A head should read tokens that are not pooled (a class token):
            of others it sees them all.
        batches: inputs of the model, each a tensor, a tuple or list, or a mapping of keywords, all with the same number
            of tokens; taken in turns.
        penalty: times the sum over the blocks of (block index + 1) times the sum of the retentions, added to the loss.
            More of it keeps fewer tokens. PoWER-BERT's: 1e-4 to 7e-3, of a task's loss; of the default loss less: a
            DINOv2 ViT-S/14 with 64 tokens comes to 79% of the MACs at 6e-5 and to 49% at 3.4e-4
            (bench/results/evidence-schedules.json). Its sum is over blocks and tokens, so longer sequences need less.
        steps: updates, a batch each.
        loss: a scalar of what the model returns and the batch. Default: 1 - cosine to what the unpooled model gives, as
            in ``search_schedule``; it needs no labels.
        lr: of the retentions.
        layers: block indices (from 0, or negative) that pool. Default: all but the last, behind which no attention is.
        **options: of ``patch``, such as ``position=``, but no ``pooling=``.

    Returns:
        ``{block index: tokens kept}``, counts falling: the sums of the retentions, rounded up, at least 1 and none
        above the one before. One block that keeps all where nothing was drawn down.

    Raises:
        TypeError: as ``patch``; blocks that show no attention product.
        ValueError: as ``patch``; a patched model; no batches, or of different numbers of tokens, or that the model does
            not run on or makes NaN of; a negative penalty.
    """
    steps = check_int(NAME, "steps", steps, 1)
    for name, value in (("penalty", penalty), ("lr", lr)):
        check_float(NAME, name, value, 0, LARGEST_FLOAT, "finite and at least 0")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{NAME} needs gradients; call it outside torch.inference_mode")
    given = calibration(NAME, model, batches, layers, options)
    check_batches(NAME, given)
    blocks, places, batches, calls = given
    if layers is None and len(blocks) > 1:
        places = places[:-1]
    try:
        whole: list[Any] = features_of(NAME, model, given, feature_of) if loss is None else calls
        patch(model, keep_ratio=1.0, layers=places, pooling=SoftExtract, **{"example": batches[0], **options})
        with trial.quiet(model):
            pools: dict[int, Any] = patched_blocks(model)
            optimizer: Any = None
            each = zip(range(len(batches)), batches, calls, whole)
            for at, batch, (args, kwargs), reference in islice(cycle(each), steps):
                with torch.enable_grad():
                    output = model(*args, **kwargs)
                    retentions = [module.retention for module in pools.values()]
                    optimizer = optimizer or torch.optim.Adam(retentions, lr=lr)
                    lost = own(output, reference) if loss is None else loss(output, batch)
                    if not lost.isfinite().all():
                        raise ValueError(f"{NAME}: batches[{at}] must give a finite loss, got {lost.item()}")
                    drawn: Any = sum((i + 1) * module.retention.sum() for i, module in pools.items())
                    gradients = torch.autograd.grad(lost + penalty * drawn, retentions)
                for retention, gradient in zip(retentions, gradients):
                    retention.grad = gradient
                with torch.device("cpu"):  # where Adam counts its steps; torch 2.11 takes the default device
                    optimizer.step()
                for retention in retentions:
                    retention.clamp_(LEAST, 1)
        sums = {i: ((module.retention - LEAST).sum() / (1 - LEAST)).item() for i, module in pools.items()}
        n = len(pools[places[0]].retention)
    finally:
        unpatch(model)
    counts, left = {}, n
    for i, kept in sums.items():
        count = max(1, math.ceil(kept - 1e-3))
        if count < left:
            counts[i] = left = count
    return counts or {places[-1]: n}
