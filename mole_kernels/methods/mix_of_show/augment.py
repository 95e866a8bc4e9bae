"""How a concept's few pictures and captions are varied at each step: size, cut, place on an empty
canvas, words.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

# worded by us; {} is the caption
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "person": (
        "a photo of {}",
        "a portrait of {}",
        "{} in a picture",
        "a snapshot of {}",
        "a picture that shows {}",
        "a cropped picture of {}",
        "an old photo of {}",
        "a sharp photo of {}",
        "a photo of {} from close by",
        "a drawing of {}",
    ),
    "object": (
        "a photo of {}",
        "a picture of {}",
        "{} in a picture",
        "a close view of {}",
        "{} seen from afar",
        "a small {}",
        "a large {}",
        "a clean {}",
        "a worn {}",
        "a dim photo of {}",
        "a bright photo of {}",
        "a sketch of {}",
    ),
    "style": (
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a large picture in the style of {}",
        "a small picture in the style of {}",
        "a dark painting in the style of {}",
        "a bright painting in the style of {}",
        "a part of a painting in the style of {}",
    ),
}


@dataclass(frozen=True)
class Augmentation:
    """What varies; the defaults are the paper's for people.

    A picture is scaled until its short side is `size`, cut with probability `crop`, scaled until it fits
    into the square, and put somewhere on an empty (black) square; the image mask says where it lies. Cut:
    "person" keeps the top of an upright picture, down to a random height, and a random square of
    another; "object" a random square, which is not scaled again.

    Args:
        size: Side of the square in pixels.
        kind: "person" or "object".
        crop: Probability of a cut.
        scale: For "object", the picture is then scaled by a factor from this range, at most 1.
        flip: Probability of left and right exchanged.
        shuffle_after: Captions are split at commas, so many parts stay in front, the others are
            shuffled; None leaves them.
        templates: One is drawn for each picture and step, {} is the caption; () for none.

    Source: Mix-of-Show's code (its transforms for people and objects); worded and written anew.
    """

    size: int = 512
    kind: Literal["person", "object"] = "person"
    crop: float = 0.5
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    shuffle_after: int | None = None
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.scale
        if self.kind not in ("person", "object"):
            raise MoleValueError("Augmentation: kind", expected="'person' or 'object'", got=repr(self.kind))
        if self.size < 1 or not 0 <= self.crop <= 1 or not 0 <= self.flip <= 1 or not 0 < low <= high <= 1:
            raise MoleValueError(
                "Augmentation",
                expected="a size, probabilities, and 0 < low <= high <= 1 as scale",
                got=f"size {self.size}, crop {self.crop}, flip {self.flip}, scale {self.scale}",
            )
        if wrong := [text for text in self.templates if "{}" not in text]:
            raise MoleValueError(
                "Augmentation: templates", expected="texts with {} for the caption", got=printable(wrong[0])
            )

    def caption(self, caption: str, rng: random.Random) -> str:
        """One way to word a caption."""
        if self.shuffle_after is not None:
            parts = [part.strip() for part in caption.split(",")]
            rest = parts[self.shuffle_after :]
            rng.shuffle(rest)
            caption = ", ".join(parts[: self.shuffle_after] + rest)
        return rng.choice(self.templates).replace("{}", caption) if self.templates else caption

    def place(
        self, image: Image, mask: Image | None, rng: random.Random
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(pixels [3,size,size] in -1..1, mask [size,size] in 0..1, image mask [size,size] of 0 and 1).

        Args:
            image: RGB.
            mask: Of the concept, of the picture's size.
            rng: Decides everything.
        """
        size = self.size
        parts: dict[str, Any] = {"image": image} | ({} if mask is None else {"mask": mask})
        parts = _scaled(parts, size / min(image.size), lambda side: max(side, size))
        cut = rng.random() < self.crop
        if cut:
            parts = self._cut(parts, rng)
        if self.kind == "person" or not cut:
            parts = _scaled(parts, size / max(parts["image"].size), lambda side: min(side, size))
        if self.kind == "object":
            parts = _scaled(parts, rng.uniform(*self.scale), lambda side: min(max(side, 1), size))
        if rng.random() < self.flip:
            parts = {name: part.transpose(0) for name, part in parts.items()}
        width, height = parts["image"].size
        left, top = rng.randint(0, size - width), rng.randint(0, size - height)
        pixels = torch.full((3, size, size), -1.0)
        there = torch.zeros(size, size)
        span = (slice(top, top + height), slice(left, left + width))
        pixels[:, span[0], span[1]] = _values(parts["image"], 3) / 127.5 - 1
        there[span] = 1.0
        if mask is None:
            return pixels, None, there
        own = torch.zeros(size, size)
        own[span] = _values(parts["mask"], 1)[0] / 255
        return pixels, own, there

    def _cut(self, parts: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        width, height = parts["image"].size
        if self.kind == "person" and height > width:
            box = (0, 0, width, width + rng.randint(0, height - width))
        else:
            left, top = rng.randint(0, width - self.size), rng.randint(0, height - self.size)
            box = (left, top, left + self.size, top + self.size)
        return {name: part.crop(box) for name, part in parts.items()}


def _scaled(parts: Mapping[str, Any], factor: float, bound: Any) -> dict[str, Any]:
    from PIL.Image import Resampling

    width, height = (bound(round(side * factor)) for side in parts["image"].size)
    ways = {"image": Resampling.BILINEAR, "mask": Resampling.BILINEAR}
    return {name: part.resize((width, height), ways[name]) for name, part in parts.items()}


def _values(image: Image, channels: int) -> Tensor:
    """[channels,h,w] float32 in 0..255."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(height, width, channels).permute(2, 0, 1).float()
