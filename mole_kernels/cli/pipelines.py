"""A diffusers pipeline, or the class of one, for a command; safetensors only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleStateError, MoleValueError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.text import read_json_file
from mole_kernels.io.experts import load_expert
from mole_kernels.io.resolve import Pipeline


def pipeline_of_name(name: str) -> Any:
    """What `load_expert` takes as pipeline.

    Args:
        name: "auto", a class of diffusers, or a folder in diffusers' layout.

    Raises:
        MoleStateError: diffusers is missing.
        MoleValueError: No such class or folder, or one that loads no LoRA files.
    """
    if name == "auto":
        return name
    where, cls = name, name
    if (Path(name) / "model_index.json").is_file():
        index = read_json_file(Path(name) / "model_index.json")
        cls = str(index.get("_class_name")) if isinstance(index, dict) else ""
    try:
        import diffusers
    except ImportError as error:
        raise MoleStateError(
            "--pipeline", f"needs {error.name}", hint='pip install "mole-kernels[diffusers]"'
        ) from error
    pipeline = getattr(diffusers, cls, None) if cls.isidentifier() else None
    if not isinstance(pipeline, type) or not hasattr(pipeline, "lora_state_dict"):
        raise MoleValueError(
            "--pipeline",
            expected="a pipeline class of diffusers that loads LoRA files, a folder of one, or auto",
            got=printable(where, 300),
            hint="FluxPipeline, StableDiffusion3Pipeline, QwenImagePipeline, WanPipeline, ZImagePipeline …",
        )
    return pipeline


def named_expert(path: Path, pipeline: Pipeline) -> Expert:
    """The expert under the model's names, or the file's own where its keys do not tell the model."""
    try:
        return load_expert(path, pipeline=pipeline)
    except MoleKeyError:
        if not isinstance(pipeline, str):
            raise
        return load_expert(path)


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
        with _without_bars():
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


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of diffusers and transformers where the output is no terminal."""
    if sys.stderr.isatty():
        yield
        return
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
