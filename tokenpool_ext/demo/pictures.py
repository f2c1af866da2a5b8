"""The demo's pictures: where the clusters lie in each photo, after pooling inside the real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .. import viz
from ..vit import patch, record
from . import compare
from .photos import credits_line, square, to_pixels
from .pretrained import load_dinov2_small, need

SIDE = 448  # 32 x 32 patches: finer than the table's 16 x 16, and DINOv2 likes it
SCHEDULE = {3: 256, 6: 128, 9: 64}  # block: tokens left; block 10 of 12 ends with 64 of 1024
README_PHOTOS = ("astronaut", "flower", "coffee", "china")
TILE = 352  # pixels a picture in the sheets; 11 a patch


@torch.no_grad()
def token_labels(model: torch.nn.Module, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
    """``{block: (B, patches) labels}``: in which token each patch ends after each pooling block, -1 where dropped."""
    with record(model) as r:
        compare.features(model, pixels)
    return {index: r.assignment_after(index) for index, _ in r.layers}


def pooled_labels(model, pixels, pooling: str, options: dict) -> dict[int, torch.Tensor]:
    copy = patch(compare.shared_copy(model), num_tokens=SCHEDULE, pooling=pooling, **options)
    return token_labels(copy, pixels)


def clusters_sheet(images: list, labels: dict[int, torch.Tensor], *, tile: int = TILE, blocks=(3, 9), note: str = ""):
    """Photo, then its clusters after each block of ``blocks``: a row a photo. Returns a ``PIL.Image``."""
    side = round(next(iter(labels.values())).shape[-1] ** 0.5)
    rows = []
    for i, image in enumerate(images):
        rows.append(
            [viz.draw_grid(image, side, side, size=tile)]
            + [viz.draw_clusters(image, labels[b][i].view(side, side), size=tile) for b in blocks]
        )
    columns = [(f"{side * side} tokens", "one a patch")]
    columns += [(f"{int(labels[b].max()) + 1} tokens", f"after block {b + 1} of 12") for b in blocks]
    return viz.sheet(rows, columns, note=note)


def pairs_sheet(images: list, labels: torch.Tensor, *, tile: int = TILE, across: int = 2, note: str = ""):
    """Before and after side by side, ``across`` photos a row. ``labels``: (B, patches). Returns a ``PIL.Image``."""
    side, across = round(labels.shape[-1] ** 0.5), min(across, len(images))
    pairs = [
        [viz.draw_grid(image, side, side, size=tile), viz.draw_clusters(image, one.view(side, side), size=tile)]
        for image, one in zip(images, labels)
    ]
    pairs += [[None, None]] * (-len(pairs) % across)
    rows = [sum(pairs[i : i + across], []) for i in range(0, len(pairs), across)]
    columns = [
        (f"{side * side} tokens", "one a patch"),
        (f"{int(labels.max()) + 1} tokens", "weighted K-Means in DINOv2"),
    ]
    return viz.sheet(rows, columns * across, group=2, note=note)


def methods_sheet(images: list, labels: dict[str, torch.Tensor], *, tile: int = TILE, note: str = ""):
    """Photo, then what each method makes of it at the same number of tokens: a row a photo."""
    side = round(next(iter(labels.values())).shape[-1] ** 0.5)
    rows = []
    for i, image in enumerate(images):
        rows.append(
            [image.resize((tile // side * side,) * 2)]
            + [viz.draw_clusters(image, one[i].view(side, side), size=tile) for one in labels.values()]
        )
    count = max(int(one.max()) + 1 for one in labels.values())
    return viz.sheet(
        rows,
        [("photo", f"{side * side} patches")]
        + [
            (name, f"{count} tokens" if (one >= 0).all() else f"{count} kept, the others dropped")
            for name, one in labels.items()
        ],
        note=note,
    )


def draw_all(options, own: list[tuple[str, Path]], photos: dict, say: Callable[[str], None]):
    """Write the pictures into ``options.out``; yields each path."""
    Image = need("PIL.Image", "to read photos")
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"loading the model for {SIDE} x {SIDE} pictures")
    model = load_dinov2_small(options.framework, options.checkpoint, image_size=SIDE)
    chosen = {name: square(Image.open(path).convert("RGB"), None, SIDE) for name, path in own}
    if not own:
        names = [n for n in (README_PHOTOS if options.quick else photos) if n in photos]
        chosen = {name: square(photos[name], name, SIDE) for name in names}
    names, images = list(chosen), list(chosen.values())
    pixels = to_pixels(images)

    found: list[dict[int, torch.Tensor]] = []
    for start in range(0, len(names), 2):
        say(f"clusters of photos [{start + 1}-{min(start + 2, len(names))} of {len(names)}]")
        found.append(pooled_labels(model, pixels[start : start + 2], *compare.METHODS[0][1:]))
    labels = {block: torch.cat([part[block] for part in found]) for block in found[0]}

    first = [names.index(n) for n in README_PHOTOS if n in names] or list(range(min(4, len(names))))
    say("drawing")
    note = credits_line(() if own else [names[i] for i in first])
    yield save(
        pairs_sheet([images[i] for i in first], labels[max(labels)][first], note=note), options.out / "clusters.png"
    )
    for i, name in enumerate(names):
        one = clusters_sheet(
            [images[i]],
            {b: t[i : i + 1] for b, t in labels.items()},
            tile=SIDE,
            blocks=tuple(SCHEDULE),
            note=credits_line(() if own else [name]),
        )
        yield save(one, options.out / f"clusters_{name}.png")
    if options.quick:
        return
    first, last = first[:3], max(SCHEDULE)
    kinds = {}
    for label, pooling, extra in compare.METHODS:
        say(f"methods on photos [{label}]")
        try:
            kinds[label] = pooled_labels(model, pixels[first], pooling, extra)[last]
        except Exception as error:
            say(f"left out of methods.png: {label}: {error}")
    if kinds:
        note = credits_line(() if own else [names[i] for i in first])
        yield save(methods_sheet([images[i] for i in first], kinds, tile=256, note=note), options.out / "methods.png")


def save(image, path: Path) -> Path:
    """PNG with a palette of 256 colours: a third of the size, and flat fills do not need more."""
    image.quantize(256, method=0, kmeans=2, dither=0).save(path, optimize=True)
    return path
