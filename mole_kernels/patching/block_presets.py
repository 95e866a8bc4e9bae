"""Scales by block that are known by a name: what a LoRA of SDXL gives to content, and what to style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_kernels.errors import MoleValueError
from mole_kernels.patching.block_scales import Scale

# B-LoRA (Frenkel et al., ECCV 2024): the two attentions of SDXL's first up block that hold content and style
_CONTENT = {"down": 0.0, "mid": 0.0, "up": {"block_0": [1.0, 0.0, 0.0], "block_1": 0.0}}
_STYLE = {"down": 0.0, "mid": 0.0, "up": {"block_0": [0.0, 1.0, 0.0], "block_1": 0.0}}
BLOCK_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sdxl-content": _CONTENT,
    "sdxl-style": _STYLE,
    "sdxl-both": {"down": 0.0, "mid": 0.0, "up": {"block_0": [1.0, 1.0, 0.0], "block_1": 0.0}},
    "no-mid": {"down": 1.0, "mid": 0.0, "up": 1.0},
    "up-only": {"down": 0.0, "mid": 0.0, "up": 1.0},
    "down-only": {"down": 1.0, "mid": 0.0, "up": 0.0},
}


def block_preset(name: str, strength: float = 1.0) -> Scale:
    """A scale for `set_scales` and `patch`, by block of a UNet.

        handle.set_scales({"cat": block_preset("sdxl-content"), "ink": block_preset("sdxl-style", 0.8)})

    Args:
        name: One of `BLOCK_PRESETS`.
        strength: Multiplies every number of it.

    Raises:
        MoleValueError: Another name, or a strength that is not finite.

    Source: B-LoRA (Frenkel et al., ECCV 2024), which trains these blocks alone; here a whole LoRA is cut
    down to them. As in diffusers' shapes, what stands outside the attention blocks keeps its scale.
    """
    if name not in BLOCK_PRESETS:
        raise MoleValueError("block_preset", expected=f"one of {', '.join(BLOCK_PRESETS)}", got=repr(name))
    if not abs(strength) < float("inf"):
        raise MoleValueError("block_preset: strength", expected="a finite number", got=strength)
    return {"unet": _times(BLOCK_PRESETS[name], strength)}


def _times(value: Any, strength: float) -> Any:
    if isinstance(value, Mapping):
        return {key: _times(inner, strength) for key, inner in value.items()}
    if isinstance(value, list):
        return [inner * strength for inner in value]
    return value * strength
