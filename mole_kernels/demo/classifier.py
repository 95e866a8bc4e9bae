"""Reads the digits of a scene: which of ten digits, or a blank, is in each slot."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_kernels.demo.data import SLOT, SLOTS
from mole_kernels.demo.model import ASSETS, load_weights

EMPTY = 10


class Reader(nn.Module):
    """A small convolutional network over one slot: pixels [n,3,24,24] in -1..1 -> logits [n,11]; class 10 is
    a blank slot.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * (SLOT // 4) ** 2, EMPTY + 1)
        )

    def forward(self, slots: Tensor) -> Tensor:
        return self.head(self.body(slots))


def slots_of(pixels: Tensor) -> Tensor:
    """Scenes [B,3,24,72] cut into their slots [B*3,3,24,24]."""
    return pixels.unflatten(-1, (SLOTS, SLOT)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def targets_of(labels: Tensor) -> Tensor:
    """Caption labels [B,3] (-1 for blank) as classes [B*3]."""
    return torch.where(labels < 0, torch.full_like(labels, EMPTY), labels).flatten()


@torch.no_grad()
def read(reader: Reader, pixels: Tensor) -> Tensor:
    """What the reader sees in scenes [B,3,24,72] in -1..1: labels [B,3], -1 for blank."""
    seen = torch.cat([reader(part).argmax(1) for part in slots_of(pixels).split(768)])
    return torch.where(seen == EMPTY, torch.full_like(seen, -1), seen).unflatten(0, (-1, SLOTS))


def loss_on(reader: Reader, pixels: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over all slots."""
    return F.cross_entropy(reader(slots_of(pixels)), targets_of(labels), label_smoothing=0.02)


def accuracy(seen: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of slots read as the caption says: over the digits, over each half, over blank slots."""
    right, groups = (
        seen == labels,
        {
            "digits": labels >= 0,
            "low": (labels >= 0) & (labels < 5),
            "high": labels >= 5,
            "blank": labels < 0,
        },
    )
    return {
        name: float(right[mine].float().mean()) if mine.any() else float("nan")
        for name, mine in groups.items()
    }


def load_reader(assets: Path | str = ASSETS) -> Reader:
    """The shipped reader, in eval mode."""
    reader = Reader()
    load_weights(reader, Path(assets) / "reader.safetensors")
    return reader.requires_grad_(False).eval()
