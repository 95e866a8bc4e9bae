"""Account for every key of a LoRA file: each belongs to a layer, or is refused by the name of what it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleWarning, printable
from mole_kernels.experts.checks import checked_lowrank
from mole_kernels.experts.lazy import Size, stored_dtype
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.io.dialects.keys import Half, is_added, parse_key, some_keys, unsupported
from mole_kernels.io.dialects.kinds import what_keys_are
from mole_kernels.io.dialects.parts import ADDED, BESIDE, KINDS, Ending, KeyPart, Kind, parse_part

HALVES: dict[str, str] = {"down": "A (down)", "up": "B (up)"}
# kind of adapter -> the parts of it that layers are built from here; what a file has more is refused by name
_HALVES = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})
_BESIDE = frozenset({"alpha", "magnitude", "bias"})
COMPUTED: dict[Kind, frozenset[str]] = {
    "lora": frozenset({"down", "up", "mid", "up_bias"}) | _BESIDE,
    "loha": _HALVES | {"t1", "t2"} | _BESIDE,
    "lokr": _HALVES | {"w1", "w2", "t2"} | _BESIDE,
    "full": frozenset({"diff", "bias"}),
    "glora": frozenset({"a1", "a2", "b1", "b2", "bias"}),
    "oft": frozenset({"blocks", "rescale", "R", "bias"}),
    "boft": frozenset({"blocks", "rescale", "bias"}),
    "ia3": frozenset({"l", "on_input"}),
    "norm": frozenset({"diff", "bias"}),
}
# kind -> what a layer must have: of each row one of its sets, whole
REQUIRED: dict[Kind, tuple[tuple[frozenset[str], ...], ...]] = {
    "lora": ((frozenset({"down"}),), (frozenset({"up"}),)),
    "loha": tuple((frozenset({part}),) for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
    "lokr": tuple((frozenset({w}), frozenset({f"{w}_a", f"{w}_b"})) for w in ("w1", "w2")),
    "glora": tuple((frozenset({part}),) for part in ("a1", "a2", "b1", "b2")),
    "oft": ((frozenset({"blocks"}), frozenset({"R"}), frozenset({"blocks0"})),),
    "boft": ((frozenset({"blocks"}), frozenset({"R", "s"})),),
    "ia3": ((frozenset({"l"}),),),
    "full": ((frozenset({"diff"}), frozenset({"bias"})),),
    "norm": ((frozenset({"diff"}), frozenset({"bias"}), frozenset({"set"})),),
}
# what a header may ask for before its data are read: above any layer of a published model
MAX_RANK = 4096
MAX_FACTOR_BYTES = 8 * 2**30


@dataclass
class LayerKeys:
    """The keys of one module, as the file spells it, and what became known of it since.

    Attributes:
        module: The module's name in the file.
        keys: KeyPart (`dialects.parts.ENDINGS`) -> key; of a LoRA "down", "up", "mid" and "alpha".
        ending: Who ends its keys so.
        kind: What kind of adapter its parts make.
        path: The layer's dotted path, with its component where that is known; "" until it is resolved.
        dialect: The dialect that its name speaks.
        foreign: Whether only a converter knows its name.
    """

    module: str
    keys: dict[str, str] = field(default_factory=dict)
    ending: Ending = ""
    kind: Kind = "lora"
    path: str = ""
    dialect: str = ""
    foreign: bool = False


def account_for(
    tensors: Mapping[str, Any], where: str, read: Callable[[str], Tensor] | None = None
) -> list[LayerKeys]:
    """Every key of a file as part of a layer; differences that are all zero are left out, with a warning.

    Args:
        tensors: Tensors, or a header's entries, by key.
        where: The file, for messages.
        read: Reads the tensor under a key; None where `tensors` holds the tensors themselves.

    Raises:
        MoleKeyError: Keys of what is not computed here, that are none of an adapter's, that name a part
            twice, or whose layer misses another.
    """
    fetch: Callable[[str], Any] = read or tensors.__getitem__
    zero = [key for key in tensors if _adds(key) and _is_zero(fetch(key))]
    left = {key: tensor for key, tensor in tensors.items() if key not in set(zero)}
    _refuse({key: what for key in left if (what := unsupported(key))}, where)
    layers = collect_layers(left, where)
    _refuse(
        {
            key: BESIDE.get(part, KINDS[layer.kind]) if layer.kind != "norm" else BESIDE["set"]
            for layer in layers
            for part, key in layer.keys.items()
            if part not in COMPUTED.get(layer.kind, ()) and part != "alpha"
        },
        where,
    )
    check_complete(layers, where)
    if zero:
        warnings.warn(
            f"{where}: {len(zero)} differences are all zero and do nothing: {some_keys(zero)}; they are "
            "left out",
            MoleWarning,
            stacklevel=4,
        )
    return layers


def _refuse(refused: Mapping[str, str], where: str) -> None:
    """Refuse keys by what they belong to, if there are any."""
    if refused:
        kinds = ", ".join(sorted(set(refused.values())))
        raise MoleKeyError(
            where,
            f"{len(refused)} keys belong to {kinds}: {some_keys(refused)}",
            hint="leaving them out would change the result",
        )


def _adds(key: str) -> bool:
    """Whether the tensor under a key is added to what the model has, so that zeros do nothing."""
    part = parse_part(key)
    return is_added(key) if part is None else part.part in ADDED


def _is_zero(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and not tensor.is_meta
        and not bool(tensor.detach().to(torch.float32).any())
    )


def collect_layers(tensors: Mapping[str, Any], where: str) -> list[LayerKeys]:
    """The modules that the keys name, each with the parts of its adapter.

    Raises:
        MoleKeyError: A key that is none of an adapter's, or a part that is there twice or of two kinds.
    """
    layers: dict[str, LayerKeys] = {}
    kinds: dict[str, dict[Kind, str]] = {}
    unknown = []
    for key in tensors:
        parsed = _part_of(key, tensors)
        if parsed is None:
            unknown.append(key)
            continue
        module, part, kind, ending = parsed
        layer = layers.setdefault(module, LayerKeys(module))
        if part in layer.keys:
            raise same_half(where, layer.keys[part], key, part, module)
        layer.keys[part] = key
        if kind is not None:
            kinds.setdefault(module, {}).setdefault(kind, key)
            layer.ending = ending
    if unknown:
        text, hint = what_keys_are(unknown, tensors)
        raise MoleKeyError(
            where,
            f"{len(unknown)} of {len(tensors)} keys are not LoRA keys: {some_keys(unknown)}"
            + (f"; {text}" if text else ""),
            hint=hint,
        )
    for module, layer in layers.items():
        _set_kind(layer, kinds.get(module, {}), tensors, where)
    return list(layers.values())


def _part_of(key: str, tensors: Mapping[str, Any]) -> KeyPart | None:
    """The part that a key names, also where only its neighbours tell."""
    # LyCORIS calls IA3's vector as a layer calls its weight
    if key.endswith(".weight") and f"{key.removesuffix('weight')}on_input" in tensors:
        return KeyPart(key.removesuffix(".weight"), "l", "ia3", "")
    parsed = parse_part(key)
    # an alpha may stand behind a half's whole key
    if parsed is not None and parsed.part == "alpha" and (inner := parse_part(parsed.module)) is not None:
        return parsed._replace(module=inner.module)
    return parsed


def _set_kind(layer: LayerKeys, kinds: Mapping[Kind, str], tensors: Mapping[str, Any], where: str) -> None:
    if len(kinds) > 1:
        raise MoleKeyError(
            f"{where}, {printable(layer.module)}",
            f"is given two kinds of adapters: {' and '.join(KINDS[kind] for kind in kinds)}",
            expected="one kind on each layer",
            got=some_keys(kinds.values()),
        )
    alone: Kind = "full" if "bias" in layer.keys else "lora"
    layer.kind = next(iter(kinds), alone)
    # LyCORIS calls both the same; a butterfly's blocks have one more dimension, its stages
    if layer.kind == "oft" and len(getattr(tensors[next(iter(layer.keys.values()))], "shape", ())) == 4:
        layer.kind = "boft"


def check_complete(layers: Iterable[LayerKeys], where: str) -> None:
    """Refuse layers whose kind of adapter has parts that are not there.

    Raises:
        MoleKeyError: A part that is missing.
    """
    lacking: dict[str, list[str]] = {}
    for layer in layers:
        for choices in REQUIRED[layer.kind]:
            if not any(choice <= set(layer.keys) for choice in choices):
                parts = " or ".join(" and ".join(sorted(choice)) for choice in choices)
                name = HALVES.get(parts, f"{parts} of {KINDS[layer.kind]}")
                lacking.setdefault(name, []).append(next(iter(layer.keys.values())))
    for name, present in lacking.items():
        raise MoleKeyError(
            where,
            f"{len(present)} layers have no {name}: {some_keys(present)} stands alone",
            hint="the file is incomplete",
        )


def same_half(where: str, first: str, second: str, half: str, layer: str) -> MoleKeyError:
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
