"""One expert from a LoRA file, whoever wrote it, and back into one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleWarning, printable
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.checks import checked_alpha, checked_lowrank
from mole_kernels.experts.format import FORMAT, bank_from_tensors
from mole_kernels.experts.lowrank import Expert, LowRank, flatten
from mole_kernels.experts.scales import scale_of
from mole_kernels.experts.shared import store_once
from mole_kernels.files.reader import PathLike, read_tensors
from mole_kernels.io.adapter_config import AdapterConfig
from mole_kernels.io.dialects.keys import parse_key, some_keys, unsupported
from mole_kernels.io.dialects.paths import module_path
from mole_kernels.io.foreign import convert_with_pipeline, is_foreign, needs_pipeline, pipeline_of_file

HALVES = {"down": "A (down)", "up": "B (up)"}


@dataclass
class LayerKeys:
    """What the keys of one layer said so far."""

    path: str
    keys: dict[str, str] = field(default_factory=dict)
    dialect: str = ""


def load_expert(
    source: PathLike | Mapping[str, Tensor], *, pipeline: Any = None, alpha: float | None = None
) -> Expert:
    """An expert from a safetensors file or a mapping of tensors; the dialect is detected, nothing in the file
    is left out in silence.

    source    diffusers or PEFT keys of any age, kohya (SD 1.x, 2.x, SDXL), Mix-of-Show, or a single file of
              ours with one expert
    pipeline  a diffusers pipeline or its class: files of other models go through its public
              `lora_state_dict`; "auto" tells the class
              from the keys where they need one. Without it, kohya's names of such models stay flat and BFL's
              stay BFL's
    alpha     the alpha of a Mix-of-Show file, which does not hold it: its scale is alpha itself (default 1)
    Scale: alpha/R (kohya, PEFT), alpha/√R where PEFT's metadata says rsLoRA, 1 where there is no alpha.
    Raises MoleFileError, MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError; warns of alpha 0.
    """
    if isinstance(source, Mapping):
        tensors, metadata, name = dict(source), dict[str, str](), "state dict"
    elif isinstance(source, str | os.PathLike):
        tensors, metadata = read_tensors(source)
        name = os.fsdecode(source)
    else:
        raise MoleTypeError(
            "load_expert", expected="a path or a mapping of tensors", got=type(source).__name__
        )
    return expert_from_tensors(tensors, metadata, name, pipeline=pipeline, alpha=alpha)


def expert_from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    *,
    pipeline: Any = None,
    alpha: float | None = None,
) -> Expert:
    """`load_expert` on what was already read."""
    where = printable(source, 300)
    if metadata.get("format") == FORMAT:
        bank = bank_from_tensors(tensors, metadata, source)[0]
        return _only(bank, where)
    if not tensors:
        raise MoleKeyError(where, "holds no tensors")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not (
            isinstance(tensor, Tensor) or (str(key).endswith(".alpha") and isinstance(tensor, int | float))
        ):
            raise MoleTypeError(
                f"{where}, '{printable(key)}'", expected="a tensor under a str", got=type(tensor).__name__
            )
    refuse_unsupported(tensors, where)
    if pipeline == "auto":
        pipeline = pipeline_of_file(tensors, where)
    if pipeline is not None and needs_pipeline(pipeline):
        tensors = convert_with_pipeline(tensors, pipeline, where)
    layers = collect_layers(tensors, where)
    config = AdapterConfig.from_metadata(metadata, where)
    found, dialects = {}, set()
    for layer in layers:
        found[layer.path] = layer_of(layer, tensors, config, where, alpha)
        dialects.add(layer.dialect)
    zero = [path for path, layer in found.items() if layer.scale == 0]
    if zero:
        warnings.warn(
            f"{where}: alpha is 0 on {len(zero)} layers, which do nothing: {some_keys(zero)}",
            MoleWarning,
            stacklevel=3,
        )
    return Expert(
        store_once(found), dialect="+".join(sorted(dialects)), source=source, metadata=dict(metadata)
    )


def _only(bank: ExpertBank, where: str) -> Expert:
    if len(bank) != 1:
        raise MoleKeyError(
            where,
            f"holds {len(bank)} experts: {', '.join(bank.names)}",
            hint="read it with mole_kernels.ExpertBank.load",
        )
    return bank.experts[bank.names[0]]


def refuse_unsupported(tensors: Mapping[str, Any], where: str) -> None:
    found = {key: what for key in tensors if (what := unsupported(key))}
    if found:
        kinds = ", ".join(sorted(set(found.values())))
        raise MoleKeyError(
            where,
            f"{len(found)} keys belong to {kinds}: {some_keys(found)}",
            hint="leaving them out would change the result",
        )


def collect_layers(tensors: Mapping[str, Any], where: str) -> list[LayerKeys]:
    """The layers that the keys name, each with both halves."""
    layers: dict[str, LayerKeys] = {}
    strangers = []
    for key in tensors:
        part = parse_key(key)
        if part is None:
            strangers.append(key)
            continue
        module, half, ending = part
        inner = parse_key(module) if half == "alpha" else None
        path, dialect = module_path(inner.module if inner else module, inner.dialect if inner else ending)
        layer = layers.setdefault(flatten(path), LayerKeys(path))
        if half in layer.keys:
            raise MoleKeyError(
                where,
                f"'{printable(layer.keys[half])}' and '{printable(key)}' both name the {HALVES.get(half, half)} of {printable(path)}",
                hint="keep one spelling of each layer",
            )
        layer.keys[half] = key
        if half in HALVES:
            layer.dialect = dialect
    if strangers:
        raise MoleKeyError(
            where,
            f"{len(strangers)} of {len(tensors)} keys are not LoRA keys: {some_keys(strangers)}",
            hint=_hint(strangers),
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


def layer_of(
    layer: LayerKeys, tensors: Mapping[str, Any], config: AdapterConfig, where: str, alpha: float | None
) -> LowRank:
    at = f"{where}, {printable(layer.path)}"
    down = tensors[layer.keys["down"]].detach()
    if "mid" in layer.keys:
        down = _with_core(f"{at}, lora_mid", tensors[layer.keys["mid"]].detach(), down)
    pair = checked_lowrank(at, down, tensors[layer.keys["up"]].detach())
    if "alpha" in layer.keys:
        if config:
            raise MoleKeyError(
                where, "has both alpha keys and PEFT metadata", hint="one of them must give the scale"
            )
        scale = scale_of(
            "kohya",
            checked_alpha(f"{where}, '{printable(layer.keys['alpha'])}'", tensors[layer.keys["alpha"]]),
            pair.rank,
        )
    elif layer.dialect == "mix_of_show":
        scale = scale_of("mix_of_show", alpha, pair.rank)
    else:
        scale = config.scale(layer.path, pair.rank, at)
    return LowRank(pair.down, pair.up, scale, pair.conv)


def _with_core(where: str, mid: Tensor, down: Tensor) -> Tensor:
    """A [R,K,kh,kw] of LoCon's three convolutions: 1×1 down [R,K,1,1], then a core mid [R,R,kh,kw]; the 1×1
    up is B as ever.
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


def _hint(strangers: list[str]) -> str:
    if any(".softmoe." in key for key in strangers):
        return "this is a gate file: give it as gates, or read it with mole_kernels.io.load_gates"
    if is_foreign(strangers):
        return 'these are another tool\'s names: load_expert(path, pipeline=…) with the pipeline or its class, or pipeline="auto"'
    return "mole-kernels inspect says what the file is"
