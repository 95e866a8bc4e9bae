"""Adapter weights by block of a UNet, as diffusers' `set_adapters` takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.files.limits import finite
from mole_kernels.modules.scan import roots

# one weight for all layers, or one for each by its path
Weight: TypeAlias = float | Mapping[str, float]


def weight_at(weight: Weight, path: str) -> float:
    """The weight on the layer at `path`."""
    return weight[path] if isinstance(weight, Mapping) else weight


def check_weight(name: str, given: object) -> None:
    """A finite number, or block weights of such."""
    where = f"scale of expert {name!r}"
    if isinstance(given, Mapping):
        for part in given.values():
            check_weight(name, part)
        return
    if isinstance(given, list | tuple):
        for part in given:
            check_weight(name, part)
        return
    try:
        number = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise MoleTypeError(where, expected="a number", got=type(given).__name__) from None
    except OverflowError:
        number = math.inf
    # scales are kept in float32
    if not finite(number, torch.float32):
        raise MoleValueError(where, expected="a finite number", got=number, hint="scales are kept in float32")


def by_layer(name: str, blocks: Mapping[str, Any], model: object, paths: Iterable[str]) -> dict[str, float]:
    """Block weights to one weight for each layer: {"down": 0.5, "mid": 1.0, "up": {"block_0": 0.2, "block_1":
    [0.4, 0.8, 1.0]}}.

    What a block is, what is left out (1.0) and which weight a layer gets are diffusers' own rules, applied by
    its own function.
    """
    where = f"scale of expert {name!r}"
    found = [
        (part, root)
        for part, root in roots(model).items()
        if hasattr(root, "down_blocks") and hasattr(root, "up_blocks")
    ]
    if len(found) != 1:
        raise MoleStateError(
            where,
            expected="one UNet, for block weights",
            got=f"{len(found)} in the patched model",
            hint="give one number",
        )
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    component, unet = found[0]
    try:
        (expanded,) = _maybe_expand_lora_scales(cast(Any, unet), [dict(blocks)])
    # diffusers says what is wrong, and nothing else says it for us
    except (ValueError, KeyError, AttributeError) as error:
        raise MoleValueError(
            where, f"block weights that do not fit this UNet: {error}", hint='{"down": …, "mid": …, "up": …}'
        ) from error
    return {path: _of_layer(path.removeprefix(f"{component}."), expanded) for path in paths}


def _of_layer(path: str, expanded: Mapping[str, float]) -> float:
    for block, weight in expanded.items():
        if block in path:
            return float(weight)
    parts = path.split(".")
    # a resnet's layers follow the attention beside it, as in diffusers
    return float(expanded.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0)) if len(parts) > 3 else 1.0
