"""Captioned scenes of real handwritten digits: 0-4 play the paper's faces, 5-9 its hands.

A scene is a row of three slots, 24x72 pixels; each slot is blank or holds a card with one digit. Low digits
are light ink on a
dark card, high digits dark ink on a light card. The caption names the slots from left to right: "three blank
seven".
The digits are scikit-learn's 8x8 scans, split by sample, so that no held-out scan is ever trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLANK = "blank"
HALVES = ("low", "high")
SLOTS, SLOT = 3, 24
HEIGHT, WIDTH = SLOT, SLOT * SLOTS
TRAIN_SAMPLES = 1400

# card and ink of the low and of the high half, rgb in 0..1
CARD = torch.tensor([[0.10, 0.14, 0.34], [0.98, 0.86, 0.52]])
INK = torch.tensor([[1.00, 0.96, 0.86], [0.26, 0.05, 0.08]])
PALETTE = torch.tensor(
    [[0.36, 0.58, 0.50], [0.60, 0.46, 0.58], [0.46, 0.56, 0.66], [0.64, 0.54, 0.44], [0.50, 0.50, 0.50]]
)
# how many digits a scene has, 0 to 3
COUNT_ODDS = torch.tensor([0.1, 0.2, 0.3, 0.4])


@dataclass(frozen=True)
class Digits:
    """One split of the scans: images [n,8,8] float in 0..1, labels [n] int64, index [n] int64 (row in
    scikit-learn's set).
    """

    images: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures with everything that is known about them.

    pixels [B,3,H,W] float in -1..1; labels [B,S] int64, what the caption says (-1 for blank); boxes [B,2,H,W]
    float 0/1, the cards
    of the low and of the high half; captions, B strings.
    """

    pixels: Tensor
    labels: Tensor
    boxes: Tensor
    captions: list[str]


@lru_cache(maxsize=2)
def load_split(split: str) -> Digits:
    """The scans of "train" (1400 samples) or "held" (the other 397), by a fixed shuffle of scikit-learn's
    set.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "held"):
        raise ValueError(f"load_split: expected 'train' or 'held', got {split!r}.")
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=Generator().manual_seed(0))
    index = order[:TRAIN_SAMPLES] if split == "train" else order[TRAIN_SAMPLES:]
    images = torch.tensor(raw.images, dtype=torch.float32)[index] / 16.0
    return Digits(images, torch.tensor(raw.target)[index].long(), index)


def caption_of(labels: list[int]) -> str:
    """[3, -1, 7] -> "three blank seven"."""
    return " ".join(BLANK if k < 0 else WORDS[k] for k in labels)


def labels_of(caption: str) -> list[int]:
    """The inverse of caption_of."""
    return [-1 if word == BLANK else WORDS.index(word) for word in caption.split()]


def scenes(
    digits: Digits, n: int, generator: Generator, weak: float = 0.0, mislabel: float = 0.0
) -> Pictures:
    """n scenes of zero to three digits.

    weak: share of digits that are out of focus; mislabel: share whose picture shows another digit of the same
    half than the
    caption says. Both are how the base is kept from learning its digits well; sharp scenes have 0 for both.
    """
    labels = draw_labels(n, generator)
    flat = labels.flatten()
    pixels, boxes = draw_cards(
        digits, flat, generator, weak, mislabel, _uniform(len(flat), 17.0, 20.0, generator)
    )
    pixels, boxes = _row(pixels, n), _row(boxes, n)
    covered = boxes.amax(1, keepdim=True)
    pixels = torch.where(covered > 0, pixels, backgrounds(n, HEIGHT, WIDTH, generator))
    return Pictures(pixels * 2 - 1, labels, boxes, [caption_of(row) for row in labels.tolist()])


def closeups(digits: Digits, n: int, generator: Generator, half: int) -> Pictures:
    """n close-ups [B,3,24,24] of one digit of a half (0 low, 1 high): its slot cut out of a scene that is
    blank but for it.
    """
    place = torch.randint(0, SLOTS, (n,), generator=generator)
    digit = torch.randint(0, 5, (n,), generator=generator) + 5 * half
    labels = torch.full((n, SLOTS), -1).scatter(1, place[:, None], digit[:, None])
    pixels, boxes = draw_cards(digits, digit, generator, 0.0, 0.0, _uniform(n, 17.0, 20.0, generator))
    ground = backgrounds(n, HEIGHT, WIDTH, generator).unflatten(-1, (SLOTS, SLOT))[
        torch.arange(n), :, :, place
    ]
    pixels = torch.where(boxes.amax(1, keepdim=True) > 0, pixels, ground)
    return Pictures(pixels * 2 - 1, labels, boxes, [caption_of(row) for row in labels.tolist()])


def draw_labels(n: int, generator: Generator) -> Tensor:
    """Labels [n,3] int64 with -1 for blank; the number of digits follows COUNT_ODDS, their slots are
    random.
    """
    count = torch.multinomial(COUNT_ODDS, n, replacement=True, generator=generator)
    rank = torch.rand(n, SLOTS, generator=generator).argsort(1).argsort(1)
    labels = torch.randint(0, 10, (n, SLOTS), generator=generator)
    return torch.where(rank < count[:, None], labels, torch.full_like(labels, -1))


def draw_cards(
    digits: Digits, labels: Tensor, generator: Generator, weak: float, mislabel: float, side: Tensor
) -> tuple[Tensor, Tensor]:
    """One slot per label [n]: pixels [n,3,24,24] in 0..1 and card boxes [n,2,24,24]; label -1 gives an empty
    box.
    """
    n = len(labels)
    shown = labels.clamp_min(0)
    other = (shown // 5) * 5 + (shown % 5 + torch.randint(1, 5, (n,), generator=generator)) % 5
    shown = torch.where(torch.rand(n, generator=generator) < mislabel, other, shown)
    scans = _choose(digits, shown, generator)
    scans = torch.where(
        (torch.rand(n, generator=generator) < weak)[:, None, None], out_of_focus(scans), scans
    )
    ink, box = _paste(scans, side, 1.5, generator)
    half = F.one_hot(shown // 5, 2).float()[:, :, None, None]
    return _colour(ink, shown, generator), box[:, None] * half * (labels >= 0)[:, None, None, None]


def out_of_focus(scans: Tensor) -> Tensor:
    """Scans [n,8,8] averaged down to 4x4 overlapping cells and back: a smudge that hints at its digit."""
    small = F.avg_pool2d(scans[:, None], 3, 2, 1)
    return F.interpolate(small, size=8, mode="bilinear", align_corners=False)[:, 0]


def backgrounds(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """A slope between two muted colours with faint stripes, [n,3,H,W] in 0..1."""
    pick = torch.randint(0, len(PALETTE), (n, 2), generator=generator)
    first, second = PALETTE[pick[:, 0]][:, :, None, None], PALETTE[pick[:, 1]][:, :, None, None]
    yy, xx = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    angle, pitch, phase = (
        _uniform(n, low, high, generator)[:, None, None]
        for low, high in ((0, math.pi), (0.3, 0.6), (0, 6.28))
    )
    stripes = 0.05 * torch.sin(pitch * (xx * angle.cos() + yy * angle.sin()) + phase)
    slope = (xx / width)[None, None]
    return (first + (second - first) * slope + stripes[:, None]).clamp(0, 1)


def _choose(digits: Digits, labels: Tensor, generator: Generator) -> Tensor:
    """One random scan [n,8,8] of each label."""
    pick = torch.rand(len(labels), generator=generator)
    out = torch.empty(len(labels), dtype=torch.long)
    for k in range(10):
        rows, mine = torch.where(digits.labels == k)[0], labels == k
        out[mine] = rows[(pick[mine] * len(rows)).long()]
    return digits.images[out]


def _paste(scans: Tensor, side: Tensor, wander: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Scans [n,8,8] enlarged to `side` [n] pixels near a slot's centre: ink [n,24,24] in 0..1 and box
    [n,24,24].
    """
    n = len(scans)
    centre = (
        SLOT / 2 + _uniform(n, -wander, wander, generator),
        SLOT / 2 + _uniform(n, -wander, wander, generator),
    )
    zoom = SLOT / side
    theta = torch.zeros(n, 2, 3)
    for axis in range(2):
        theta[:, axis, axis] = zoom
        theta[:, axis, 2] = -zoom * (2 * centre[axis] / SLOT - 1)
    grid = F.affine_grid(theta, [n, 1, SLOT, SLOT], align_corners=False)
    large = F.interpolate(scans[:, None], scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    ink = F.grid_sample(large, grid, align_corners=False)[:, 0]
    return ink, (grid.abs().amax(-1) <= 1).float()


def _colour(ink: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Ink [n,24,24] in the colours of each label's half, a little brighter or darker each time; [n,3,24,24]
    in 0..1.
    """
    half = labels.clamp_min(0) // 5
    card, pen = CARD[half][:, :, None, None], INK[half][:, :, None, None]
    light = _uniform(len(ink), -0.04, 0.04, generator)[:, None, None, None]
    return (card + (pen - card) * ink[:, None] + light).clamp(0, 1)


def _row(slots: Tensor, n: int) -> Tensor:
    """Slots [n*3,C,24,24] side by side: [n,C,24,72]."""
    return (
        slots.unflatten(0, (n, SLOTS)).permute(0, 2, 3, 1, 4).reshape(n, slots.shape[1], SLOT, SLOT * SLOTS)
    )


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low
