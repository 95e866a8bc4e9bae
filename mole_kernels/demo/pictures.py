"""Turn tensors into pictures: the grid of variants, and gate maps laid over what was generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_kernels.reports.page import uri_of

if TYPE_CHECKING:
    from PIL.Image import Image

ZOOM = 4
INK, PALE, GOOD, BAD = (34, 38, 52), (250, 250, 252), (24, 128, 72), (190, 44, 44)
# the colours of the two experts in every map
HEAT = torch.tensor([[0.20, 0.62, 1.00], [1.00, 0.62, 0.10]])


def to_image(pixels: Tensor, zoom: int = ZOOM) -> Image:
    """Pixels [3,H,W] in -1..1 as an enlarged picture with hard pixels."""
    from PIL import Image

    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array).resize(
        (array.shape[1] * zoom, array.shape[0] * zoom), Image.Resampling.NEAREST
    )


def data_uri(image: Image) -> str:
    """A picture as text that a web page can hold."""
    return uri_of(lambda buffer: image.save(buffer, format="PNG", optimize=True))


def overlay(pixels: Tensor, maps: Tensor, limits: Sequence[tuple[float, float]]) -> list[Tensor]:
    """A picture [3,H,W] in -1..1 under each expert's gate map [E,h,w]: dark where the gate is at its low
    limit, coloured at its high.
    """
    grey = ((pixels + 1) / 2).mean(0, keepdim=True).clamp(0, 1)
    out = []
    for e, (low, high) in enumerate(limits):
        heat = ((maps[e] - low) / max(high - low, 1e-6)).clamp(0, 1)
        heat = F.interpolate(heat[None, None], pixels.shape[1:], mode="bilinear", align_corners=False)[0]
        colour = HEAT[e][:, None, None] * heat + 0.08
        out.append(
            (0.35 * grey + 0.15 + 0.85 * heat * (0.35 + 0.65 * grey))
            * colour
            / colour.amax().clamp_min(0.3)
            * 2
            - 1
        )
    return out


def map_limits(maps: Tensor) -> list[tuple[float, float]]:
    """For each expert of maps [B,E,h,w], the range that its colours span."""
    flat = maps.transpose(0, 1).flatten(1)
    return [(float(row.min()), float(row.max())) for row in flat]


def picture_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], readings: Mapping[str, Tensor], wanted: Tensor
) -> Image:
    """Rows of captions, columns of variants; under each picture what the reader sees, green where it is what
    the caption says.

    Args:
        columns, readings: Variant -> pixels [B,3,H,W] and labels [B,3];  wanted  labels [B,3] of the
            captions.
    """
    from PIL import Image, ImageDraw

    height, width = (size * ZOOM for size in next(iter(columns.values())).shape[2:])
    left, top, gap, foot = 170, 34, 14, 26
    size = (left + len(columns) * (width + gap) + gap, top + len(captions) * (height + foot + gap))
    sheet = Image.new("RGB", size, PALE)
    draw, font, small = ImageDraw.Draw(sheet), _font(17), _font(15)
    for c, (name, pixels) in enumerate(columns.items()):
        x = left + c * (width + gap)
        draw.text((x, 8), name, fill=INK, font=font)
        for r in range(len(captions)):
            y = top + r * (height + foot + gap)
            sheet.paste(to_image(pixels[r]), (x, y))
            for slot, (seen, digit) in enumerate(
                zip(readings[name][r].tolist(), wanted[r].tolist(), strict=True)
            ):
                place = (x + (2 * slot + 1) * width / 6, y + height + 4)
                draw.text(
                    place,
                    "-" if seen < 0 else str(seen),
                    fill=GOOD if seen == digit else BAD,
                    font=small,
                    anchor="ma",
                )
    for r, caption in enumerate(captions):
        y = top + r * (height + foot + gap)
        for line, word in enumerate(caption.split()):
            draw.text((12, y + 10 + 24 * line), word, fill=INK, font=font)
    return sheet


def map_sheet(pixels: Tensor, maps: Tensor, captions: Sequence[str], names: Sequence[str]) -> Image:
    """Pictures [B,3,H,W] beside the same pictures under each expert's gate map [B,E,h,w]."""
    from PIL import Image, ImageDraw

    height, width = (size * ZOOM for size in pixels.shape[2:])
    left, top, gap = 170, 34, 14
    sheet = Image.new(
        "RGB", (left + (1 + len(names)) * (width + gap) + gap, top + len(captions) * (height + gap)), PALE
    )
    draw, font, limits = ImageDraw.Draw(sheet), _font(17), map_limits(maps)
    titles = [
        "picture",
        *(f"gate of {name} ({lo:.2f} to {hi:.2f})" for name, (lo, hi) in zip(names, limits, strict=True)),
    ]
    for c, title in enumerate(titles):
        draw.text((left + c * (width + gap), 8), title, fill=INK, font=font)
    for r, caption in enumerate(captions):
        y = top + r * (height + gap)
        for line, word in enumerate(caption.split()):
            draw.text((12, y + 10 + 24 * line), word, fill=INK, font=font)
        for c, shown in enumerate([pixels[r], *overlay(pixels[r], maps[r], limits)]):
            sheet.paste(to_image(shown), (left + c * (width + gap), y))
    return sheet


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)
