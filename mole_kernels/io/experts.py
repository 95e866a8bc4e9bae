"""Read one expert from a LoRA file of any tool."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleTypeError, MoleWarning, printable
from mole_kernels.experts.families.family import AdapterFamily
from mole_kernels.experts.format import FORMAT, experts_from_tensors
from mole_kernels.experts.lowrank import Expert, LowRank, canonical_path
from mole_kernels.experts.shared import store_once
from mole_kernels.files.opening import PathLike
from mole_kernels.files.reader import read_tensors
from mole_kernels.io.adapter_config import AdapterConfig
from mole_kernels.io.dialects.keys import some_keys
from mole_kernels.io.families import as_lora, family_of, has_family, refuse_foreign_families
from mole_kernels.io.foreign import convert_layers
from mole_kernels.io.foreign_families import family_paths, mark_foreign_norms
from mole_kernels.io.layer_keys import (
    LayerKeys,
    account_for,
    check_header_ranks,
    factors_of_layer,
    same_half,
)
from mole_kernels.io.resolve import Pipeline, resolve
from mole_kernels.io.source import AdapterSource, find_adapter
from mole_kernels.io.strength import Strength, strength_of, written_path


def load_expert(
    source: PathLike | Mapping[str, Tensor], *, pipeline: Pipeline = None, alpha: float | None = None
) -> Expert:
    """Read an expert from a file, a folder or a mapping of tensors; nothing in it is left out in silence.

    ΔW = scale · up · down for each layer, with scale = alpha/R (kohya, PEFT), alpha/√R (rsLoRA), or 1 where
    the file gives no alpha. Alphas are read from the tensors, from PEFT's settings in the header, and from an
    `adapter_config.json` beside the file.

    Args:
        source: A safetensors file (or the index of a sharded one), an adapter's folder, or tensors by key.
            diffusers' and PEFT's keys of any age, kohya's, those of a model's own code, Mix-of-Show's, or a
            single file of ours with one expert. The dialect is told from the keys.
        pipeline: What the names are resolved against: a diffusers pipeline or its class, or a denoiser;
            "auto" tells the class from the keys where they need one. Without it, names that only a converter
            of diffusers knows stay as the file has them.
        alpha: The scale itself of a Mix-of-Show file, which does not hold it (default 1).

    Returns:
        The expert; its paths are diffusers' names of the layers, with their component where the file tells
        it.

    Raises:
        MoleFileError: The file is broken, or is not what it says it is.
        MoleKeyError: Keys of something that is not supported, that name a layer twice, or miss their other
            half.
        MoleShapeError: Factors that do not fit each other.
        MoleTypeError: A dtype that factors do not have, or a source that is none of the above.
        MoleValueError: NaN or Inf.

    Example:
        >>> load_expert("face.safetensors").scales()
        {0.5}
    """
    if isinstance(source, Mapping):
        return expert_from_tensors(dict(source), {}, "state dict", pipeline=pipeline, alpha=alpha)
    if not isinstance(source, str | os.PathLike):
        raise MoleTypeError(
            "load_expert", expected="a path or a mapping of tensors", got=type(source).__name__
        )
    adapter = find_adapter(source)
    where = printable(source, 300)
    tensors, metadata = read_tensors(
        adapter.weights, check=lambda header: check_header_ranks(header.entries, where)
    )
    return expert_from_tensors(
        tensors, metadata, os.fsdecode(source), pipeline=pipeline, alpha=alpha, beside=adapter
    )


def expert_from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    *,
    pipeline: Pipeline = None,
    alpha: float | None = None,
    beside: AdapterSource | None = None,
) -> Expert:
    """`load_expert` on what was already read.

    Args:
        tensors: Tensors by key.
        metadata: The header's metadata.
        source: The file, for messages.
        pipeline: As `load_expert`'s.
        alpha: As `load_expert`'s.
        beside: The file with the settings that lie beside it.
    """
    where = printable(source, 300)
    if metadata.get("format") == FORMAT:
        return _only(experts_from_tensors(tensors, metadata, source)[0], where)
    if not tensors:
        raise MoleKeyError(where, "holds no tensors")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not (
            isinstance(tensor, Tensor) or (str(key).endswith(".alpha") and isinstance(tensor, int | float))
        ):
            raise MoleTypeError(
                f"{where}, '{printable(key)}'", expected="a tensor under a str", got=type(tensor).__name__
            )
    layers = account_for(tensors, where)
    tensors, alpha_ranks = as_lora(layers, tensors, where)
    target = resolve(layers, tensors, pipeline, where)
    mark_foreign_norms(layers)
    strength = strength_of(layers, metadata, settings_beside(beside, layers, where), alpha, where)

    def scale(layer: LayerKeys) -> float:
        # of GLoRA b2 is as A is
        rows = tensors[layer.keys[next(half for half in ("down", "b2") if half in layer.keys)]]
        rank = alpha_ranks.get(layer.module, rows.shape[0] if rows.dim() else 1)
        alpha_value = tensors[layer.keys["alpha"]] if "alpha" in layer.keys else None
        if not rank:
            # PEFT divides by its r whether a half is factored or not
            rank = strength.config.rank(written_path(layer))
        return strength.scale(layer, alpha_value, max(rank, 1), where) if rank else 1.0

    read: dict[str, LowRank] = {}
    families: dict[str, AdapterFamily] = {}
    for layer in layers:
        if layer.foreign:
            continue
        at, factors = f"{where}, {printable(layer.path)}", None
        if "down" in layer.keys:
            factors = replace(factors_of_layer(layer, tensors, at), scale=scale(layer))
        if has_family(layer):
            number = scale(layer) if layer.kind == "glora" else 1.0
            families[layer.path] = family_of(layer, tensors, factors, number, strength.config.settings(), at)
        elif factors is not None:
            read[layer.path] = factors
    foreign = [layer for layer in layers if layer.foreign]
    if foreign and target.converter is not None:
        converted, others = _converted(foreign, tensors, scale, target.converter, strength, where)
        read, families = _together(read, converted, where), families | others
    else:
        refuse_foreign_families(foreign, where)
    warn_of_zero_scales(read, where)
    return Expert(
        store_once(read),
        dialect="+".join(sorted({layer.dialect or "foreign" for layer in layers})),
        source=source,
        metadata=dict(metadata),
        strength=strength.origin,
        families=families,
    )


def _converted(
    layers: list[LayerKeys],
    tensors: Mapping[str, Any],
    scale: Callable[[LayerKeys], float],
    converter: type,
    strength: Strength,
    where: str,
) -> tuple[dict[str, LowRank], dict[str, AdapterFamily]]:
    """What a converter of diffusers makes of layers: A and B by path, and the other families."""
    more = [layer for layer in layers if has_family(layer)]
    paths = family_paths(more, tensors, converter, where) if more else {}
    halves = ("down", "up", "mid", "alpha")
    plain = [
        replace(layer, keys={name: key for name, key in layer.keys.items() if name in halves})
        for layer in layers
        if "down" in layer.keys
    ]
    read = convert_layers(plain, tensors, scale, converter, where) if plain else {}
    families: dict[str, AdapterFamily] = {}
    for layer in more:
        path = paths[layer.module]
        number = scale(layer) if layer.kind == "glora" else 1.0
        at, settings = f"{where}, {printable(path)}", strength.config.settings()
        families[path] = family_of(layer, tensors, read.pop(path, None), number, settings, at)
    return read, families


def settings_beside(
    beside: AdapterSource | None, layers: list[LayerKeys], where: str
) -> AdapterConfig | None:
    """PEFT's settings that lie beside a file, where they are its own.

    A file with alphas of its own whose folder holds other files too needs none.

    Raises:
        MoleKeyError: Settings that change the scale, and may be another file's.
    """
    if beside is None or beside.config is None:
        return None
    if not beside.sure and any("alpha" in layer.keys for layer in layers):
        return None
    config = beside.settings(where)
    part = next(iter(config.parts.values()), {}) if config else {}
    if not beside.sure and (part.get("alpha_pattern") or part.get("lora_alpha") != part.get("r")):
        raise MoleKeyError(
            where,
            f"beside it lies {config.origin.partition(' ')[0] if config else ''} with alpha "
            f"{printable(part.get('lora_alpha'), 20)} for r {printable(part.get('r'), 20)}, and other "
            "files that it may "
            "belong to",
            hint="keep each adapter in a folder of its own",
        )
    return config


def layer_from_tensors(
    layer: LayerKeys, tensors: Mapping[str, Any], strength: Strength, where: str
) -> LowRank:
    """One layer's factors and scale."""
    factors = factors_of_layer(layer, tensors, f"{where}, {printable(layer.path)}")
    alpha_value = tensors[layer.keys["alpha"]] if "alpha" in layer.keys else None
    return LowRank(
        factors.down, factors.up, strength.scale(layer, alpha_value, factors.rank, where), factors.conv
    )


def warn_of_zero_scales(layers: Mapping[str, LowRank], where: str) -> None:
    """Warn of layers that do nothing."""
    zero = [path for path, layer in layers.items() if layer.scale == 0]
    if zero:
        warnings.warn(
            f"{where}: alpha is 0 on {len(zero)} layers, which do nothing: {some_keys(zero)}",
            MoleWarning,
            stacklevel=4,
        )


def _together(own: dict[str, LowRank], converted: dict[str, LowRank], where: str) -> dict[str, LowRank]:
    seen = {canonical_path(path): path for path in own}
    for path in converted:
        other = seen.get(canonical_path(path))
        if other is not None:
            raise same_half(where, other, path, "down", path)
    return own | converted


def _only(experts: Mapping[str, Expert], where: str) -> Expert:
    if len(experts) != 1:
        raise MoleKeyError(
            where,
            f"holds {len(experts)} experts: {', '.join(experts)}",
            hint="read it with mole_kernels.ExpertBank.load",
        )
    return next(iter(experts.values()))
