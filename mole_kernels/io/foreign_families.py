"""Where layers of other adapter families lie, whose names only a converter of diffusers knows.

A converter takes plain LoRA. So it is given a LoRA of rank 1 for each such module, whose values say which
module it was, and the paths that come out are read off. Norms, which converters drop, are found by a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError
from mole_kernels.io.dialects.keys import some_keys
from mole_kernels.io.dialects.paths import spelled, unflatten
from mole_kernels.io.families import PREFIX
from mole_kernels.io.foreign import WAN_PARTS, convert_layers
from mole_kernels.io.layer_keys import LayerKeys

# Wan's own names of its norms -> diffusers'
WAN_NORMS = {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
}


def mark_foreign_norms(layers: Sequence[LayerKeys]) -> None:
    """Take differences of norms for what the layers beside them are: names of a model's own code.

    A norm's name (`blocks.0.norm3`) may be right in both, and mean another norm.

    Args:
        layers: A file's layers, resolved.
    """
    prefixes = {spelled(layer.module).prefix for layer in layers if layer.foreign}
    for layer in layers:
        if is_difference(layer) and spelled(layer.module).prefix in prefixes:
            layer.foreign = True


def is_difference(layer: LayerKeys) -> bool:
    """Whether a layer is a difference of a norm's own weight.

    Args:
        layer: Its keys.
    """
    return layer.kind == "norm" or (layer.kind == "full" and "diff" in layer.keys)


def family_paths(
    layers: Sequence[LayerKeys], tensors: Mapping[str, Any], converter: type, where: str
) -> dict[str, str]:
    """module -> its path in diffusers' model, of layers that are more than A and B.

    Args:
        layers: Those layers.
        tensors: The file's tensors by key.
        converter: A diffusers pipeline class.
        where: The file, for messages.

    Raises:
        MoleKeyError: A module that the converter splits or does not know.
    """
    paths: dict[str, str] = {}
    probes: list[LayerKeys] = []
    state: dict[str, Tensor] = {}
    for layer in layers:
        if is_difference(layer):
            if (path := _norm_path(layer, converter)) is not None:
                paths[layer.module] = path
            continue
        keys = {half: f"{PREFIX}{layer.module}.lora_{half}.weight" for half in ("down", "up")}
        down, up = (tensors.get(layer.keys.get(half, "")) for half in ("down", "up"))
        K = down.shape[1:] if isinstance(down, Tensor) else (8,)
        N = (
            up.shape[0]
            if isinstance(up, Tensor)
            else max(tensors[key].numel() for key in layer.keys.values())
        )
        state[keys["down"]] = torch.ones(1, *K)
        state[keys["up"]] = torch.full((N, 1, *(1,) * (len(K) - 1)), len(probes) + 1.0)
        probes.append(replace(layer, keys=keys, kind="lora", ending=layer.ending or "kohya"))
    if probes:
        by_number: dict[int, list[str]] = {}
        for path, factors in convert_layers(probes, state, lambda _: 1.0, converter, where).items():
            by_number.setdefault(round(factors.up.flatten()[0].item()), []).append(path)
        for number, layer in enumerate(probes, 1):
            if len(by_number.get(number, ())) == 1:
                paths[layer.module] = by_number[number][0]
    if lost := [key for layer in layers if layer.module not in paths for key in layer.keys.values()]:
        raise MoleKeyError(
            where,
            f"{len(lost)} keys are of modules that {converter.__name__} splits or does not know, where only "
            f"plain LoRA can be read: {some_keys(lost)}",
            hint="spell its layers as diffusers' model does",
        )
    return paths


def _norm_path(layer: LayerKeys, converter: type) -> str | None:
    """A norm's path in diffusers' model, or None where no table has it."""
    if not any(
        cls.__name__ in ("WanLoraLoaderMixin", "SkyReelsV2LoraLoaderMixin") for cls in converter.__mro__
    ):
        return None
    name = spelled(layer.module)
    rest = (
        unflatten(name.rest, (*WAN_PARTS, "norm_q", "norm_k", "norm_k_img", "norm3"))
        if name.flat
        else name.rest
    )
    head, _, tail = rest.partition(".")
    block, _, norm = tail.partition(".")
    if head != "blocks" or norm not in WAN_NORMS:
        return None
    component = name.component if name.component not in (None, "") else "transformer"
    return f"{component}.blocks.{block}.{WAN_NORMS[norm]}"
