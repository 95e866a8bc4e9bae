"""Scales by component and by block, in the shapes that diffusers' `set_adapters` takes.

    0.8                                                          everywhere
    {"unet": 0.8, "text_encoder": 0.4}                           by component of a pipeline; others 1.0
    {"unet": {"down": 0.5, "mid": 1.0, "up": {"block_0": 0.2}}}  by block of a UNet; others 1.0
    {"down": 0.5, "up": {"block_1": [0.4, 0.8, 1.0]}}            the same of the only denoiser
    {"transformer": {"transformer_blocks.0": 0.5}}               by the name of a block of any other model;
    others 1.0

A block's name counts where it stands for whole parts of a layer's path: "transformer_blocks.1" is neither
"transformer_blocks.10" nor "single_transformer_blocks.1" (diffusers looks for the text anywhere in the path).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.files.limits import finite
from mole_kernels.modules.scan import COMPONENTS, roots

# what a caller gives: a number, or numbers by component or block
Scale: TypeAlias = float | Mapping[str, Any]
# what layers get: one scale for all, or one for each by its path
LayerScale: TypeAlias = float | Mapping[str, float]


def scale_at(scale: LayerScale, path: str) -> float:
    """The scale on the layer at `path`."""
    return scale[path] if isinstance(scale, Mapping) else scale


def check_scales(scales: object, names: Sequence[str]) -> dict[str, Scale]:
    """Scales as finite floats, or mappings of such, for adapters that exist.

    Raises:
        MoleTypeError: `scales` is no mapping, or a scale no number and no mapping.
        MoleValueError: An unknown adapter, or a number that float32 cannot hold.
    """
    if not isinstance(scales, Mapping):
        raise MoleTypeError("scales", expected="{adapter name: scale}", got=type(scales).__name__)
    for name, scale in scales.items():
        if name not in names:
            raise MoleValueError(
                "scales", expected=f"scales for the adapters {', '.join(names)}", got=f"one for {name!r}"
            )
        if isinstance(scale, list | tuple):
            raise MoleTypeError(
                f"scale of {name!r}",
                expected="a number, or a mapping by component or block",
                got=f"a list of {len(scale)}",
                hint='{"unet": 0.8, "text_encoder": 0.4}, or {"down": 0.5, "mid": 1.0, "up": 0.7}',
            )
        _check_numbers(f"scale of {name!r}", scale)
    return {
        name: dict(scale) if isinstance(scale, Mapping) else float(scale) for name, scale in scales.items()
    }


def _check_numbers(where: str, scale: object) -> None:
    """A finite number, or lists and mappings of such."""
    if isinstance(scale, Mapping | list | tuple):
        for inner in scale.values() if isinstance(scale, Mapping) else scale:
            _check_numbers(where, inner)
        return
    try:
        number = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise MoleTypeError(where, expected="a number", got=type(scale).__name__) from None
    except OverflowError:
        number = math.inf
    # scales are kept in float32
    if not finite(number, torch.float32):
        raise MoleValueError(where, expected="a finite number", got=number, hint="scales are kept in float32")


def layer_scales(name: str, scale: Scale, model: object, paths: Iterable[str]) -> LayerScale:
    """One adapter's scale as the patched layers at `paths` take it.

    Args:
        name: The adapter, for messages.
        scale: A number, or a mapping as at the top of this module; checked by `check_scales`.
        model: The patched module or pipeline.
        paths: Paths of the layers that hold the adapter.

    Returns:
        The number itself, or {path: number}.

    Raises:
        MoleValueError: A component or block that the model or the adapter lacks, or components and blocks
        mixed.
        MoleStateError: Blocks without a component where the model has no denoiser, or more than one.
    """
    if not isinstance(scale, Mapping):
        return scale
    where, paths = f"scale of {name!r}", list(paths)
    parts = roots(model)
    by_component = _by_component(where, scale, parts)
    result = dict.fromkeys(paths, 1.0)
    for component, inner in by_component.items():
        prefix = f"{component}." if component else ""
        here = [path for path in paths if path.startswith(prefix)]
        if not here:
            raise MoleValueError(
                where,
                f"this adapter has no layers in {component}",
                hint=f"its layers lie in {', '.join(sorted({p.partition('.')[0] for p in paths}))}",
            )
        if isinstance(inner, Mapping):
            result |= _by_block(where, inner, parts[component], here, prefix)
        elif isinstance(inner, list | tuple):
            raise MoleTypeError(
                where, expected=f"a number, or blocks of {component}", got=f"a list of {len(inner)}"
            )
        else:
            result |= dict.fromkeys(here, float(inner))
    return result


def _by_component(where: str, scale: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """{component: number or blocks}; blocks alone are those of the only denoiser."""
    named = [key for key in scale if key in parts and key]
    if len(named) == len(scale) and named:
        return dict(scale)
    if named:
        others = ", ".join(repr(key) for key in scale if key not in parts)
        raise MoleValueError(
            where,
            expected="components or blocks, not both",
            got=f"{', '.join(map(repr, named))} beside {others}",
        )
    if "" in parts:
        return {"": scale}
    if all(key in COMPONENTS or key in ("te", "te1", "te2", "text", "clip", "model") for key in scale):
        raise MoleValueError(
            where,
            expected=f"components of this pipeline ({', '.join(parts)})",
            got=", ".join(map(repr, scale)),
        )
    denoisers = [key for key in parts if key in COMPONENTS and not key.startswith("text_encoder")]
    if len(denoisers) != 1:
        raise MoleStateError(
            where,
            expected="one denoiser, for scales by block",
            got=f"{len(denoisers)} in the patched model",
            hint=f"name the component: {{{(denoisers or ['unet'])[0]!r}: {{…}}}}",
        )
    return {denoisers[0]: scale}


def _by_block(
    where: str, blocks: Mapping[str, Any], root: nn.Module, paths: Sequence[str], prefix: str
) -> dict[str, float]:
    """{path: scale} by diffusers' rules for a UNet, by the names of blocks for every other model."""
    if hasattr(root, "down_blocks") and hasattr(root, "up_blocks"):
        expanded = _expanded(where, blocks, root)
        return {path: _of_layer(path.removeprefix(prefix), expanded) for path in paths}
    result = dict.fromkeys(paths, 1.0)
    # the first block named wins, as in diffusers: written last
    for block, number in reversed(list(blocks.items())):
        if isinstance(number, Mapping | list | tuple):
            raise MoleTypeError(
                where, expected=f"a number for the block {block!r}", got=type(number).__name__
            )
        inside = [path for path in paths if f".{block}." in f".{path.removeprefix(prefix)}."]
        if not inside:
            known = sorted({_block_of(path.removeprefix(prefix)) for path in paths})
            raise MoleValueError(
                where,
                f"no layer of this adapter lies in a block {block!r}",
                hint=f"its layers lie in {', '.join(known[:6])}{' …' if len(known) > 6 else ''}",
            )
        result |= dict.fromkeys(inside, float(number))
    return result


def _block_of(path: str) -> str:
    parts = path.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:end])


def _expanded(where: str, blocks: Mapping[str, Any], unet: nn.Module) -> Mapping[str, float]:
    """What a block is, what is left out (1.0) and which scale a layer gets: by diffusers' own function."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    unknown = [key for key in blocks if key not in ("down", "mid", "up")]
    if unknown:
        raise MoleValueError(
            where, expected='blocks of a UNet: "down", "mid", "up"', got=", ".join(map(repr, unknown))
        )
    try:
        (expanded,) = _maybe_expand_lora_scales(cast(Any, unet), [dict(blocks)])
    # diffusers says what is wrong, in errors of several types
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise MoleValueError(
            where,
            f"scales by block that do not fit this UNet: {error}",
            hint='{"down": …, "mid": …, "up": …}',
        ) from error
    for block, scale in expanded.items():
        if isinstance(scale, Mapping | list | tuple):
            raise MoleTypeError(where, expected=f"a number for {block}", got=type(scale).__name__)
    return expanded


def _of_layer(path: str, expanded: Mapping[str, float]) -> float:
    for block, scale in expanded.items():
        if block in path:
            return float(scale)
    parts = path.split(".")
    # a resnet's layers follow the attention beside it, as in diffusers
    return float(expanded.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0)) if len(parts) > 3 else 1.0
