"""Photographs that ship inside scikit-image's and scikit-learn's wheels (no download), and crops of them."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import torch

from .pretrained import IMAGE_MEAN, IMAGE_STD, MissingPackage, need

# name -> (package, file, square to show: left, top, side as fractions of width, height, shorter side)
_SHIPPED = {
    "chelsea": ("skimage", "data/chelsea.png", (0.20, 0.0, 1.0)),
    "astronaut": ("skimage", "data/astronaut.png", (0.10, 0.0, 0.80)),
    "flower": ("sklearn", "datasets/images/flower.jpg", (0.20, 0.0, 1.0)),
    "coffee": ("skimage", "data/coffee.png", (0.12, 0.0, 1.0)),
    "china": ("sklearn", "datasets/images/china.jpg", (0.24, 0.0, 1.0)),
    "motorcycle": ("skimage", "data/motorcycle_left.png", (0.20, 0.0, 1.0)),
    "rocket": ("skimage", "data/rocket.jpg", (0.20, 0.0, 1.0)),
    "camera": ("skimage", "data/camera.png", (0.0, 0.0, 1.0)),
}

# who to thank: the two photos of scikit-learn are under CC BY 2.0, scikit-image's are free of restrictions
CREDITS = {
    "chelsea": "S. van der Walt (CC0)",
    "astronaut": "NASA (public domain)",
    "flower": "vultilion (CC BY 2.0)",
    "coffee": "R. Michetti (CC0)",
    "china": "danielbuechele (CC BY 2.0)",
    "motorcycle": "Middlebury stereo benchmark 2014",
    "rocket": "SpaceX (public domain)",
    "camera": "L. Varshney (CC0)",
}


def credits_line(names) -> str:
    """One line that names the photographers of the shipped photos among ``names``; empty when there is none."""
    known = [CREDITS[name] for name in names if name in CREDITS]
    return "Photos: " + ", ".join(known) if known else ""


def photo_files() -> dict[str, Path]:
    """Name -> path of each shipped photo that is present. Packages are located, not imported."""
    found = {}
    for name, (package, file, _) in _SHIPPED.items():
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if (Path(root) / file).is_file():
                found[name] = Path(root) / file
    return found


def load_photos(names=None):
    """Shipped photos as ``{name: PIL.Image (RGB)}``, in a fixed order; ``names`` selects some of them."""
    Image = need("PIL.Image", "to read photos")
    files = photo_files()
    if not files:
        raise MissingPackage(
            "no sample photo found: scikit-image and scikit-learn ship them. "
            'Install them with: pip install "tokenpool_ext[demo]"'
        )
    unknown = sorted(set(names or ()) - set(_SHIPPED))
    if unknown:
        raise ValueError(f"names: expected some of {sorted(_SHIPPED)}, got {unknown}")
    return {n: Image.open(files[n]).convert("RGB") for n in (names or files) if n in files}


def square(image, name: str | None = None, size: int = 224):
    """A square view of ``image``, resized to ``size`` pixels: the hand-picked one of a shipped photo, or the centre."""
    Image = need("PIL.Image", "to read photos")
    width, height = image.size
    if name in _SHIPPED:
        left, top, side = _SHIPPED[name][2]
        side *= min(width, height)
        left, top = min(left * width, width - side), min(top * height, height - side)
    else:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
    return image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side), reducing_gap=None
    )


def to_pixels(images) -> torch.Tensor:
    """PIL images of one size -> (B, 3, H, W) float32, normalised with ImageNet's mean and deviation."""
    rows = []
    for image in images:
        raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        rows.append(raw.view(image.size[1], image.size[0], 3).permute(2, 0, 1))
    pixels = torch.stack(rows).float() / 255
    return (pixels - pixels.new_tensor(IMAGE_MEAN).view(3, 1, 1)) / pixels.new_tensor(IMAGE_STD).view(3, 1, 1)


def random_crops(photos: dict, count: int, *, size: int = 224, seed: int = 0):
    """``count`` square crops, the photos in turn, side 0.4 - 1 of the shorter side, half of them mirrored.

    Returns ``(images, names)``; the same arguments give the same crops.
    """
    Image = need("PIL.Image", "to read photos")
    rng, names, images = random.Random(seed), [], []
    keys = list(photos)
    for i in range(count):
        name = keys[i % len(keys)]
        image = photos[name]
        width, height = image.size
        side = rng.uniform(0.4, 1.0) * min(width, height)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(crop)
        names.append(name)
    return images, names
