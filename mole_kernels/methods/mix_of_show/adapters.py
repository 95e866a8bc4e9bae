"""T2I-Adapter features weighted by region, as the paper's sampling has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleValueError, printable
from mole_kernels.methods.mix_of_show.regions import SEPARATOR, Box, Region, check_box, parse_regions

Weights = Sequence[tuple[Box, float]]


def parse_adapter_weights(text: str, height: int, width: int) -> list[tuple[Box, float]]:
    """The paper's `[y0, x0, y1, x1]-w`, in pixels, joined by `|`; an empty text has none. Raises
    MoleValueError that names the position.
    """
    weights: list[tuple[Box, float]] = []
    at = 0
    for part in text.split("|") if text.strip() else []:
        box, dash, weight = part.rpartition("-")
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not dash or not box.rstrip().endswith("]") or not abs(value) < float("inf"):
            raise MoleValueError(
                f"adapter weights, character {at}",
                expected="[y0, x0, y1, x1]-weight",
                got=printable(part.strip() or "nothing"),
            )
        # the box is read as a region's is, errors at the same places
        padding = "[x]" + SEPARATOR + "[]" + SEPARATOR
        try:
            region = parse_regions(padding + box, height, width)[0]
        except MoleValueError as error:
            raise MoleValueError(
                f"adapter weights, character {at}", expected="a box in pixels", got=printable(box.strip())
            ) from error
        weights.append((region.box, value))
        at += len(part) + 1
    return weights


def weigh(features: Sequence[Tensor], weights: Weights, elsewhere: float = 1.0) -> list[Tensor]:
    """Each feature map [B,C,h,w] times the weight of the last region that covers a place, `elsewhere` where
    none does.

    Give the result to the UNet as `down_intrablock_additional_residuals`.
    """
    out = []
    for feature in features:
        if feature.dim() != 4:
            raise MoleShapeError("adapter features", expected="[B,C,h,w]", got=tuple(feature.shape))
        table = torch.full(feature.shape[-2:], float(elsewhere))
        for box, weight in weights:
            check_box(box, "adapter weights")
            table[Region("x", box=box).cover(*feature.shape[-2:])] = weight
        out.append(feature * table.to(feature))
    return out
