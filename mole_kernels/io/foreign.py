"""Layers in the names of a model's own code or of another tool: diffusers knows them, through each pipeline's
public `lora_state_dict`.

Its converters are asked the way that loses nothing: they see neither alphas nor names that are the model's
own, names that only one of its spellings covers are spelled so, and what comes out must weigh as much as what
went in.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, printable
from mole_kernels.experts.lowrank import LowRank, flatten
from mole_kernels.io.dialects.keys import parse_key, some_keys
from mole_kernels.io.dialects.paths import module_path, spelled, unflatten
from mole_kernels.io.layer_keys import LayerKeys, collect_layers, factors_of_layer
from mole_kernels.io.resolve import hint_of_family

KOHYA: dict[str, str] = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}
DOTTED: dict[str, str] = KOHYA | {"down": ".lora_A.weight", "up": ".lora_B.weight"}
# B in any spelling, xlabs' among them
UP = re.compile(r"(?:lora_B(?:\.[^.]+)?|lora_up|\.up)\.weight\Z")

# parts of the names of FLUX's and Wan's own code that hold an underscore, or none
BFL_PARTS = tuple(
    (
        "double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod qkv proj lin linear "
        "linear1 "
        "linear2 modulation img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer "
        "adaLN_modulation double_stream_modulation_img double_stream_modulation_txt single_stream_modulation"
    ).split()
)
WAN_PARTS = tuple(
    (
        "blocks self_attn cross_attn q k v o k_img v_img ffn time_projection time_embedding text_embedding "
        "head "
        "img_emb proj"
    ).split()
)
BFL_ROOT = re.compile(
    r"(?:(?:double|single)_blocks|(?:double|single)_stream_modulation(?:_img|_txt)?|(?:img|txt|time|vector|guidance)_in|final_layer)\b"
)
# these know their model's own code without any prefix
PLAIN_LOADERS = {"HunyuanVideoLoraLoaderMixin"}
DOTTED_LOADERS = {"Flux2LoraLoaderMixin", "WanLoraLoaderMixin", "SkyReelsV2LoraLoaderMixin"}


def convert_layers(
    layers: Sequence[LayerKeys],
    tensors: Mapping[str, Any],
    scale: Callable[[LayerKeys], float],
    converter: type,
    where: str,
) -> dict[str, LowRank]:
    """The layers under diffusers' names.

    One scale over all layers stays a number of its own; where scales differ, they go into B (one rounding in
    B's dtype) and the scale is 1.

    Args:
        layers: The foreign layers of one file.
        tensors: The file's tensors by key.
        scale: The scale of one of the layers.
        converter: A diffusers pipeline class.
        where: The file, for messages.

    Raises:
        MoleKeyError: The converter fails, or leaves something out.
    """
    cls: Any = converter
    loaders = {base.__name__ for base in cls.__mro__}
    scales = {layer.module: scale(layer) for layer in layers}
    alike = len(set(scales.values())) == 1
    spelled_tensors: dict[str, Tensor] = {}
    for layer in layers:
        for half, key in layer.keys.items():
            if half == "alpha":
                continue
            tensor = tensors[key]
            if half == "up" and not alike and scales[layer.module] != 1.0:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensor = (tensor.to(wide) * scales[layer.module]).to(tensor.dtype)
            spelled_tensors[_respelled(layer, half, key, loaders)] = tensor
    names = [spelled(layer.module).rest for layer in layers]
    with _listening() as messages:
        try:
            state = cls.lora_state_dict(dict(spelled_tensors))
        # the converters raise whatever their asserts and look-ups raise
        except Exception as error:
            raise MoleKeyError(
                where,
                f"{cls.__name__}.lora_state_dict cannot read it ({type(error).__name__}: "
                f"{printable(error, 300)})",
                hint=hint_of_family(names, cls.__name__, "is this file for another model?"),
            ) from error
    state = dict(state[0] if isinstance(state, tuple) else state)
    _check_nothing_lost(spelled_tensors, state, messages, cls.__name__, names, where)
    _swap_halves(state, names, loaders)
    converted = collect_layers({key: t for key, t in state.items() if not key.endswith(".alpha")}, where)
    out = {}
    for layer in converted:
        path, _ = module_path(layer.module, layer.ending)
        factors = factors_of_layer(layer, state, f"{where}, {printable(path)}")
        out[path] = LowRank(
            factors.down, factors.up, next(iter(scales.values())) if alike else 1.0, factors.conv
        )
    return out


def _check_nothing_lost(
    before_tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    messages: list[str],
    name: str,
    names: Sequence[str],
    where: str,
) -> None:
    """Converters rename, split and permute B, none of which changes ‖B‖ over the file; a layer left out
    does.
    """
    before, after = _weight(before_tensors), _weight(state)
    if math.isfinite(before) and abs(before - after) > 1e-5 * before:
        why = f", saying: {printable(messages[0], 300)}" if messages else ""
        raise MoleKeyError(
            where,
            f"{name}.lora_state_dict leaves out some of its {len(before_tensors)} keys{why}",
            hint=hint_of_family(names, name, "leaving them out would change the result"),
        )
    unknown = [key for key in state if parse_key(key) is None]
    if unknown:
        raise MoleKeyError(where, f"{name}.lora_state_dict does not know {some_keys(unknown)}")


def _weight(tensors: Mapping[str, Any]) -> float:
    """‖B‖² over the file."""
    ups = [t for key, t in tensors.items() if UP.search(key) and isinstance(t, Tensor)]
    return sum(up.detach().to(torch.float64).square().sum().item() for up in ups)


def _swap_halves(state: dict[str, Any], names: Sequence[str], loaders: set[str]) -> None:
    """FLUX's code has (shift, scale) in its last norm, diffusers (scale, shift): of FLUX.2 files its
    converter (0.42) leaves it so.
    """
    if "Flux2LoraLoaderMixin" in loaders and "final_layer_adaLN_modulation_1" in map(flatten, names):
        key = "transformer.norm_out.linear.lora_B.weight"
        state[key] = torch.cat(state[key].chunk(2)[::-1])


def _respelled(layer: LayerKeys, half: str, key: str, loaders: set[str]) -> str:
    """The spelling of a key that the converter reads whole: kohya's flat names for FLUX.1 and Z-Image (whose
    fused q, k, v it cuts only there), dotted names behind `diffusion_model.` for the others; PEFT's adapter
    names go.
    """
    name = spelled(layer.module)
    if layer.ending in ("xlabs", "processor"):
        return key
    bfl = BFL_ROOT.match(name.rest) is not None and ".processor." not in name.rest
    if "ZImageLoraLoaderMixin" in loaders or ("FluxLoraLoaderMixin" in loaders and (bfl or name.flat)):
        return f"lora_unet_{flatten(name.rest)}{KOHYA[half]}"
    if loaders & DOTTED_LOADERS and name.flat:
        parts = BFL_PARTS if "Flux2LoraLoaderMixin" in loaders else WAN_PARTS
        return f"diffusion_model.{unflatten(name.rest, parts)}{DOTTED[half]}"
    if name.flat:
        return f"lora_unet_{name.rest}{KOHYA[half]}"
    unnamed = name.component in (None, "", "transformer") and not loaders & PLAIN_LOADERS
    return f"{'diffusion_model.' if unnamed else name.prefix}{name.rest}{DOTTED[half]}"


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What diffusers' converters warn of, instead of on the screen."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    log, listener = logging.getLogger("diffusers.loaders.lora_conversion_utils"), Listener(logging.WARNING)
    propagate, log.propagate = log.propagate, False
    log.addHandler(listener)
    try:
        yield messages
    finally:
        log.removeHandler(listener)
        log.propagate = propagate
