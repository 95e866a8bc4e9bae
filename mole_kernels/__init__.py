"""Mixtures of low-rank experts in diffusion models, at the speed of the plain layer.

    handle = mk.patch(pipe, experts={"face": "face.safetensors", "hand": "hand.safetensors"},
    gates="gates.safetensors")

Importing this needs no GPU, no compiler, no diffusers and no PEFT; names are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "patch": "mole_kernels.patching.apply",
    "plan": "mole_kernels.patching.plan",
    "handles": "mole_kernels.patching.handles",
    "cache_text": "mole_kernels.text_cache.cache",
    "accelerate": "mole_kernels.peft.accelerate",
    "status": "mole_kernels.peft.status",
    "serve": "mole_kernels.serving.serve",
    "gated_lora_linear": "mole_kernels.functional",
    "Experts": "mole_kernels.operands",
    "Gates": "mole_kernels.operands",
    "GatedLoRALinear": "mole_kernels.layers.linear",
    "ExpertBank": "mole_kernels.experts.bank",
    "merge": "mole_kernels.experts.merge",
    "compress": "mole_kernels.experts.compress",
    "MoleError": "mole_kernels.errors",
}

# rooms whose names users need: mk.gates.MoLEGate, mk.io.load_expert, mk.training.TrainConfig
_DOORS = ("gates", "io", "methods", "training")

__all__ = [*_HOME, *_DOORS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return importlib.import_module(f"mole_kernels.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'mole_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_DOORS})
