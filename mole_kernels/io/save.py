"""An expert into a LoRA file that other tools read."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.scales import alpha_of
from mole_kernels.files.limits import DTYPE_NAMES
from mole_kernels.files.opening import PathLike
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import adapter_config
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl, stayed_flat


def save_expert(
    expert: Expert,
    path: PathLike,
    dialect: Literal["diffusers", "kohya"] = "diffusers",
    dtype: torch.dtype | None = None,
    *,
    sdxl: bool | None = None,
) -> None:
    """Write one expert, atomically.

    dialect  "diffusers": lora_A/lora_B, the scales in PEFT's metadata · "kohya": lora_down/lora_up/alpha
    dtype    of the factors, None keeps theirs; a value that would overflow is refused
    sdxl     kohya only: LDM block names, as kohya's tools want for SDXL; None decides by the layers
    """
    tensors, metadata = expert_tensors(
        expert, dialect, dtype, looks_like_sdxl(expert.layers) if sdxl is None else sdxl
    )
    atomic_save(tensors, path, metadata)


def expert_tensors(
    expert: Expert, dialect: Literal["diffusers", "kohya"], dtype: torch.dtype | None, sdxl: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the file that `save_expert` writes."""
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise MoleTypeError("save_expert", expected=f"dtype {', '.join(DTYPE_NAMES.values())}", got=dtype)
    writers = {"diffusers": _diffusers, "kohya": _kohya}
    if dialect not in writers:
        raise MoleValueError("save_expert", expected=f"dialect {' or '.join(writers)}", got=repr(dialect))
    kept = {key: value for key, value in expert.metadata.items() if not adapter_config.is_strength_key(key)}
    tensors, metadata = writers[dialect](expert, dtype, sdxl)
    return tensors, kept | {"format": "pt"} | metadata


def _diffusers(
    expert: Expert, dtype: torch.dtype | None, sdxl: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    flat = [path for path in expert.layers if "kohya" in expert.dialect and stayed_flat(path)]
    if flat:
        raise MoleKeyError(
            printable(expert.source),
            f"{len(flat)} layers are known by a flat name only, such as {printable(flat[0])}",
            hint="give load_expert the pipeline, whose converter knows the dotted names",
        )
    tensors = {}
    for path, layer in expert.layers.items():
        down, up = _as_stored(layer, dtype, path)
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = down, up
    return tensors, adapter_config.adapter_metadata(expert)


def _kohya(expert: Expert, dtype: torch.dtype | None, sdxl: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for path, layer in expert.layers.items():
        name = kohya_name(path, sdxl=sdxl)
        if name is None:
            raise MoleKeyError(
                printable(expert.source),
                f"kohya's names do not cover {printable(path)}",
                hint='save it with dialect="diffusers"',
            )
        down, up = _as_stored(layer, dtype, path)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(
            alpha_of("kohya", layer.scale, layer.rank), dtype=torch.float32
        )
    return tensors, {}


def _as_stored(layer: LowRank, dtype: torch.dtype | None, path: str) -> tuple[Tensor, Tensor]:
    """(down, up) as files hold them: cast, and with four dimensions for a convolution."""
    layer = layer.to(dtype, where=printable(path))
    if layer.conv:
        return layer.down.unflatten(1, (-1, *layer.kernel)), layer.up[:, :, None, None]
    return layer.down, layer.up
