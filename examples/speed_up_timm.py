"""A timm ViT with fewer tokens: images a second, before and after.

python examples/speed_up_timm.py [--model vit_small_patch16_224] [--batch 8] [--keep-ratio 0.7]
"""

import argparse
import statistics
import time

import timm
import torch

import tokenpool_ext as tp


def images_per_second(model, images, repeats=5):
    """Median over a few forwards, after one to warm up."""
    with torch.inference_mode():
        model(images)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    args = parser.parse_args()

    model = timm.create_model(args.model, pretrained=False).eval()  # pretrained=True downloads weights
    images = torch.randn(args.batch, *model.default_cfg["input_size"])

    before = images_per_second(model, images)
    tp.patch(model, keep_ratio=args.keep_ratio)  # the one line
    after = images_per_second(model, images)
    tp.unpatch(model)  # and the way back

    print(f"{args.model}: {before:.1f} images/s, pooled {after:.1f} ({after / before:.2f}x)")


if __name__ == "__main__":
    main()
