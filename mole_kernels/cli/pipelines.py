"""A diffusers pipeline for a command, from a folder or the demo's; safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mole_kernels.errors import MoleFileError, MoleStateError, printable


def read_pipeline(
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    command: str = "",
) -> Any:
    """The pipeline `name` (a folder in diffusers' layout, a name on the hub, or "demo"), quiet, on `device`.

    dtype  float32 on a CPU and float16 elsewhere by default; the demo's stays float32
    Raises MoleStateError where diffusers is missing, MoleFileError for what is no pipeline. Pickled weights
    are not read.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "demo":
        from mole_kernels.demo.model import load_pipeline

        return load_pipeline().to(device)
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MoleStateError(
            command or "pipeline", f"needs {error.name}", hint='pip install "mole-kernels[diffusers]"'
        ) from error
    kind = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            name, torch_dtype=kind, use_safetensors=True, local_files_only=Path(name).is_dir()
        )
    # what diffusers raises for a folder that is none, is half there, or names classes it does not know
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        hint = "a folder in diffusers' layout holds model_index.json"
        raise MoleFileError(
            printable(name, 300), f"no pipeline can be read from it ({printable(error, 300)})", hint=hint
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
