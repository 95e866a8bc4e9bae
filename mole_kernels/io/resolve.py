"""From the name that a file gives a module to the layer of the model: one order for every tool and model.

1. Wrappers and a tool's prefix come off (`dialects.paths.spelled`).
2. Names of text encoders and UNets are read by our own tables.
3. The model's own names, dotted or flat, are taken as they are: of the model at hand, of the pipeline's
   class, or, where neither is given, of the denoisers that have every layer of the file.
4. What is left is foreign: a converter's, or, without one, spelled as the file has it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, MoleWarning, printable
from mole_kernels.experts.lowrank import canonical_path, is_denoiser
from mole_kernels.io.dialects.families import FAMILIES, FLUX1, UNETS, families, titles
from mole_kernels.io.dialects.keys import some_keys
from mole_kernels.io.dialects.own import (
    OwnLayers,
    classes_with_layers,
    classes_with_loader,
    denoisers,
    own_layers_of_classes,
    own_layers_of_model,
)
from mole_kernels.io.dialects.paths import module_path, spelled
from mole_kernels.io.layer_keys import LayerKeys, same_half

# a diffusers pipeline or its class, a denoiser, "auto", or None
Pipeline = Any
# prefixes of tools whose names may be those of the model's own code
_TOOLS = re.compile(
    r"lora_unet_|(?:base_model\.model\.|model\.)?diffusion_model\.|(?:double|single|joint)_blocks\."
)


@dataclass(frozen=True)
class NameTarget:
    """What a file's names are resolved against.

    Attributes:
        converter: The diffusers pipeline class whose `lora_state_dict` knows foreign names; None: no
            converter.
        own: The model's own layers; None where they are not known.
        t5: The component that kohya's third text encoder is.
        second: Whether the pipeline holds a second denoiser beside its first.
    """

    converter: type | None = None
    own: OwnLayers | None = None
    t5: str = "text_encoder_3"
    second: bool = False


def resolve(
    layers: list[LayerKeys], entries: Mapping[str, Any], pipeline: Pipeline, where: str
) -> NameTarget:
    """Give every layer its path, in place, and say which are foreign.

    Args:
        layers: The layers of one file.
        entries: key -> anything with a `shape`: the file's tensors, or its header's entries.
        pipeline: A diffusers pipeline or its class, a denoiser, "auto", or None.
        where: The file, for messages.

    Returns:
        What the names were resolved against; its converter reads the layers marked foreign.

    Raises:
        MoleKeyError: Two names of one layer, an ambiguous flat name, a dialect that cannot be told.
        MoleTypeError: A pipeline that diffusers loads no LoRA into.
    """
    target = _target(layers, entries, pipeline, where)
    seen: dict[str, LayerKeys] = {}
    for layer in layers:
        _place(layer, target)
        other = seen.setdefault(canonical_path(layer.path), layer)
        if other is not layer and not layer.foreign and not other.foreign:
            first, second = (next(iter(entry.keys.values())) for entry in (other, layer))
            raise same_half(where, first, second, "down", layer.path)
    if target.converter is None and (strange := [layer for layer in layers if layer.ending == "xlabs"]):
        raise MoleKeyError(
            where,
            f"{len(strange)} layers have another tool's names: "
            f"{some_keys(layer.module for layer in strange)}",
            hint='load_expert(path, pipeline=…) with the pipeline or its class, or pipeline="auto"',
        )
    named = {spelled(layer.module).component for layer in layers}
    if target.second and not named & {"transformer", "transformer_2"} and any(map(_of_denoiser, named)):
        warnings.warn(
            f"{where}: the file names neither transformer nor transformer_2; its layers go to transformer, "
            "the "
            "denoiser of the first (noisy) steps. For the other, patch pipe.transformer_2 with it",
            MoleWarning,
            stacklevel=5,
        )
    return target


def needs_converter(pipeline: Pipeline) -> bool:
    """Whether a converter of diffusers reads the foreign names of this pipeline's files; our own tables read
    those of UNet pipelines.
    """
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    if not hasattr(cls, "lora_state_dict"):
        raise MoleTypeError(
            "load_expert, pipeline", expected="a diffusers pipeline with lora_state_dict", got=cls.__name__
        )
    return "unet" not in getattr(cls, "_lora_loadable_modules", ())


def pipeline_for(model: object) -> type | None:
    """The pipeline class whose LoRA files fit this bare denoiser, or None for a module that diffusers does
    not know.
    """
    for cls in type(_uncompiled(model)).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in denoisers():
            return getattr(importlib.import_module("diffusers"), denoisers()[cls.__name__]["pipeline"])
    return None


def pipeline_of_file(layers: list[LayerKeys], entries: Mapping[str, Any], where: str) -> type | None:
    """The pipeline class that the names tell, None where no converter is needed.

    Raises:
        MoleKeyError: The names do not tell; all candidates are named.
        MoleStateError: A converter is needed and diffusers is not installed.
    """
    candidates = families(_widths(layers, entries))
    if _own_layers_of_file(layers, candidates) is not None:
        return None
    by_pipeline = {FAMILIES[name].pipeline: name for name in candidates}
    if len(by_pipeline) != 1:
        if not any(_TOOLS.match(layer.module) for layer in layers):
            return None
        raise MoleKeyError(
            where,
            f"its dialect cannot be told: these keys are those of a {titles(candidates)}"
            if candidates
            else "its dialect is not known",
            hint="give the pipeline or its class: pipeline=diffusers.FluxPipeline, or --pipeline "
            "FluxPipeline",
        )
    (name,) = by_pipeline
    if name is None or set(candidates) & UNETS:
        return None
    if importlib.util.find_spec("diffusers") is None:
        raise MoleStateError(
            where,
            f"its names are those of a {titles(candidates)}, which diffusers converts",
            hint="pip install diffusers",
        )
    return getattr(importlib.import_module("diffusers"), name)


def _target(
    layers: list[LayerKeys], entries: Mapping[str, Any], pipeline: Pipeline, where: str
) -> NameTarget:
    if pipeline == "auto":
        pipeline = pipeline_of_file(layers, entries, where)
    if pipeline is None:
        candidates = families(_widths(layers, entries))
        t5 = "text_encoder_2" if candidates == (FLUX1,) else "text_encoder_3"
        return NameTarget(own=_own_layers_of_file(layers, candidates), t5=t5)
    if isinstance(pipeline, nn.Module):
        model, pipeline = _uncompiled(pipeline), pipeline_for(pipeline)
        if pipeline is None:
            raise MoleTypeError(
                "load_expert, pipeline",
                expected="a diffusers pipeline with lora_state_dict, its class, or a denoiser of diffusers",
                got=type(model).__name__,
            )
        return NameTarget(pipeline, own_layers_of_model(model), _t5(pipeline))
    if not needs_converter(pipeline):
        return NameTarget()
    if isinstance(pipeline, type):
        names = classes_with_loader(base.__name__ for base in pipeline.__mro__)
        return NameTarget(pipeline, own_layers_of_classes(names) if names else None, _t5(pipeline))
    parts = getattr(pipeline, "components", {})
    models = [_uncompiled(part) for name, part in parts.items() if _is_denoiser_part(name, part)]
    second = isinstance(parts.get("transformer_2"), nn.Module) and isinstance(
        parts.get("transformer"), nn.Module
    )
    return NameTarget(type(pipeline), own_layers_of_model(*models), _t5(type(pipeline)), second)


def _place(layer: LayerKeys, target: NameTarget) -> None:
    """Path, dialect and foreignness of one layer."""
    name = spelled(layer.module)
    layer.path, layer.dialect = module_path(layer.module, layer.ending)
    if layer.dialect == "mix_of_show" and "alpha" in layer.keys:
        layer.dialect = "kohya"
    if not _of_denoiser(name.component):
        if layer.module.startswith(("lora_te3_", "text_encoders.t5xxl.")):
            layer.path = f"{target.t5}.{layer.path.partition('.')[2]}"
        return
    own = target.own.find(name.rest) if target.own is not None else None
    if own is not None:
        # a bare model's names stay without component where nothing says that they are a pipeline's
        unnamed = not name.prefix and target.converter is None
        layer.path = own if unnamed else f"{name.component or 'transformer'}.{own}"
    layer.foreign = own is None and target.converter is not None


def _own_layers_of_file(layers: Iterable[LayerKeys], candidates: Iterable[str]) -> OwnLayers | None:
    """The layers of the denoisers that have every layer of the file, or None: its names are foreign or
    unknown.

    Args:
        layers: The file's layers.
        candidates: The families that its names allow.
    """
    names, xlabs = [], False
    for layer in layers:
        name = spelled(layer.module)
        xlabs = xlabs or layer.ending == "xlabs"
        if _of_denoiser(name.component):
            names.append(name.rest)
    if not names or xlabs or set(candidates) & UNETS:
        return None
    classes = classes_with_layers(names)
    loaders = {
        denoisers()[cls]["loader"] for cls in denoisers() if _pipeline_of(cls) in _pipelines(candidates)
    }
    if loaders:
        classes = tuple(cls for cls in classes if denoisers()[cls]["loader"] in loaders)
    return own_layers_of_classes(classes) if classes else None


def _pipelines(names: Iterable[str]) -> set[str | None]:
    return {FAMILIES[name].pipeline for name in names} - {None}


def _pipeline_of(cls: str) -> str:
    return denoisers()[cls]["pipeline"]


def _widths(layers: Iterable[LayerKeys], entries: Mapping[str, Any]) -> dict[str, int | None]:
    """The inputs of each layer of the denoiser, by its name without prefix."""
    widths: dict[str, int | None] = {}
    for layer in layers:
        name = spelled(layer.module)
        if _of_denoiser(name.component):
            shape = tuple(getattr(entries.get(layer.keys.get("down", "")), "shape", ()))
            widths[name.rest] = shape[1] if len(shape) > 1 else None
    return widths


def _t5(cls: type) -> Literal["text_encoder_2", "text_encoder_3"]:
    """kohya numbers text encoders by kind: the third is T5, which is a FLUX pipeline's second."""
    flux = any(base.__name__ == "FluxLoraLoaderMixin" for base in cls.__mro__)
    return "text_encoder_2" if flux else "text_encoder_3"


def _of_denoiser(component: str | None) -> bool:
    """Whether a name's component (`dialects.paths.Spelled`) is one of the pipeline's denoisers."""
    return is_denoiser(component) or component in ("", "transformer_2")


def _is_denoiser_part(name: str, part: object) -> bool:
    return isinstance(part, nn.Module) and (is_denoiser(name) or name == "transformer_2")


def _uncompiled(model: Any) -> Any:
    """The module inside torch.compile's wrapper, or itself."""
    return getattr(model, "_orig_mod", model)


def hint_of_family(names: Iterable[str], pipeline: str, otherwise: str) -> str:
    """What a file's names look like, where that is another model than this pipeline's; else `otherwise`."""
    candidates = families(dict.fromkeys(names))
    if not candidates or pipeline in _pipelines(candidates):
        return otherwise
    return f"these look like keys of a {titles(candidates)}; this is a {printable(pipeline, 60)}"
