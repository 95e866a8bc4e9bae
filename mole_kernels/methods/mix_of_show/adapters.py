"""T2I-Adapter features weighted by region, as the paper's sampling has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError, printable
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


def weighted(
    pipe: Any, weights: Weights | Sequence[Weights], elsewhere: float | Sequence[float]
) -> list[tuple[nn.Module, Callable[..., list[Tensor]]]]:
    """(adapter, forward hook that weighs its features) of a pipeline's T2I-Adapter, or of each of several.

    Raises:
        MoleTypeError: A pipeline without an adapter, or weights of another form.
        MoleValueError: Another number of weights than of adapters, or a box outside the picture.
    """
    adapter = getattr(pipe, "adapter", None)
    if not isinstance(adapter, nn.Module):
        raise MoleTypeError(
            "regional: adapter", expected="a pipeline with a T2I-Adapter", got=type(pipe).__name__
        )
    several = isinstance(getattr(adapter, "adapters", None), nn.ModuleList)
    modules = list(adapter.adapters) if several else [adapter]  # type: ignore[arg-type]
    by_adapter: list[Any] = list(weights) if several else [weights]
    outside = list(elsewhere) if isinstance(elsewhere, Sequence) else [elsewhere] * len(modules)
    if not len(by_adapter) == len(outside) == len(modules):
        raise MoleValueError(
            "regional: adapter",
            expected=f"weights for each of {len(modules)} adapters",
            got=f"{len(by_adapter)}, and {len(outside)} for elsewhere",
        )
    hooks: list[tuple[nn.Module, Callable[..., list[Tensor]]]] = []
    for module, own, rest in zip(modules, by_adapter, outside):
        for pair in own:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], Sequence):
                form = "a list of (box, weight) for each adapter" if several else "a list of (box, weight)"
                raise MoleTypeError("regional: adapter", expected=form, got=printable(pair))
            check_box(pair[0], "regional: adapter")  # type: ignore[arg-type]
        hooks.append((module, partial(_weigh_output, own, rest)))
    return hooks


def _weigh_output(
    weights: Weights, elsewhere: float, module: nn.Module, args: Any, features: Sequence[Tensor]
) -> list[Tensor]:
    return weigh(features, weights, elsewhere)


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
