"""What goes on inside the blocks of a DINOv2 of transformers: queries, keys, values, and the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenpool_ext.demo.pretrained import HEADS, blocks_of

from . import data


class Layer(NamedTuple):
    """One block's tensors for B images, P = 1 + N tokens (the class token first), H heads of d features."""

    q: Tensor  # (B, H, P, d)
    k: Tensor
    v: Tensor
    before: Tensor  # (B, P, D) the residual stream that enters
    middle: Tensor  # (B, P, D) after attention is added
    after: Tensor  # (B, P, D) the block's output

    def attention(self) -> Tensor:
        """(B, H, P, P) softmax(q k^T / sqrt(d))."""
        return (self.q @ self.k.transpose(2, 3) * self.q.shape[3] ** -0.5).softmax(3)


@torch.no_grad()
def layers(model, pixels: Tensor, batch: int = 8) -> list[Layer]:
    """Every block's `Layer` for (B, 3, 224, 224) pixels."""
    seen: list[list[list[Tensor]]] = []
    hooks = []
    for block in blocks_of(model):
        rows: list[list[Tensor]] = [[] for _ in Layer._fields]
        seen.append(rows)
        projections = (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
        for row, module in zip(rows, projections):
            hooks.append(module.register_forward_hook(lambda _, args, out, row=row: row.append(heads(out))))
        hooks.append(block.register_forward_pre_hook(lambda _, args, row=rows[3]: row.append(args[0])))
        hooks.append(block.norm2.register_forward_pre_hook(lambda _, args, row=rows[4]: row.append(args[0])))
        hooks.append(block.register_forward_hook(lambda _, args, out, row=rows[5]: row.append(out)))
    try:
        for part in data.batches(len(pixels), batch):
            model(pixels[part])
    finally:
        for hook in hooks:
            hook.remove()
    return [Layer(*(torch.cat(row) for row in rows)) for rows in seen]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def relative_errors(x: Tensor, centers: Tensor, weightings) -> list[Tensor]:
    """(B,) sum_i w_i min_j |x_i - c_j|^2 over sum_i w_i |x_i - mean|^2 for each w, (B, N) or None, of `weightings`.

    x (B, N, D), centers (B, K, D). 1 means no better than one token for all.
    """
    shift = x.mean(1, keepdim=True)
    x, centers = x - shift, centers - shift
    squares = x.square().sum(2)
    nearest = torch.baddbmm(centers.square().sum(2)[:, None], x, centers.transpose(1, 2), alpha=-2).amin(2) + squares
    found = []
    for w in weightings:
        w = torch.ones_like(squares) if w is None else w
        mean = (w[:, None] @ x)[:, 0] / w.sum(1, keepdim=True)
        spread = (w * squares).sum(1) - w.sum(1) * mean.square().sum(1)
        found.append((w * nearest.clamp(min=0)).sum(1) / spread)
    return found
