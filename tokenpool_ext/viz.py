"""Pictures of clusters over photographs: each cluster outlined and filled with its mean colour.

Labels are a ``(rows, cols)`` integer grid, one label a patch (-1: the patch was dropped, drawn dark). Pillow and
PyTorch only; images are ``PIL.Image`` in and out, square or not. Nothing is printed and nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

INK, PAPER, GREY = (24, 26, 30), (255, 255, 255), (108, 114, 124)


Picture = Any  # a PIL.Image.Image: Pillow is imported only when something is drawn


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            f'Pillow is needed to draw clusters ({error}). Install it with: pip install "tokenpool_ext[demo]"'
        ) from None
    return Image, ImageDraw, ImageFont


def compose(*assignments: torch.Tensor) -> torch.Tensor:
    """Follow tokens through several pooling layers: the final cluster of each of the first layer's tokens.

    Each argument is ``(N_l,)`` or ``(B, N_l)`` integers in ``[-1, N_{l+1})``; -1 (dropped or padding) stays -1.
    Returns the shape of the first argument.
    """
    if not assignments:
        raise ValueError("assignments: expected at least one tensor, got none")
    labels = assignments[0]
    for step in assignments[1:]:
        if step.dim() != labels.dim():
            raise ValueError(f"assignments: expected tensors of one rank, got {labels.dim()} and {step.dim()}")
        labels = torch.where(labels < 0, -1, step.gather(-1, labels.clamp(min=0)))
    return labels


def _check(labels: torch.Tensor) -> tuple[int, int]:
    labels = _on_cpu(labels)
    if labels.dim() != 2 or labels.numel() == 0 or labels.is_floating_point():
        raise ValueError(
            f"labels: expected a (rows, cols) integer tensor, got shape {tuple(labels.shape)}, "
            f"{labels.dtype}; for a (N,) assignment use labels.view(rows, cols)"
        )
    return labels.shape[0], labels.shape[1]


def _on_cpu(labels: Any) -> torch.Tensor:
    return labels.cpu() if isinstance(labels, torch.Tensor) else torch.as_tensor(labels, device="cpu")


def _array(image: Picture) -> torch.Tensor:
    image = image.convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.size[1], image.size[0], 3)


def _image(pixels: torch.Tensor) -> Picture:
    Image, _, _ = _pillow()
    pixels = pixels.clamp(0, 255).round().to(torch.uint8).contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))


def mean_colours(image: Picture, labels: torch.Tensor) -> torch.Tensor:
    """Mean colour of each patch's cluster: ``(rows, cols, 3)`` float32, 0 to 255; dropped patches are NaN."""
    rows, cols = _check(labels)
    patches = torch.nn.functional.adaptive_avg_pool2d(_array(image).float().permute(2, 0, 1), (rows, cols))
    patches, flat = patches.flatten(1).t(), _on_cpu(labels).flatten()
    keep = flat >= 0
    slots = int(flat.max()) + 1 if keep.any() else 0
    total = patches.new_zeros(slots, 3).index_add_(0, flat[keep], patches[keep])
    count = patches.new_zeros(slots).index_add_(0, flat[keep], patches.new_ones(int(keep.sum())))
    out = patches.new_full((rows * cols, 3), float("nan"))
    out[keep] = (total / count.unsqueeze(1))[flat[keep]]
    return out.view(rows, cols, 3)


def edges(labels: torch.Tensor, cell: int, width: int) -> torch.Tensor:
    """Boundaries between different labels, ``(rows * cell, cols * cell)`` bool; lines of ``width`` pixels, centred."""
    big = labels.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    line = torch.zeros_like(big, dtype=torch.bool)
    before, after = width // 2, width - width // 2
    for axis, count in ((0, labels.shape[0]), (1, labels.shape[1])):
        size = big.shape[axis]
        for step in range(1, count):
            at = step * cell
            differs = big.select(axis, at) != big.select(axis, at - 1)
            band = line.narrow(axis, max(at - before, 0), min(after + before, size - at + before))
            band |= differs.unsqueeze(axis)
    return line


def draw_clusters(
    image: Picture,
    labels: torch.Tensor,
    *,
    size: int = 448,
    fill: float = 1.0,
    outline: str | Sequence[float] | None = "auto",
    line: int | None = None,
    line_opacity: float = 0.85,
    dropped: float = 0.18,
) -> Picture:
    """One photo with its clusters over it.

    Args:
        image: ``PIL.Image``, any size.
        labels: ``(rows, cols)`` integers; equal labels are one cluster (it need not be connected); -1 dropped.
        size: width of the result in pixels, rounded to a whole number of pixels a patch.
        fill: 0 shows the photo, 1 the cluster's mean colour, between: a mixture.
        outline: colour of the cluster outlines, ``"auto"`` (white, but dark where the picture is nearly white), or
        None. line, line_opacity: their width in pixels (default: a twelfth of a patch) and opacity.
        dropped: brightness that is left of dropped patches.

    Returns a ``PIL.Image`` (RGB).
    """
    Image, _, _ = _pillow()
    rows, cols = _check(labels)
    labels = _on_cpu(labels).long()
    cell = max(1, round(size / cols))
    line = max(1, round(cell / 12)) if line is None else line
    photo = _array(image.convert("RGB").resize((cols * cell, rows * cell), Image.Resampling.LANCZOS)).float()
    colours = mean_colours(image, labels).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    gone = colours.isnan()
    pixels = torch.where(gone, photo * dropped, photo * (1 - fill) + colours.nan_to_num() * fill)
    if outline is not None and line > 0:
        ink = _ink(pixels, line) if outline == "auto" else pixels.new_tensor(outline)
        on = edges(labels, cell, line).unsqueeze(-1)
        pixels = torch.where(on, pixels * (1 - line_opacity) + ink * line_opacity, pixels)
    return _image(pixels)


def _ink(pixels: torch.Tensor, line: int) -> torch.Tensor:
    """(H, W, 3) white, or dark grey where the surroundings are too bright for white lines to be seen."""
    reach = 2 * line + 1
    light = (pixels @ pixels.new_tensor([0.299, 0.587, 0.114])).unsqueeze(0)
    light = torch.nn.functional.avg_pool2d(light, reach, stride=1, padding=line, count_include_pad=False)[0]
    return torch.where((light > 212).unsqueeze(-1), pixels.new_tensor([96.0, 100.0, 108.0]), pixels.new_tensor(255.0))


def draw_grid(image: Picture, rows: int, cols: int, *, size: int = 448, opacity: float = 0.2) -> Picture:
    """The photo with every patch outlined: what the model sees before pooling (one token a patch)."""
    every = torch.arange(rows * cols, device="cpu").view(rows, cols)
    return draw_clusters(image, every, size=size, fill=0.0, line=1, line_opacity=opacity)


def sheet(
    rows: Sequence[Sequence[Picture]],
    columns: Sequence[tuple[str, str]],
    *,
    title: str = "",
    note: str = "",
    group: int = 0,
    gap: int = 12,
    margin: int = 20,
) -> Picture:
    """Arrange images in a labelled grid.

    ``rows``: rows of ``PIL.Image`` of one size, ``None`` for a hole; ``columns``: a (heading, small print) pair for
    each column; ``title`` above, ``note`` below; a wider gap after every ``group`` columns (0: none). Returns a
    ``PIL.Image``.
    """
    Image, ImageDraw, ImageFont = _pillow()
    if not rows or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows: expected rows of {len(columns)} images, one a column, got {[len(r) for r in rows]}")
    width = max(i.size[0] for row in rows for i in row if i is not None)
    height = max(i.size[1] for row in rows for i in row if i is not None)
    unit = max(20, width // 16)

    def font(scale: float) -> Any:
        try:
            return ImageFont.load_default(size=round(unit * scale))
        except TypeError:  # Pillow before 10.1 has one bitmap size
            return ImageFont.load_default()

    big, normal, small = font(1.25), font(1.0), font(0.72)
    top = margin + (round(unit * 2.1) if title else 0)
    head = round(unit * 2.5)
    left = [margin + c * (width + gap) + (c // group * 2 * gap if group else 0) for c in range(len(columns))]
    total = (
        left[-1] + width + margin,
        top + head + len(rows) * height + (len(rows) - 1) * gap + (round(unit * 1.5) if note else 0) + margin,
    )
    page = Image.new("RGB", total, PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((margin, margin - 4), title, fill=INK, font=big)
    for c, (heading, small_print) in enumerate(columns):
        x = left[c]
        pen.text((x, top), heading, fill=INK, font=normal)
        pen.text((x, top + round(unit * 1.25)), small_print, fill=GREY, font=small)
        for r, row in enumerate(rows):
            if row[c] is not None:
                page.paste(row[c], (x, top + head + r * (height + gap)))
    if note:
        pen.text((margin, total[1] - margin - round(unit * 0.7)), note, fill=GREY, font=small)
    return page
