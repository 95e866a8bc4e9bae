"""Known models without their weights: modules on the meta device, to match files against."""

from __future__ import annotations

import importlib
import logging
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.files.text import read_json_file

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

# component -> (package, class, configuration), as published with the models; what is left out is the class's
# default
KNOWN: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "sd15": {
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 64,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
                "block_out_channels": (320, 640, 1280, 1280),
            },
        ),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
    },
    "sdxl": {
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "cross_attention_dim": 2048,
                "attention_head_dim": (5, 10, 20),
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
                "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
    },
}


def skeleton(name: str) -> Any:
    """A pipeline-like object whose `components` are modules on the meta device.

    name  a known model (sd15, sdxl), or a folder in diffusers' layout: of a pipeline (model_index.json) or of
          one model (config.json)
    """
    if name in KNOWN:
        return SimpleNamespace(components={part: _build(*spec) for part, spec in KNOWN[name].items()})
    folder = Path(name)
    if not folder.is_dir():
        raise MoleValueError(
            "--model", expected=f"{', '.join(KNOWN)} or a folder in diffusers' layout", got=printable(name)
        )
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
        parts = {
            part: _from_folder(folder / part, spec)
            for part, spec in index.items()
            if isinstance(spec, list) and len(spec) == 2 and (folder / part / "config.json").is_file()
        }
        components = {part: module for part, module in parts.items() if isinstance(module, nn.Module)}
        if components:
            return SimpleNamespace(components=components)
    elif (folder / "config.json").is_file():
        config = _json(folder / "config.json")
        module = _from_folder(folder, ["diffusers", config.get("_class_name")])
        if isinstance(module, nn.Module):
            return module
    raise MoleFileError(
        printable(folder, 300),
        "holds no model that can be built",
        hint="a pipeline's folder holds model_index.json",
    )


def _from_folder(folder: Path, spec: list[Any]) -> nn.Module | None:
    """The component's module, or None for a class that is not a model of diffusers or transformers."""
    package, name = spec
    if package not in ("diffusers", "transformers") or not isinstance(name, str) or not name.isidentifier():
        return None
    config = _json(folder / "config.json")
    return _build(package, name, {key: value for key, value in config.items() if not key.startswith("_")})


def _build(package: str, name: str, config: dict[str, Any]) -> nn.Module | None:
    with _quiet(), torch.device("meta"):
        cls = getattr(_import(package), name, None)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            return None
        if package == "diffusers":
            return cls.from_config(config)  # type: ignore[attr-defined]
        return cls(cls.config_class(**config))  # type: ignore[attr-defined]


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MoleStateError(
            "--model", f"needs {package} ({error})", hint='pip install "mole-kernels[diffusers]"'
        ) from error


def _json(path: Path) -> dict[str, Any]:
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise MoleFileError(printable(path, 300), expected="a JSON object", got=type(content).__name__)
    return content


@contextmanager
def _quiet():
    """diffusers and transformers remark on configurations; that is not what was asked for here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
