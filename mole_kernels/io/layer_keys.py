"""Account for every key of a LoRA file: each belongs to a layer, or is refused by the name of what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, printable
from mole_kernels.experts.checks import checked_lowrank
from mole_kernels.experts.lazy import Size, stored_dtype
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.io.dialects.keys import Ending, Half, is_added, parse_key, some_keys, unsupported
from mole_kernels.io.dialects.kinds import what_keys_are

HALVES: dict[Half, str] = {"down": "A (down)", "up": "B (up)"}
# what a header may ask for before its data are read: above any layer of a published model
MAX_RANK = 4096
MAX_FACTOR_BYTES = 8 * 2**30


@dataclass
class LayerKeys:
    """The keys of one module, as the file spells it, and what became known of it since.

    Attributes:
        module: The module's name in the file.
        keys: Half -> key.
        ending: Who ends its keys so.
        path: The layer's dotted path, with its component where that is known; "" until it is resolved.
        dialect: The dialect that its name speaks.
        foreign: Whether only a converter knows its name.
    """

    module: str
    keys: dict[Half, str] = field(default_factory=dict)
    ending: Ending = ""
    path: str = ""
    dialect: str = ""
    foreign: bool = False


def refuse_unsupported(
    tensors: Mapping[str, Any], where: str, read: Callable[[str], Tensor] | None = None
) -> list[str]:
    """Refuse what this package does not compute; returns the keys of differences that are all zero.

    Args:
        tensors: Tensors, or a header's entries, by key.
        where: The file, for messages.
        read: Reads the tensor under a key; None where `tensors` holds the tensors themselves.

    Raises:
        MoleKeyError: Keys of DoRA, LoKr, biases, differences that are not zero, and the like.
    """
    strange = {key: what for key in tensors if (what := unsupported(key))}
    zero = [key for key in strange if is_added(key) and _is_zero(read(key) if read else tensors[key])]
    refused = {key: what for key, what in strange.items() if key not in zero}
    if refused:
        kinds = ", ".join(sorted(set(refused.values())))
        raise MoleKeyError(
            where,
            f"{len(refused)} keys belong to {kinds}: {some_keys(refused)}",
            hint="leaving them out would change the result",
        )
    return zero


def _is_zero(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and not tensor.is_meta
        and not bool(tensor.detach().to(torch.float32).any())
    )


def collect_layers(tensors: Mapping[str, Any], where: str) -> list[LayerKeys]:
    """The modules that the keys name, each with both halves.

    Raises:
        MoleKeyError: A key that is none of a LoRA's, a half that is missing or there twice.
    """
    layers: dict[str, LayerKeys] = {}
    unknown = []
    for key in tensors:
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        module, half, ending = parsed
        # an alpha may stand behind a half's whole key
        if half == "alpha" and (inner := parse_key(module)) is not None:
            module, ending = inner.module, inner.ending
        layer = layers.setdefault(module, LayerKeys(module))
        if half in layer.keys:
            raise same_half(where, layer.keys[half], key, half, module)
        layer.keys[half] = key
        if half in HALVES:
            layer.ending = ending
    if unknown:
        text, hint = what_keys_are(unknown, tensors)
        raise MoleKeyError(
            where,
            f"{len(unknown)} of {len(tensors)} keys are not LoRA keys: {some_keys(unknown)}"
            + (f"; {text}" if text else ""),
            hint=hint,
        )
    for half, name in HALVES.items():
        lacking = [layer for layer in layers.values() if half not in layer.keys]
        if lacking:
            present = [next(iter(layer.keys.values())) for layer in lacking]
            raise MoleKeyError(
                where,
                f"{len(lacking)} layers have no {name}: {some_keys(present)} stands alone",
                hint="the file is incomplete",
            )
    return list(layers.values())


def same_half(where: str, first: str, second: str, half: Half, layer: str) -> MoleKeyError:
    """The error of two keys that name one half of one layer."""
    return MoleKeyError(
        where,
        f"'{printable(first)}' and '{printable(second)}' both name the {HALVES.get(half, half)} of "
        f"{printable(layer)}",
        hint="keep one spelling of each layer",
    )


def size_from_shapes(layer: LayerKeys, entries: Mapping[str, Any], where: str) -> Size:
    """Sizes of one layer from the shapes alone, checked before any data are read.

    Args:
        layer: The layer's keys.
        entries: key -> anything with `shape` and `dtype`: a header's entry, or a tensor.
        where: File and layer, for messages.

    Raises:
        MoleShapeError: Shapes that are no A [R,K] and B [N,R], or a rank beyond any model's.
    """
    down, up = entries[layer.keys["down"]], entries[layer.keys["up"]]
    shapes = [
        tuple(half.shape[:2]) if tuple(half.shape[2:]) == (1, 1) else tuple(half.shape) for half in (down, up)
    ]
    if "mid" in layer.keys and len(shapes[0]) == 2:
        mid = tuple(entries[layer.keys["mid"]].shape)
        shapes[0] = (*shapes[0], *mid[2:]) if len(mid) == 4 and mid[:2] == (shapes[0][0],) * 2 else mid
    if len(shapes[0]) == 4:
        shapes[0] = (shapes[0][0], math.prod(shapes[0][1:]))
    if (
        any(len(shape) != 2 for shape in shapes)
        or shapes[0][0] != shapes[1][1]
        or 0 in (*shapes[0], *shapes[1])
    ):
        raise MoleShapeError(
            where,
            expected="A [R,K] and B [N,R] of one rank, of a linear layer or a convolution",
            got=f"A {list(down.shape)}, B {list(up.shape)}",
        )
    (R, K), N = shapes[0], shapes[1][0]
    _check_rank(where, R, N, K, max(down.dtype.itemsize, up.dtype.itemsize))
    return Size(N, K, R, stored_dtype([down.dtype, up.dtype]))


def check_header_ranks(entries: Mapping[str, Any], where: str) -> None:
    """Refuse ranks and factors beyond any model's by their shapes, before their data are read.

    Args:
        entries: key -> anything with `shape` and `dtype`.
        where: The file, for messages.

    Raises:
        MoleShapeError: A rank above both 4,096 and the layer's smaller side, or a factor of more than 8 GiB.
    """
    halves: dict[str, dict[Half, Any]] = {}
    for key, entry in entries.items():
        parsed = parse_key(key)
        if parsed is not None:
            halves.setdefault(parsed.module, {})[parsed.half] = entry
    for module, shapes in halves.items():
        if {"down", "up"} <= set(shapes) and all(len(shapes[half].shape) >= 2 for half in ("down", "up")):
            down, up = shapes["down"], shapes["up"]
            R, K, N = max(down.shape[0], up.shape[1]), math.prod(down.shape[1:]), up.shape[0]
            _check_rank(f"{where}, {printable(module)}", R, N, K, max(down.dtype.itemsize, up.dtype.itemsize))


def _check_rank(where: str, R: int, N: int, K: int, itemsize: int) -> None:
    most = max(min(N, K), MAX_RANK)
    if most < R:
        raise MoleShapeError(
            where,
            expected=f"a rank of at most {most:,} for a layer [{N:,},{K:,}]",
            got=f"{R:,}",
            hint="ΔW has at most the rank of the smaller side of W; nothing of the file's data was read",
        )
    if max(R * K, N * R) * itemsize > MAX_FACTOR_BYTES:
        raise MoleShapeError(
            where,
            expected=f"factors of at most {MAX_FACTOR_BYTES:,} bytes",
            got=f"A [{R:,},{K:,}], B [{N:,},{R:,}]",
            hint="nothing of the file's data was read",
        )


def factors_of_layer(layer: LayerKeys, tensors: Mapping[str, Any], where: str) -> LowRank:
    """The layer's factors with scale 1; the core of a LoCon is multiplied into A.

    Raises:
        MoleTypeError: A dtype that no factor has.
        MoleShapeError: No two matrices of one rank.
        MoleValueError: NaN or Inf.
    """
    down = tensors[layer.keys["down"]].detach()
    if "mid" in layer.keys:
        down = _with_core(f"{where}, lora_mid", tensors[layer.keys["mid"]].detach(), down)
    return checked_lowrank(where, down, tensors[layer.keys["up"]].detach())


def _with_core(where: str, mid: Tensor, down: Tensor) -> Tensor:
    """A [R,K,kh,kw] of LoCon's three convolutions: 1×1 down [R,K,1,1], then a core mid [R,R,kh,kw]; the 1×1
    up stays B.
    """
    R = down.shape[0] if down.dim() else 0
    if (
        mid.dim() != 4
        or tuple(mid.shape[:2]) != (R, R)
        or down.dim() not in (2, 4)
        or down.numel() != R * down.shape[1]
    ):
        raise MoleShapeError(
            where,
            expected="a core [R,R,kh,kw] behind A [R,K,1,1]",
            got=f"{list(mid.shape)} behind {list(down.shape)}",
        )
    if not mid.is_floating_point():
        raise MoleTypeError(where, expected="a core of floating dtype", got=mid.dtype)
    wide = torch.promote_types(mid.dtype, torch.float32)
    return torch.einsum("rshw,sk->rkhw", mid.to(wide), down.flatten(1).to(wide)).to(down.dtype)
