"""The demo command: photos -> real DINOv2 -> one table and a few pictures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

from . import compare
from .pretrained import MissingPackage, WeightsUnavailable, load_dinov2_small, need

NOTES = """\
tokens      patch tokens in the sequence, falling after blocks 3, 6 and 9, counted from 0 (CLS always passes through)
GMACs       1e9 multiply-accumulates an image, clustering and scores included
images/s    median of {repeats} interleaved round(s) at batch {batch}; speed-up: against all tokens in the same round
rec. error  sum_i min_j |x_i - c_j|^2 / sum_i |x_i - mean|^2 at the first pooling block: the same tokens for
            every method
methods     the defaults of tokenpool_ext.patch: 5 iterations, weights = attention received, farthest-first start, sizes
            counted (proportional attention); nothing was chosen on these photos
cos         cosine of the final CLS feature (of the mean patch feature) to the unpooled model's; nothing was trained"""


class Progress:
    """One changing line on a terminal; elsewhere a line whenever the stage changes or ten seconds have passed."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.start, self.last, self.stage = time.monotonic(), -1e9, None

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        text = f"[{now - self.start:5.1f} s] {line}"
        if self.live:
            self.stream.write("\r\x1b[K" + text[:120])
        elif line.split("[")[0] != self.stage or now - self.last > 10:
            self.stream.write(text + "\n")
            self.last = now
        self.stage = line.split("[")[0]
        self.stream.flush()

    def clear(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def machine() -> dict:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    from .. import __version__

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenpool_ext": __version__,
        "dtype": "float32",
        "device": "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "backend": backend_used(),
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tokenpool_ext demo",
        description="Pool a real pretrained ViT (DINOv2 ViT-S/14) on real photos: what it saves, what it loses, "
        "and pictures of the clusters. About a minute and a half on two cores.",
    )
    p.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="pictures (default: %(default)s)")
    p.add_argument(
        "--images", type=int, default=24, metavar="N", help="photo crops to compare on (default: %(default)s)"
    )
    p.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.75, 0.5],
        metavar="R",
        help="ratio of tokens kept after blocks 3, 6 and 9, from 0 (default: 0.75 0.5)",
    )
    p.add_argument("--quick", action="store_true", help="8 images, one timing round")
    p.add_argument("--repeats", type=int, default=4, metavar="N", help="timing rounds (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    p.add_argument("--framework", choices=("transformers", "timm"), default="transformers", help="whose model code")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="local DINOv2 ViT-S/14 weights, no download")
    p.add_argument("--photos", type=Path, nargs="+", metavar="FILE", help="your own photos for the pictures")
    p.add_argument("--no-pictures", action="store_true", help="only the table")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the demo. Returns 0, or 1 with one message on stderr when something it needs is missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    if options.images < 1 or options.repeats < 1 or not all(0 < b <= 1 for b in options.budgets):
        parser().error("--images and --repeats must be at least 1, and --budgets ratios in (0, 1]")
    if options.quick:
        options.images, options.repeats = min(options.images, 8), 1
    progress = Progress()
    try:
        return run(options, argv, progress)
    except (MissingPackage, WeightsUnavailable, OSError) as error:  # OSError: a photo or checkpoint
        progress.clear()
        print(f"tokenpool_ext demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.clear()
        return 130


def run(options: argparse.Namespace, argv: list[str], say: Progress) -> int:
    from . import pictures
    from .photos import load_photos, random_crops, to_pixels

    for module in (options.framework, "PIL", "tabulate"):  # say what is missing before anything slow
        need(module, "for the demo")
    photos = load_photos()
    say(f"loading DINOv2 ViT-S/14 ({options.framework})")
    model = load_dinov2_small(options.framework, options.checkpoint, say=say)
    pixels = to_pixels(random_crops(photos, options.images)[0])
    patches = (pixels.shape[-1] // 14) ** 2

    rows = compare.variants(model, patches, sorted(set(options.budgets), reverse=True))
    compare.costs(rows)
    compare.quality(rows, pixels, say=say)
    batch = min(len(pixels), 8)
    rounds = compare.throughput(rows, pixels[:batch], repeats=options.repeats, say=say)
    say.clear()

    here = machine()
    print(
        f"\nDINOv2 ViT-S/14 ({options.framework}), {len(pixels)} crops of {len(photos)} photos, 224 x 224, "
        f"{patches} patch tokens; pooled after blocks 3, 6 and 9 (from 0), no training\n"
    )
    print(compare.table([v.row for v in rows]))
    print("\n" + NOTES.format(repeats=rounds, batch=batch))
    command = "python -m tokenpool_ext demo" + "".join(" " + a for a in argv)
    print(
        f"\n$ {command}\n{here['cpu']}, {here['cores']} cores, {here['threads']} threads, {here['system']}, "
        f"torch {here['torch']}, Python {here['python']}, float32; operators by backend: {here['backend']}"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(
                {
                    "command": command,
                    "machine": here,
                    "batch": batch,
                    "images": len(pixels),
                    "repeats": rounds,
                    "rows": [v.row.record() for v in rows],
                },
                indent=1,
            )
            + "\n"
        )
        print(f"wrote {options.json}")
    if not options.no_pictures:
        own = [(path.stem, path) for path in options.photos or ()]
        for path in pictures.draw_all(options, own, photos, say):
            say.clear()
            print(f"wrote {path}")
    say.clear()
    print(f"{time.monotonic() - say.start:.0f} s in all")
    return 1 if all(v.row.failed for v in rows[1:]) else 0


def backend_used() -> str:
    """Name of the backend that ``backend=None`` takes for CPU tensors on this machine."""
    from ..backends import select

    forced = os.environ.get("TOKENPOOL_EXT_BACKEND")
    if forced:
        return f"{forced} (TOKENPOOL_EXT_BACKEND)"
    return select("kmeans", torch.empty(0, device="cpu"))[0].name
