"""Real tokens, for benchmarks and tests: DINOv2 on crops of real photos, after one of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..functional import attention_received
from .photos import load_photos, random_crops, to_pixels
from .pretrained import HEADS, WHEEL_SHA256, Say, blocks_of, cache_dir, load_dinov2_small, save_atomically


def _query_key(block: Any) -> tuple[torch.nn.Module, ...]:
    """The Linear modules that make q and k in a block of transformers 5, 4 or timm."""
    attention = getattr(block, "attention", None)
    if attention is None:
        return (block.attn.qkv,)
    attention = attention if hasattr(attention, "q_proj") else attention.attention
    return (attention.q_proj, attention.k_proj) if hasattr(attention, "q_proj") else (attention.query, attention.key)


def _received(outputs: list[torch.Tensor], heads: int) -> torch.Tensor:
    """(B, N) attention received, from the outputs of `_query_key`."""
    q, k = outputs if len(outputs) == 2 else outputs[0].chunk(3, dim=-1)[:2]
    return attention_received(*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k)))


@torch.no_grad()
def tokens_of(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    layer: int,
    *,
    heads: int = HEADS,
    batch: int = 16,
    say: Say | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens after block ``layer`` (counted from 1) and the attention each received in that block.

    ``pixels`` (B, 3, H, W) -> tokens (B, N, D), scores (B, N); CLS is dropped from both, N = (H/14)(W/14).
    """
    blocks = blocks_of(model)
    if not 1 <= layer <= len(blocks):
        raise ValueError(f"layer: expected 1 to {len(blocks)} (tokens after that block), got {layer}")
    seen, qk = [], []
    block = blocks[layer - 1]

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep)]
    hooks += [m.register_forward_hook(lambda module, args, output: qk.append(output)) for m in _query_key(block)]
    tokens, scores = [], []
    try:
        for start in range(0, len(pixels), batch):
            seen.clear()
            qk.clear()
            model(pixels[start : start + batch])
            tokens.append(seen[0][:, 1:].clone())
            scores.append(_received(qk, heads)[:, 1:].clone())
            if say:
                say(f"tokens after block {layer}: {min(start + batch, len(pixels))} of {len(pixels)} images")
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(tokens), torch.cat(scores)


def real_tokens(
    num_images: int = 64,
    layer: int = 6,
    *,
    with_scores: bool = False,
    seed: int = 0,
    image_size: int = 224,
    checkpoint: str | Path | None = None,
    say: Say | None = None,
):
    """Real tokens: DINOv2 ViT-S/14 on crops of real photos, after block ``layer`` (1 to 12). For benchmarks and tests.

    Returns tokens ``(num_images, 256, 384)`` float32 without CLS (256 = (image_size / 14)^2), or with
    ``with_scores=True`` the pair ``(tokens, scores)``: scores ``(num_images, 256)``, the attention received in that
    block averaged over heads and all queries. The same arguments give the same tokens; results are kept on disk in
    `cache_dir` (25 MB for 64 images), keyed by every argument.
    """
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    path = cache_dir() / f"tokens-{WHEEL_SHA256[:8]}-b{num_images}-l{layer}-s{seed}-p{image_size}.pt"
    if checkpoint is None and path.is_file():
        stored = torch.load(path, map_location="cpu", weights_only=True)
    else:
        images, _ = random_crops(load_photos(), num_images, size=image_size, seed=seed)
        model = load_dinov2_small("transformers", checkpoint, image_size=image_size, say=say)
        tokens, scores = tokens_of(model, to_pixels(images), layer, say=say)
        stored = {"tokens": tokens, "scores": scores}
        if checkpoint is None:
            save_atomically(stored, path)
    return (stored["tokens"], stored["scores"]) if with_scores else stored["tokens"]
