"""Files of models other than Stable Diffusion: diffusers knows their dialects, through each pipeline's public `lora_state_dict`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleTypeError, printable


def needs_pipeline(pipeline: Any) -> bool:
    """Whether this pipeline's files are read by diffusers' converter; those of UNet pipelines are read by our own tables."""
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    if not hasattr(cls, "lora_state_dict"):
        raise MoleTypeError("load_expert, pipeline", expected="a diffusers pipeline with lora_state_dict", got=cls.__name__)
    return "unet" not in getattr(cls, "_lora_loadable_modules", ())


def convert_with_pipeline(tensors: Mapping[str, Any], pipeline: Any, where: str) -> dict[str, Tensor]:
    """The tensors under diffusers' keys, alphas as `<path>.alpha`."""
    cls: Any = pipeline if isinstance(pipeline, type) else type(pipeline)
    wants_alphas = "return_alphas" in inspect.signature(cls.lora_state_dict).parameters
    try:
        found = cls.lora_state_dict(dict(tensors), **({"return_alphas": True} if wants_alphas else {}))
    # the converters raise whatever their asserts and look-ups raise
    except Exception as error:
        raise MoleKeyError(
            where,
            f"{cls.__name__}.lora_state_dict cannot read it ({type(error).__name__}: {printable(error, 300)})",
            hint="is this file for another model?",
        ) from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    return {**state, **{key if key.endswith(".alpha") else f"{key}.alpha": value for key, value in (alphas or {}).items()}}
