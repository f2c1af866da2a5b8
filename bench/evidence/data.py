"""Images, labels and cached results of the studies: everything from packages, nothing from a model hub.

- Fashion-MNIST: Debian ``dataset-fashion-mnist`` (MIT), 28 x 28 grey, made three channels and resized.
- stamps: Debian ``tuxpaint-stamps-default`` (GPL-2), PNG on white; the label is the first two folders of the path.
- photographs: those of scikit-image and scikit-learn; ``HELD_OUT`` of them chose nothing in this package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tokenpool_ext.demo.photos import load_photos, random_crops, to_pixels

from .. import machine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "bench" / ".cache" / "evidence"
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"
FASHION = Path("/usr/share/datasets/fashion-mnist")
STAMPS = Path("/usr/share/tuxpaint/stamps")
HELD_OUT = ("brick", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon", "retina")
LEFT_OUT = ("symbols", "seasonal", "people", "cartoon", "toys")  # letters and drawings


def fashion(split: str) -> tuple[np.ndarray, torch.Tensor]:
    """("train" | "t10k") -> images (n, 28, 28) uint8, labels (n,) int64."""
    if not FASHION.is_dir():
        raise FileNotFoundError(f"{FASHION}: apt install dataset-fashion-mnist")
    images = gzip.decompress((FASHION / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pictures = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pictures, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def fashion_pixels(pictures: np.ndarray, size: int = 224) -> torch.Tensor:
    """(n, 28, 28) uint8 -> (n, 3, size, size) float32 as the model wants it."""
    from PIL import Image

    resized = (Image.fromarray(p).convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for p in pictures)
    return to_pixels(resized)


def stamps(least: int = 8, side: int = 40) -> tuple[list[Path], torch.Tensor, list[str]]:
    """Files, labels (n,) and class names of the stamps: classes of at least ``least`` pictures of ``side`` pixels."""
    from PIL import Image

    if not STAMPS.is_dir():
        raise FileNotFoundError(f"{STAMPS}: apt install tuxpaint-stamps-default")
    found = []
    for path in sorted(STAMPS.rglob("*.png")):
        parts = path.relative_to(STAMPS).parts[:-1]
        if not set(parts) & set(LEFT_OUT) and min(Image.open(path).size) >= side and "_mirror" not in path.stem:
            found.append((path, "/".join(parts[:2])))
    counts = Counter(name for _, name in found)
    names = sorted(name for name, count in counts.items() if count >= least)
    kept = [(path, names.index(name)) for path, name in found if name in names]
    return [path for path, _ in kept], torch.tensor([label for _, label in kept]), names


def stamp_pixels(paths, size: int = 224) -> torch.Tensor:
    """On white, padded to a square, resized: (n, 3, size, size)."""
    from PIL import Image

    pictures = []
    for path in paths:
        picture = Image.open(path).convert("RGBA")
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(picture, ((side - picture.size[0]) // 2, (side - picture.size[1]) // 2))
        pictures.append(square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return to_pixels(pictures)


def held_out_photos() -> dict:
    """Photographs of scikit-image that the demo does not use."""
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    files = {name: next(iter(sorted(folder.glob(f"{name}.*"))), None) for name in HELD_OUT}
    return {name: Image.open(path).convert("RGB") for name, path in files.items() if path is not None}


def crops(count: int, *, held_out: bool, seed: int = 0) -> torch.Tensor:
    """(count, 3, 224, 224): crops of photographs, those that chose defaults or those held back."""
    images, _ = random_crops(held_out_photos() if held_out else load_photos(), count, seed=seed)
    return to_pixels(images)


def digest(content: bytes | str) -> str:
    """Of what a file's name must tell apart."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:12]


def cached(name: str, make):
    """``make()`` once; afterwards the file."""
    path = CACHE / f"{name}.pt"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(make(), part)
        os.replace(part, path)
    return torch.load(path, weights_only=True)


def save(name: str, about: dict, records: dict[str, list[dict]]) -> Path:
    """``bench/results/evidence-<name>.json``: what was run where, then one record a line."""
    path = RESULTS / f"evidence-{name}.json"
    machine.write(path, {"schema": 1, **machine.stamp("bench.evidence"), **about, **records})
    return path


def load(name: str) -> dict:
    return json.loads((RESULTS / f"evidence-{name}.json").read_text())


def batches(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def interval(differences: torch.Tensor, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of (n,) paired differences: bootstrap over the n."""
    generator = torch.Generator().manual_seed(seed)
    n = len(differences)
    means = torch.cat(
        [
            differences.double()[torch.randint(n, (500, n), generator=generator)].mean(1)
            for _ in range(max(draws // 500, 1))
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def difference(name: str, differences: torch.Tensor) -> dict:
    """The entries of a record: ``name``, the mean of (n,) paired differences, and ``name_95``, its interval."""
    return {name: round(differences.mean().item(), 4), f"{name}_95": [round(v, 4) for v in interval(differences)]}
