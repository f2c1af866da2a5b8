"""Look at, and add to, the attention product of a block without knowing its attention module.

While :class:`Tap` is active, every call of ``F.scaled_dot_product_attention``, of a softmax over a square matrix and of
``F.multi_head_attention_forward`` on as many tokens as the block got passes through it. There it

* adds ``log size`` of every key to the logits (proportional attention, arXiv 2210.09461),
* takes the rows and columns of the tokens that are left out of a bias made inside the block,
* notes queries and keys, or probabilities, from which :meth:`Tap.scores` and :meth:`Tap.keys` are made.

Queries and keys are seen as they enter the product: projected by whatever module projects them, normalised, rotated.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..functional import received_by

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MATMUL = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
WATCHED = {F.scaled_dot_product_attention, F.multi_head_attention_forward, *SOFTMAX, *MATMUL}
MHA_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


class Tap(TorchFunctionMode):
    """Active for one call of one block.

    Args:
        batch, length: B and T of the tokens that enter the block.
        bias: (B, 1, 1, T) logarithms of how many tokens each stands for, or None.
        index: (B, T) the original token each stands for, or None; of ``original`` tokens.
        note: whether queries, keys or probabilities are wanted.
        packed: whether several sequences are in one, each with a product of its own.
        heads_first: whether the product has its heads before the images.
        own: of each product in turn, whether it is of the block's own tokens, also where others are as many.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        original: int = 0,
        note: bool = False,
        packed: bool = False,
        heads_first: bool = False,
        own: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self.batch, self.length, self.original = batch, length, original
        self.bias, self.index, self.note, self.packed = bias, index, note, packed
        self.heads_first, self.own = heads_first, own
        self.found: tuple | None = None  # of the last product: its keys, what makes scores, and of what
        self.factor: Tensor | None = None  # of the last square product: the keys, where no softmax is fused with it
        self.seen, self.causal = 0, False
        self.offset = 0  # packed tokens whose product was seen
        self.pieces: list[tuple[Tensor, Tensor]] = []  # their keys and scores
        self.fitting: tuple[bool, ...] = ()

    def _is_own(self, fits: bool) -> bool:
        """Whether the next product is of the block's tokens, which ``fits`` tells by its shape."""
        at, self.fitting = len(self.fitting), (*self.fitting, fits)
        return fits and (at >= len(self.own) or self.own[at])

    def _part(self, images: int) -> RuntimeError:
        return RuntimeError(
            f"patched block: its attention ran on {images} of {self.batch} images, so that nothing is known of the"
            " others' tokens; turn off a stochastic depth that leaves out images"
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in WATCHED:
            if func is Tensor.unflatten:  # dynamo cannot trace the method once a mode has seen it
                func = torch.unflatten
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._product(func, {**dict(zip(SDPA_NAMES, args)), **kwargs})
        if func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, {**dict(zip(MHA_NAMES, args)), **kwargs})
        out = func(*args, **kwargs)
        if self.note and out.shape[-2:] == (self.length, self.length) and len(args) > 1:
            self.factor = args[1].detach().transpose(-2, -1)
        return out

    def _product(self, func, given: dict[str, Any]) -> Tensor:
        q, k, mask = given["query"], given["key"], given.get("attn_mask")
        n, start, bias, index = q.shape[-2], 0, self.bias, self.index
        if not self._is_own(n == k.shape[-2] == self.length and q.dim() >= 3):
            start = self.offset  # or of one of the sequences packed into one, in their order
            fits = self.packed and mask is None and k.shape[-2] == n and q.dim() == 4 and q.shape[0] == 1
            if not fits or start + n > self.length:
                return func(**given)
            self.offset += n
            bias = None if bias is None else bias[..., start : self.offset]
            index = None if index is None else index[:, start : self.offset]
        images = (
            q.shape[1 if self.heads_first else 0] if q.dim() == 4 else q.shape[0] % max(self.batch, 1) or self.batch
        )
        if images != self.batch:
            raise self._part(images)
        shape, folded = q.shape, q.dim() == 3 or self.heads_first
        if folded:
            given.update({name: self._images(given[name]) for name in ("query", "key", "value")})
            q, k = given["query"], given["key"]
            if mask is not None and mask.dim() > 2 and mask.shape[0] == shape[0]:
                mask = given["attn_mask"] = self._images(mask)
        self.seen += 1
        if mask is not None and index is not None and mask.shape[-2:] == (self.original, self.original):
            mask = take_square(mask, index)  # a bias made inside the block: the rows and columns of those left
        if "is_causal" in given:
            given["is_causal"] = True if given["is_causal"] else False  # of symbolic lengths it is no bool yet
            self.causal = self.causal or given["is_causal"]
        if given.get("is_causal") and index is not None:  # no token sees what comes after the one it stands for
            mask, given["is_causal"] = (index[:, :, None] >= index[:, None, :])[:, None], False
        if bias is not None:
            mask = _added(mask, bias if q.dim() == 4 else bias.reshape(self.batch, *[1] * (q.dim() - 2), n), q.dtype)
        if mask is not given.get("attn_mask"):
            given["attn_mask"] = mask
        out = func(**given)
        if self.note:
            if given.get("is_causal"):
                mask = q.new_ones(1, 1, n, n, dtype=torch.bool).tril()
            if q.dim() > 4:  # groups of heads
                mask = None if mask is None else mask.expand(*q.shape[:-2], *mask.shape[-2:]).flatten(1, -3)
                q, k = q.flatten(1, -3), k.flatten(1, -3)
            q, k = q.detach(), k.detach().to(q.dtype)
            self.found = k, significance, q, k, given.get("scale"), mask
            if n < self.length:
                self.found = self._piece(*self.found)
        return self._as_given(out, (*shape[:-1], out.shape[-1])) if folded else out

    def _piece(self, keys: Tensor, score, *seen) -> tuple | None:
        """What was found once the last of the sequences packed into one was seen."""
        self.pieces.append((keys, score(*seen)))
        if self.offset < self.length:
            return None
        all_keys, scores = zip(*self.pieces)
        return torch.cat(all_keys, dim=2), lambda scores, valid: scores, torch.cat(scores, dim=1)

    def _images(self, x: Tensor) -> Tensor:
        """(B, H, T, .) of queries, keys or probabilities."""
        heads = -1 if self.batch else 1  # of no image they could not be told
        if self.heads_first:
            return (x.unflatten(0, (heads, self.batch)) if x.dim() == 3 else x).transpose(0, 1)
        if x.dim() == 4 and x.shape[0] == self.batch:
            return x
        return x.reshape(self.batch, heads, *x.shape[-2:])

    def _as_given(self, x: Tensor, shape) -> Tensor:
        """Back from :meth:`_images`."""
        return (x.transpose(0, 1) if self.heads_first else x).reshape(shape)

    def _softmax(self, func, args: tuple, kwargs: dict) -> Tensor:
        x: Any = args[0] if args else kwargs.pop("input" if "input" in kwargs else "self", None)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        square = isinstance(x, Tensor) and x.dim() >= 3 and x.shape[-1] == x.shape[-2] == self.length
        square = square and dim in (-1, x.dim() - 1)
        images = x.shape[1 if self.heads_first and x.dim() == 4 else 0] % max(self.batch, 1) if square else 0
        if not self._is_own(square and (not images or len(self.fitting) < len(self.own))):
            return func(x, *args[1:], **kwargs)
        if images:
            raise self._part(images)
        self.seen += 1
        if self.bias is not None:
            x = self._as_given(self._images(x) + self.bias.to(x.dtype), x.shape)
        out = func(x, *args[1:], **kwargs)
        if self.note:
            self.found = self.factor, received, self._images(out.detach())
        return out

    def _multi_head(self, func, given: dict[str, Any]):
        query, key = given["query"], given["key"]  # (T, B, E), or (T, E)
        if not self._is_own(query.shape[0] == key.shape[0] == self.length):
            return func(**given)
        if query.dim() == 3 and query.shape[1] != self.batch:
            raise self._part(query.shape[1])
        self.seen += 1
        heads = given["num_heads"]
        mask = given.get("attn_mask")
        if mask is not None and self.index is not None and mask.shape[-1] == self.original:
            mask = take_square(mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads)), self.index)
            given["attn_mask"] = mask = mask.flatten(0, 1) if mask.dim() == 4 else mask
        if mask is not None and mask.dim() == 3 and mask.shape[0] == self.batch:  # cut from (N, N)
            given["attn_mask"] = mask = mask.repeat_interleave(heads, 0)
        if self.index is not None and mask is not None:
            given["is_causal"] = False  # a hint that would put another mask in its place
        if self.bias is not None:
            bias = self.bias[:, 0, 0] if query.dim() == 3 else self.bias[0, 0, 0]
            given["key_padding_mask"] = _added(given.get("key_padding_mask"), bias, query.dtype, keep=False)
            if mask is not None and mask.dtype == torch.bool:
                given["attn_mask"] = _hiding(mask, query.dtype)
        out = func(**given)
        if self.note:
            q, k = _projected(given, query.detach(), key.detach())
            self.found = k, significance, q, k, None, _masks(given, q)
        return out

    def scores(self, valid: Tensor | None = None) -> Tensor | None:
        """(B, T) attention received by every token in the last product seen, from ``valid`` (B, T) queries.

        None when no product was seen.
        """
        if self.found is None:
            return None
        _, score, *seen = self.found
        return score(*seen, valid)

    def keys(self) -> Tensor | None:
        """(B, T, d) keys as they enter the product, averaged over heads; None when none was seen."""
        keys, score = (self.factor, received) if self.found is None else self.found[:2]
        if keys is not None and score is received:  # still as the block has them
            keys = self._images(keys)
        return None if keys is None else keys.mean(dim=1)


def received(probabilities: Tensor, valid: Tensor | None) -> Tensor:
    """(B, T) mean over heads and valid queries of (B, H, T, T)."""
    mean = probabilities.float().mean(dim=1)
    if valid is None:
        return mean.mean(dim=1)
    return torch.where(valid[:, :, None], mean, 0).sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1)


def significance(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None, valid: Tensor | None = None) -> Tensor:
    """(B, T) attention received under ``softmax(scale q.k + bias)``; a key's head may serve several queries'.

    A bias on keys alone is one more feature, so no N x N matrix is made; any other bias, or padding, makes one.
    """
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if bias is None and valid is None:
        # The usual scale by the width: a float attribute would become a symbol in dynamic compilation.
        usual = q.shape[3] ** -0.5
        return received_by(q, k, usual if scale is None or scale == usual else scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    bias = q.new_zeros(1, 1, 1, 1) if bias is None else bias
    if bias.dtype == torch.bool:
        bias = _hiding(~bias, torch.float32)
    b, h, n, _ = k.shape
    if bias.dim() == 4 and bias.shape[2] == 1 and valid is None:
        bias = bias.float().clamp(min=-1e4).transpose(2, 3).expand(b, h, n, 1)
        q = torch.cat([q.float() * scale, torch.ones_like(bias)], dim=3)
        return received_by(q, torch.cat([k.float(), bias], dim=3), 1.0)
    return received(((q.float() * scale) @ k.float().transpose(2, 3) + bias.float()).softmax(-1), valid)


def take_square(bias: Tensor, index: Tensor) -> Tensor:
    """Rows and columns ``index`` (B, K) of a bias (..., N, N): (B, ..., K, K)."""
    b, k = index.shape
    if bias.dim() == 2 or bias.dim() == 3 and bias.shape[0] != b:  # (N, N), (H, N, N)
        bias = bias[None]
    bias = bias.expand(b, *bias.shape[1:])
    index = index.reshape(b, *[1] * (bias.dim() - 3), k)
    rows = bias.gather(-2, index[..., None].expand(*bias.shape[:-2], k, bias.shape[-1]))
    return rows.gather(-1, index.unsqueeze(-2).expand(*bias.shape[:-2], k, k))


def _added(mask: Tensor | None, bias: Tensor, dtype: torch.dtype, keep: bool = True) -> Tensor:
    """The sum of an additive bias and a mask, which may be boolean (True: ``keep``) or additive."""
    bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask if keep else ~mask, bias, -torch.inf)
    return mask + bias


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: hidden) as one to add."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)


def _masks(given: dict[str, Any], q: Tensor) -> Tensor | None:
    """The sum of the masks of ``F.multi_head_attention_forward``, (B or 1, H or 1, T or 1, T); boolean ones hide."""
    masks = []
    b, h, n, _ = q.shape
    for name, shape in (("key_padding_mask", (b, 1, 1, n)), ("attn_mask", (-1, h, n, n))):
        mask = given.get(name)
        if mask is not None:
            mask = _hiding(mask, q.dtype) if mask.dtype == torch.bool else mask.detach()
            masks.append(mask[None, None] if mask.shape == shape[2:] else mask.reshape(shape))
    return torch.stack(torch.broadcast_tensors(*masks)).sum(0) if masks else None


def _projected(given: dict[str, Any], query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, d) queries and keys of ``F.multi_head_attention_forward``, whose product is out of sight."""
    bias = given.get("in_proj_bias")
    bias = (None, None) if bias is None else bias.detach().chunk(3)[:2]
    separate = given.get("use_separate_proj_weight")
    weights = (given["q_proj_weight"], given["k_proj_weight"]) if separate else given["in_proj_weight"].chunk(3)[:2]
    projected = []
    for x, weight, offset in zip((query, key), weights, bias):
        x = F.linear(x, weight.detach(), offset).unflatten(-1, (given["num_heads"], -1))  # (T, B, H, d)
        projected.append((x[:, None] if x.dim() == 3 else x).permute(1, 2, 0, 3))
    return projected[0], projected[1]
