"""What the one line keeps: features of a real DINOv2 ViT-S/14, pooled against unpooled, on pictures nobody chose with.

    python -m bench.evidence one_line

The pictures are all colour and grey photographs in scikit-image's wheel that the demo (and so the choice of defaults)
does not use. Cosines of the class token's feature and of the mean of the patch tokens' features, as a head sees them;
mean over the crops, and the worst crop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage
import torch
import torch.nn.functional as F
from PIL import Image

import tokenpool_ext as tp
from tokenpool_ext.demo import photos, pretrained
from tokenpool_ext.demo.compare import features

from . import data

PICTURES = (
    "brick.png cell.png coins.png grass.png gravel.png horse.png hubble_deep_field.jpg ihc.png moon.png page.png "
    "retina.jpg text.png clock_motion.png"
).split()
WAYS = {
    "patch(model, keep_ratio=...)": {},
    "unweighted": {"weighted": False},
    'pooling="kmedoids"': {"pooling": "kmedoids"},
    'pooling="bipartite" (ToMe)': {"pooling": "bipartite"},
    'pooling="score"': {"pooling": "score"},
    'pooling="random"': {"pooling": "random", "seed": 0},
    'pooling="grid"': {"pooling": "grid"},
    "track_size=False": {"track_size": False},
    'init="strided"': {"init": "strided"},
    'position="attention"': {"position": "attention"},
}


@torch.no_grad()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=3, help="of each picture")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7, 0.5])
    args = parser.parse_args(argv)
    folder = Path(skimage.__file__).parent / "data"
    pictures = {name: Image.open(folder / name).convert("RGB") for name in PICTURES if (folder / name).exists()}
    crops, _ = photos.random_crops(pictures, args.crops * len(pictures), seed=2026)
    pixels = photos.to_pixels(crops)
    model = pretrained.load_dinov2_small()

    def run():
        parts = [features(model, part) for part in pixels.split(8)]
        return [torch.cat(list(column)) for column in zip(*parts, strict=True)]

    whole = run()
    rows = []
    print("| way | ratio | CLS | worst CLS | mean | worst mean |\n|---|---|---|---|---|---|")
    for ratio in args.ratios:
        for way, options in WAYS.items():
            tp.patch(model, keep_ratio=ratio, **options)
            cosines = [F.cosine_similarity(a, b) for a, b in zip(whole, run(), strict=True)]
            tp.unpatch(model)
            values = [round(v.item(), 3) for c in cosines for v in (c.mean(), c.min())]
            rows.append({"way": way, "ratio": ratio, "cls": values[:2], "mean": values[2:]})
            print(f"| {way} | {ratio:g} | " + " | ".join(f"{v:.3f}" for v in values) + " |", flush=True)
    about = {"pictures": len(pictures), "crops": len(crops)}
    print(data.save("one-line", about, {"cosines": rows}))
    return 0
