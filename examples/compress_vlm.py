"""Fewer visual tokens in front of a language model: LLaVA, Qwen2.5-VL, SmolVLM, PaliGemma.

    python examples/compress_vlm.py --keep 0.25

The models are tiny and random (no download): what is shown is the mechanism, and that with --keep 1 nothing changes.
`prefill` is all that a real model needs: the vision encoder's embeddings are compressed, the placeholders that the
processor has expanded are dropped to the same counts, and the model gets both. Batches and several images a prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers

import tokenpool_ext as tp
from tokenpool_ext.visual import drop_placeholders


@torch.no_grad()
def prefill(model, inputs: dict, keep: float | None = None):
    """Run `model` on a processor's `inputs` with a share `keep` of every image's tokens; None: as it is.

    Prompts of a batch must come out equally long (equal images), or be run one at a time.
    """
    core, ids = model.model, inputs["input_ids"]
    visual = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw", "pixel_attention_mask")}
    images = core.get_image_features(**visual, return_dict=True)
    features = images.pooler_output  # (images, n, D), or a list of (n, D), in the order of the placeholders
    stacked = isinstance(features, torch.Tensor)
    flat = features.flatten(0, -2) if stacked else torch.cat(list(features))
    positions = rope_positions(core, inputs)
    extra = {} if positions is None else {"position_ids": positions}
    if keep is not None:
        placeholder = model.config.image_token_id
        image = ids == placeholder
        before = torch.nn.functional.pad(image, (1, 0))[:, :-1]
        starts = (image & ~before).sum(1).tolist()  # images of each prompt
        ends = (~image & before).nonzero()[:, 1] - (image & ~before).nonzero()[:, 1]  # each is followed by text
        lengths = ends.tolist()
        features = list(flat.split(lengths))
        counts = [max(1, round(keep * n)) for n in lengths]
        if positions is None:
            merged = tp.compress(features, counts)
        else:  # M-RoPE: each merged token takes the cell of the token nearest to it
            cells = torch.cat([p.T[m] for p, m in zip(positions.transpose(0, 1), image)]).split(lengths)
            merged = tp.compress(features, counts, positions=list(cells), position_of="medoid")
        shorter = [drop_placeholders(row, placeholder, part) for row, part in zip(ids, split(counts, starts))]
        ids = torch.stack([row for row, _ in shorter])
        if positions is not None:
            kept = torch.stack([mask for _, mask in shorter])
            positions = torch.stack([p[:, m] for p, m in zip(positions.transpose(0, 1), kept)], 1)
            moved = torch.cat(merged.positions).round().to(positions.dtype)
            positions[:, ids == placeholder] = moved.T
            extra["position_ids"] = positions
        rows = torch.cat(merged.tokens)
        images.pooler_output = rows.unflatten(0, (len(images.pooler_output), -1)) if stacked else merged.tokens
    return model(input_ids=ids, mm_encoder_outputs={"image": images}, use_cache=True, **extra)


def split(values: list, lengths: list[int]) -> list[list]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [values[end - n : end] for n, end in zip(lengths, ends)]


def rope_positions(core, inputs) -> torch.Tensor | None:
    """(3, B, L) positions of the full prompt where the model has M-RoPE."""
    if not hasattr(core, "get_rope_index"):
        return None
    types = (inputs["input_ids"] == core.config.image_token_id).int()
    return core.get_rope_index(inputs["input_ids"], types, inputs["image_grid_thw"])[0]


# ---- tiny random models and prompts: two prompts a batch -------------------------------------------------------------

TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "vocab_size": 200, "head_dim": 32}
SIGHT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = 150


def prompts(*runs: int) -> torch.Tensor:
    """(2, L): text with one run of placeholders an image."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 140, (2, 8), generator=generator)
    parts = [text]
    for run in runs:
        parts += [torch.full((2, run), IMAGE), text[:, :2]]
    return torch.cat([*parts, text], 1)


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIGHT, image_size=168, patch_size=7),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config), {
        "input_ids": prompts(576),
        "pixel_values": torch.randn(2, 3, 168, 168),
    }


def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"patch_size": 7, "window_size": 28, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**text, "rope_parameters": rope},
        image_token_id=IMAGE,
        vision_start_token_id=151,
        video_token_id=152,
    )
    grids = torch.tensor([[1, 32, 24], [1, 24, 32], [1, 32, 24], [1, 24, 32]])  # two images a prompt
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 7 * 7)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), {
        "input_ids": prompts(192, 192),
        "pixel_values": pixels,
        "image_grid_thw": grids,
    }


def smolvlm():
    config = transformers.SmolVLMConfig(
        vision_config={**SIGHT, "image_size": 224, "patch_size": 7},
        text_config=transformers.LlamaConfig(**TEXT, pad_token_id=0),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config), {
        "input_ids": prompts(256, 256, 256),
        "pixel_values": torch.randn(2, 3, 3, 224, 224),
    }


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGHT, "model_type": "siglip_vision_model", "image_size": 224, "patch_size": 7},
        text_config={**TEXT, "model_type": "gemma"},
        projection_dim=128,
        image_token_id=IMAGE,
    )
    ids = prompts(1024)
    return transformers.PaliGemmaForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 224, 224),
    }


MODELS = {"LLaVA": llava, "Qwen2.5-VL": qwen2_5_vl, "SmolVLM": smolvlm, "PaliGemma": paligemma}


def build(name: str):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def cache_bytes(cache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = []
    for name in options.models.split(","):
        model, inputs = build(name)
        times: dict = {None: [], options.keep: []}
        outs: dict = {}
        for _ in range(options.rounds):
            for keep, seconds in times.items():
                start = time.process_time()
                outs[keep] = prefill(model, inputs, keep)
                seconds.append(time.process_time() - start)
        row = {"model": name}
        for word, keep in (("full", None), ("kept", options.keep)):
            row[f"{word}_tokens"] = outs[keep].logits.shape[1]
            row[f"{word}_cache_kb"] = cache_bytes(outs[keep].past_key_values) // 1024
            row[f"{word}_cpu_ms"] = round(median(times[keep]) * 1e3, 1)
        row["faster"] = round(median(a / b for a, b in zip(times[None], times[options.keep])), 2)
        rows.append(row)
        print(row, flush=True)
    if options.json:
        facts = {"keep": options.keep, "batch": 2, "torch": torch.__version__, "transformers": transformers.__version__}
        facts |= {"command": " ".join(sys.argv), "records": rows}
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
