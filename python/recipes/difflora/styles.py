"""The identities of the recipe: hands that write the demo's digits, each with its own slant, stroke and
colours.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mole_kernels.demo import data


@dataclass(frozen=True)
class Style:
    """slant: shear of the strokes · stroke: exponent of the ink, below 1 is bolder · hue: of the card; the
    ink is its complement
    """

    slant: float
    stroke: float
    hue: float


def draw_styles(count: int, seed: int) -> list[Style]:
    """So many hands, each drawn by (seed, its number)."""
    drawn = torch.rand(count, 3, generator=Generator().manual_seed(9000 + seed)).tolist()
    return [Style(1.2 * a - 0.6, 0.45 + 1.3 * b, c) for a, b, c in drawn]


def write(style: Style, scans: Tensor, generator: Generator) -> Tensor:
    """Cards [n,3,24,24] in -1..1 with scans [n,8,8] in a hand; each card's place and the ground behind it are
    drawn.
    """
    n, side = len(scans), data.SLOT
    place, turn = (
        (torch.rand(n, 2, generator=generator) - 0.5) * 0.12,
        1.25 + 0.1 * torch.rand(n, generator=generator),
    )
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = turn
    card_grid = F.affine_grid(
        torch.cat([theta[:, :, :2], -place[:, :, None]], 2), [n, 1, side, side], align_corners=False
    )
    theta[:, 0, 1] = style.slant * turn
    theta[:, :, 2] = -place
    large = F.interpolate(scans[:, None], scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    ink = F.grid_sample(
        large, F.affine_grid(theta, [n, 1, side, side], align_corners=False), align_corners=False
    ).clamp(0, 1)
    ink = ink**style.stroke
    card = torch.tensor(colorsys.hsv_to_rgb(style.hue, 0.75, 0.45))[:, None, None]
    pen = torch.tensor(colorsys.hsv_to_rgb((style.hue + 0.5) % 1, 0.35, 1.0))[:, None, None]
    pixels = torch.where(
        (card_grid.abs().amax(-1) <= 1)[:, None],
        card + (pen - card) * ink,
        data.backgrounds(n, side, side, generator),
    )
    return pixels.clamp(0, 1) * 2 - 1


def cards(style: Style, split: str, count: int, generator: Generator) -> tuple[Tensor, list[str]]:
    """(pixels [n,3,24,24], captions) of single digits of one split, which ones being drawn."""
    digits = data.load_split(split)
    pick = torch.randint(0, len(digits.labels), (count,), generator=generator)
    captions = [data.caption_of([-1, int(k), -1]) for k in digits.labels[pick]]
    return write(style, digits.images[pick], generator), captions


def save_cards(pixels: Tensor, captions: list[str], folder: Path) -> None:
    """The cards as PNG files with a .txt beside each, as anyone's own pictures would be."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, (one, caption) in enumerate(zip(pixels, captions)):
        values = ((one + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
        Image.fromarray(values.numpy()).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
