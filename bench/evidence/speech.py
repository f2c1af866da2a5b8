"""``python -m bench.evidence speech``: word errors of Whisper tiny.en, pooled after blocks 0 and 1 of its encoder's 4.

Weights: ``whisper.py``, run in float32. Speech: Debian's ``flite`` reads sentences of Debian's package descriptions
whose words are all in ``/usr/share/dict/words`` (``apt install flite wamerican``; ``bench.retrieval_quality`` says how
to get the descriptions). Dense clips hold 26 to 29 s of sentences, padded ones 5 to 8 s and then silence up to the 30 s
that Whisper wants. "trimmed" cuts a batch of padded ones, which are in order of length, at its longest; that
4 s of silence must be left was seen on six clips of other sentences (none, 0.5, 1 and 2 s left repetitions).

The decoder gets the pooled tokens themselves (``outside="short"``), decodes greedily without timestamps and stops after
``LIMIT`` tokens. Words are compared in lower case, letters only. The strength of the time coordinate is chosen on six
other dense clips and then fixed. Results are kept in bench/.cache, a file a batch and variant, and an interrupted run
goes on where it stopped; ``--report`` makes the record from the batches that are whole.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
import time
import wave
from pathlib import Path

import numpy as np
import torch

from tokenpool_ext import patch

from .. import retrieval_quality
from . import data
from .images import shared_copy
from .whisper import load, transcribe, trimmed

VOICES = ("slt", "rms", "awb")
RATE, FRAMES, STRIDE = 16_000, 1500, 320  # Hz; tokens of 30 s; samples a token
SECONDS = {"dense": (26, 29), "padded": (5, 8), "calibration": (26, 29)}
LIMIT = {"dense": 128, "padded": 64, "calibration": 128}
TOKENS, BATCH = (750, 375, 250), 12
WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
METHODS: dict[str, dict] = {
    "WK-Means": {},
    "K-Means": {"weighted": False},
    "WK-Medoids": {"pooling": "kmedoids"},
    "bipartite (ToMe)": {"pooling": "bipartite"},
    "grid": {"pooling": "grid", "grid_size": (1, FRAMES)},
    "random": {"pooling": "random", "seed": 0},
    "score pruning": {"pooling": "score"},
    "WK-Means, outside full": {"outside": "full"},
}
# measured on the first batch of dense clips alone, to save time: what fails goes on until the limit, or is told already
FEW = {(name, k) for name in ("random", "score pruning") for k in TOKENS[1:]} | {("WK-Means, outside full", 750)}
PLACES = "WK-Means, position_weight"
TRIMMED = {"trimmed silence": 0, "trimmed, 4 s of silence left": 200}  # tokens of silence left
ALL = ("all tokens", FRAMES, 0.0)  # as a variant


# ---- speech and words ------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower().replace("'", ""))


def edits(said: list[str], heard: list[str]) -> int:
    """Least insertions, deletions and substitutions of words (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def sentences(path: str) -> list[str]:
    """Plain English ones of 6 to 16 words, no two that begin with the same three words."""
    known = {w for w in Path("/usr/share/dict/words").read_text().split() if w.islower() and w.isalpha()}
    found = {}
    for *_, text in retrieval_quality.descriptions(path, 100_000, seed=0, skip=0):
        for sentence in re.findall(r"(?<=[.] )[A-Z][a-z, ]+[.](?= |$)", text):
            said = words(sentence)
            if 6 <= len(said) <= 16 and known.issuperset(said):
                found.setdefault(tuple(said[:3]), sentence)
    return list(found.values())


def speak(text: str, voice: str) -> np.ndarray:
    """float32 samples at 16 kHz."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", file.name], check=True)
        with wave.open(file.name) as sound:
            assert sound.getframerate() == RATE
            return np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768


def clips(path: str, counts: dict[str, int]) -> dict[str, list[dict]]:
    """Kind -> {"text", "samples" float32} of each clip; no sentence is in two. Padded ones in order of length."""

    def make():
        left, found = iter(sentences(path)), {}
        for kind, (low, high) in sorted(SECONDS.items()):
            found[kind] = []
            while len(found[kind]) < counts[kind]:
                voice = VOICES[len(found[kind]) % len(VOICES)]
                texts, sounds, length = [], [], 0.0
                while length < low:
                    sentence = next(left)
                    sound = speak(sentence, voice)
                    if length + len(sound) / RATE <= high:
                        texts, sounds = [*texts, sentence], [*sounds, sound]
                        length += len(sound) / RATE
                samples = torch.from_numpy(np.concatenate(sounds))
                found[kind].append({"text": " ".join(texts), "samples": samples})
        found["padded"].sort(key=lambda clip: len(clip["samples"]))
        return found

    lines = data.digest(Path(path).read_bytes())
    return data.cached("-".join(["speech-clips", lines, *map(str, counts.values())]), make)


# ---- the study -------------------------------------------------------------------------------------------------------


def encoder_for(encoder, method: str, tokens: int, strength: float, frames: int):
    """A copy of the encoder, sharing its weights, that pools to ``tokens`` in two steps of one ratio."""
    if method in TRIMMED:
        return trimmed(encoder, frames)
    if method == ALL[0]:
        return encoder
    options = METHODS.get(method, {"position_weight": strength, "positions": torch.arange(float(FRAMES))[:, None]})
    first = round((FRAMES * tokens) ** 0.5)
    return patch(shared_copy(encoder), num_tokens={0: first, 1: tokens}, **{"outside": "short", **options})


def measure(whisper, encoder, mel: torch.Tensor, texts: list[str], limit: int) -> dict:
    """Errors of each clip, and CPU ms a clip of encoder and decoder."""
    model, tokenizer, suppressed = whisper
    with torch.inference_mode():
        start = time.process_time()
        hidden = encoder(mel).last_hidden_state
        middle = time.process_time()
        ids = transcribe(model, hidden, limit, suppressed)
        end = time.process_time()
    heard = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)
    errors = [edits(words(said), words(text)) for said, text in zip(texts, heard)]
    ms = {"encoder": (middle - start) / len(mel) * 1e3, "decoder": (end - middle) / len(mel) * 1e3}
    return {"errors": errors, "words": [len(words(text)) for text in texts], "tokens": hidden.shape[1], **ms}


def variants(kind: str, strength: float) -> list[tuple[str, int, float]]:
    """(method, tokens, strength of the time coordinate)."""
    if kind == "calibration":
        return [(PLACES, k, w) for w in WEIGHTS for k in TOKENS[1:]]
    rows = [(name, k, 0.0) for name in METHODS for k in TOKENS] + [(PLACES, k, strength) for k in TOKENS]
    return [ALL, *rows, *((name, 0, 0.0) for name in TRIMMED if kind == "padded")]


def run(whisper, kind: str, spoken: list[dict], strength: float, say) -> dict[tuple[str, int, float], list[dict]]:
    """Variant -> its result of every batch, in an order that rotates; ``say`` None: of the batches at hand."""
    from transformers import WhisperFeatureExtractor

    found: dict = {}
    for n, part in enumerate(data.batches(len(spoken), BATCH)):
        batch = spoken[part]
        rows = [row for row in variants(kind, strength) if kind != "dense" or n == 0 or row[:2] not in FEW]
        texts = data.digest("\n".join(clip["text"] for clip in batch))
        files = {row: re.sub(r"[^\w.]+", "-", f"speech-{kind}-{texts}-{row[0]}-{row[1]}-{row[2]:g}") for row in rows}
        if say is None and not all((data.CACHE / f"{file}.pt").is_file() for file in files.values()):
            continue
        sounds = [clip["samples"].numpy() for clip in batch]
        mel = WhisperFeatureExtractor()(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        longest = -(-max(map(len, sounds)) // STRIDE)
        turn = n * len(rows) // 4 % len(rows)
        for row in rows[turn:] + rows[:turn]:

            def make(row=row, batch=batch, mel=mel, longest=longest):
                frames = min(longest + TRIMMED.get(row[0], FRAMES), FRAMES)
                encoder = encoder_for(whisper[0].model.encoder, *row, frames)
                return measure(whisper, encoder, mel[:, :, : 2 * frames], [c["text"] for c in batch], LIMIT[kind])

            result = data.cached(files[row], make)
            found.setdefault(row, []).append(result)
            if say:
                say(f"{files[row]}: {sum(result['errors'])} errors of {sum(result['words'])} words")
    return {row: found[row] for row in variants(kind, strength) if row in found}


def records(kind: str, found: dict[tuple[str, int, float], list[dict]]) -> list[dict]:
    """A row a variant: word error rate, and the paired differences from all tokens, grid and WK-Means."""

    def errors(row):
        return torch.tensor([e for batch in found[row] for e in batch["errors"]], dtype=torch.float64)

    rows = []
    for row, batches in found.items():
        method, tokens, strength = row
        count = torch.tensor([w for batch in batches for w in batch["words"]], dtype=torch.float64)
        made = {"kind": kind, "method": method, "strength": strength}
        made["tokens"] = tokens or statistics.median(b["tokens"] for b in batches)
        made |= {
            "clips": len(count),
            "words": int(count.sum()),
            "wer": round((errors(row).sum() / count.sum()).item(), 4),
        }
        for name, other in (("all", ALL), ("grid", ("grid", tokens, 0.0)), ("wkmeans", ("WK-Means", tokens, 0.0))):
            if other in found and other != row:
                difference = (errors(row) - errors(other)[: len(count)]) / count.mean()
                made |= data.difference(f"minus_{name}", difference)
        for name in ("encoder", "decoder"):
            made[f"{name}_ms"] = round(statistics.median(b[name] for b in batches), 1)
        rows.append(made)
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence speech", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--descriptions", required=True, help="Debian's file Translation-en")
    parser.add_argument("--dense", type=int, default=60)
    parser.add_argument("--padded", type=int, default=48)
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: make the record of the batches that are whole"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    whisper = load()
    spoken = clips(args.descriptions, {"calibration": 6, "dense": args.dense, "padded": args.padded})
    say = None if args.report else (lambda line: print(line, flush=True))
    tried = run(whisper, "calibration", spoken["calibration"], 0.0, say)
    total = {w: sum(sum(b["errors"]) for row in tried if row[2] == w for b in tried[row]) for w in WEIGHTS}
    chosen = min(total, key=total.get)
    rows = [row for kind in ("padded", "dense") for row in records(kind, run(whisper, kind, spoken[kind], chosen, say))]
    about = {"seed": 0, "position_weight": chosen, "limit": LIMIT, "batch": BATCH}
    print(data.save("speech", about, {"calibration": records("calibration", tried), "records": rows}))
    return 0
