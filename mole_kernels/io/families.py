"""Layers of adapter families beside LoRA, built from a file's parts.

LoHa, LoKr and full differences need nothing of the base, so they are read as the LoRA of the same ΔW: all
that takes a LoRA takes them, under every spelling of names, fused projections included. The others become
`AdapterFamily` objects, which the base's weight completes when a model is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import (
    MoleError,
    MoleKeyError,
    MoleShapeError,
    MoleTypeError,
    MoleValueError,
    printable,
)
from mole_kernels.experts.families.family import AdapterFamily, wide
from mole_kernels.experts.families.products import full_as_lora, loha_as_lora, lokr_as_lora
from mole_kernels.experts.families.scalings import IA3, OFT, Biased, Difference, DoRA, GLoRA
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.io.dialects.keys import some_keys
from mole_kernels.io.layer_keys import LayerKeys

PREFIX = "lora form of "


def as_lora(
    layers: Sequence[LayerKeys], tensors: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """Turn layers of other families into LoRA, in place.

    Args:
        layers: A file's layers; those of LoHa, LoKr and full differences get a "down" and an "up".
        tensors: The file's tensors by key.
        where: The file, for messages.

    Returns:
        The tensors with the new factors among them, and for each such module the rank that its alpha is
        divided by: its own writer's, not the LoRA's; 0 where alpha has no say.

    Raises:
        MoleShapeError: Parts that do not fit one another.
        MoleTypeError: A part of no floating dtype.
        MoleValueError: NaN or Inf.
    """
    extended: dict[str, Any] = dict(tensors)
    ranks: dict[str, int] = {}
    for layer in layers:
        build = _BUILDERS.get(layer.kind)
        if build is None or (layer.kind == "full" and not _is_matrix(layer, tensors)):
            continue
        parts = {
            name: _checked(f"{where}, '{printable(key)}'", tensors[key])
            for name, key in layer.keys.items()
            if name not in ("alpha", "bias", "magnitude")
        }
        try:
            down, up, rank = build(parts)
        except MoleError as error:
            raise MoleShapeError(
                f"{where}, {printable(layer.module)}",
                str(error).splitlines()[0],
                hint="its parts belong to different layers, or one of them is transposed",
            ) from error
        names = {half: f"{PREFIX}{layer.module}.lora_{half}.weight" for half in ("down", "up")}
        extended |= {names["down"]: down, names["up"]: up}
        ranks[layer.module] = rank
        layer.keys = {k: v for k, v in layer.keys.items() if k not in parts} | names
        layer.ending = layer.ending or "kohya"
        layer.kind = "lora"
    return extended, ranks


def _checked(where: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise MoleTypeError(
            where, expected="a tensor of floating dtype", got=getattr(tensor, "dtype", type(tensor))
        )
    if tensor.numel() and not bool(torch.isfinite(tensor.detach().float()).all()):
        raise MoleValueError(where, expected="finite values", got="NaN or Inf")
    return tensor.detach()


Parts = Mapping[str, Tensor]
_BUILDERS: dict[str, Callable[[Parts], tuple[Tensor, Tensor, int]]] = {
    "loha": loha_as_lora,
    "lokr": lokr_as_lora,
    "full": full_as_lora,
}


def _is_matrix(layer: LayerKeys, tensors: Mapping[str, Any]) -> bool:
    """Whether a full difference is that of a linear layer or a convolution, not of a norm."""
    return "diff" in layer.keys and getattr(tensors[layer.keys["diff"]], "ndim", 0) > 1


def has_family(layer: LayerKeys) -> bool:
    """Whether a layer, after `as_lora`, is more than A and B.

    Args:
        layer: Its keys.
    """
    return layer.kind != "lora" or not {"magnitude", "bias", "up_bias"}.isdisjoint(layer.keys)


def family_of(
    layer: LayerKeys,
    tensors: Mapping[str, Any],
    factors: LowRank | None,
    scale: float,
    settings: Mapping[str, Any],
    where: str,
) -> AdapterFamily:
    """The family of one layer.

    Args:
        layer: Its keys.
        tensors: The file's tensors by key.
        factors: Its A and B with their scale, where it has them.
        scale: alpha/r of its family.
        settings: PEFT's settings of the adapter; empty where there are none.
        where: File and layer, for messages.

    Raises:
        MoleTypeError, MoleValueError: A part that is no finite tensor.
    """
    part = {
        name: _checked(f"{where}, '{printable(key)}'", tensors[key])
        for name, key in layer.keys.items()
        if name not in ("down", "up", "mid", "alpha", "on_input")
    }
    if layer.kind == "norm" or (layer.kind == "full" and "diff" in part):
        return Difference(part.get("diff"), part.get("bias"))
    inner: LowRank | AdapterFamily | None = factors
    if layer.kind == "glora":
        inner = GLoRA(part["a1"], part["a2"], part["b1"], part["b2"], scale)
    elif layer.kind in ("oft", "boft"):
        inner = _rotation(layer, part, tensors, settings)
    elif layer.kind == "ia3":
        vector = part["l"]
        if "on_input" in layer.keys:
            return IA3(vector, bool(tensors[layer.keys["on_input"]]))
        # PEFT keeps l, [N,1…] of outputs and [1,C…] of inputs; LyCORIS keeps l − 1
        on_input = vector.dim() > 1 and vector.shape[0] == 1 and vector.numel() > 1
        return IA3(wide(vector).flatten() - 1, on_input, scales_bias=True)
    if "magnitude" in part:
        assert isinstance(inner, LowRank)
        magnitude = part["magnitude"]
        on_input = (
            magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude[0].numel() == magnitude.shape[1]
        )
        lycoris = layer.keys["magnitude"].endswith(".dora_scale")
        # PEFT's magnitude of a convolution is [1,N,1,1]
        inner = DoRA(inner, magnitude.flatten(), on_input and lycoris, "lycoris" if lycoris else "peft")
    if "up_bias" in part:
        return Biased(part["up_bias"], inner, factors.scale if factors is not None else 1.0)
    if "bias" in part:
        return Biased(part["bias"], inner)
    assert isinstance(inner, AdapterFamily)
    return inner


def _rotation(
    layer: LayerKeys, part: Mapping[str, Tensor], tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> OFT:
    if "R" in part:
        terms = int(settings.get("num_cayley_neumann_terms", 5)) if settings.get("use_cayley_neumann") else 0
        return OFT(part["R"], on_input=True, series=terms)
    blocks = part["blocks"]
    features = blocks.shape[-3] * blocks.shape[-2] if blocks.dim() > 2 else 0
    alpha = tensors[layer.keys["alpha"]] if "alpha" in layer.keys else 0.0
    return OFT(blocks, part.get("rescale"), float(alpha) * features)


def refuse_foreign_families(layers: Sequence[LayerKeys], where: str) -> None:
    """Refuse layers that only a converter of diffusers knows, and that are more than A and B.

    Args:
        layers: The file's foreign layers.
        where: The file, for messages.

    Raises:
        MoleKeyError: There are some.
    """
    keys = [key for layer in layers if has_family(layer) for key in layer.keys.values()]
    if keys:
        raise MoleKeyError(
            where,
            f"{len(keys)} keys have names that only diffusers' converter knows, and it takes plain LoRA "
            f"alone: {some_keys(keys)}",
            hint="spell its layers as diffusers' model does",
        )
