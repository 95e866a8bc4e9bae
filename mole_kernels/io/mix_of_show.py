"""Mix-of-Show's published `.pth` files.

{"params": {"new_concept_embedding": {"<potter1>": [16,768], …}, "text_encoder": {…}, "unet": {…}}}

The published files are of Stable Diffusion 1.5. For SDXL this package adds text_encoder_2 and
new_concept_embedding_2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleValueError, printable
from mole_kernels.experts.lowrank import Expert, split_component
from mole_kernels.files.opening import PathLike
from mole_kernels.files.writer import atomic_write, torch_save
from mole_kernels.io.dialects.kinds import kind_of_pickle, list_form
from mole_kernels.io.experts import expert_from_tensors
from mole_kernels.io.pickles import read_pickle

PARTS = ("unet", "text_encoder", "text_encoder_2")
EMBEDDINGS = "new_concept_embedding"
# text encoder -> the key of its embeddings
TABLES = {"text_encoder": EMBEDDINGS, "text_encoder_2": f"{EMBEDDINGS}_2"}
HALVES = {
    "main": (".lora_down.weight", ".lora_up.weight"),
    "research": ("_lora.down.weight", "_lora.up.weight"),
}


def load_mix_of_show(path: PathLike, *, alpha: float | None = None) -> tuple[Expert, dict[str, Tensor]]:
    """The expert and the concept's embeddings of a Mix-of-Show `.pth`.

    Args:
        path: The file.
        alpha: Its scale itself, which the file does not hold (default 1).

    Returns:
        (expert, embeddings by token [L,K]; those of a second text encoder begin with "text_encoder_2.").

    Raises:
        MoleFileError: No pickle of plain tensors, or one of something else.
        MoleKeyError: As `load_expert`.
    """
    expert, by_encoder = load_mix_of_show_parts(path, alpha=alpha)
    prefix = {"text_encoder": "", "text_encoder_2": "text_encoder_2."}
    return expert, {
        prefix[encoder] + token: value
        for encoder, rows in by_encoder.items()
        for token, value in rows.items()
    }


def load_mix_of_show_parts(
    path: PathLike, *, alpha: float | None = None
) -> tuple[Expert, dict[str, dict[str, Tensor]]]:
    """`load_mix_of_show` with the embeddings as {text encoder: {token: [L,K]}}.

    Args:
        path: The file.
        alpha: As `load_mix_of_show`'s.
    """
    where = printable(path, 300)
    content = read_pickle(path)
    params = _params(content)
    if params is None:
        what, hint = kind_of_pickle(content)
        raise MoleFileError(
            where,
            expected=f"params of unet, text_encoder and {EMBEDDINGS}, as Mix-of-Show writes them",
            got=what,
            hint=hint,
        )
    for name, part in params.items():
        if not isinstance(part, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in part.items()
        ):
            raise MoleFileError(where, expected=f"tensors by name in '{name}'", got="something else")
    tensors: dict[str, Any] = {
        f"{part}.{key}": tensor for part in PARTS for key, tensor in params.get(part, {}).items()
    }
    return expert_from_tensors(tensors, {}, os.fsdecode(path), alpha=alpha), {
        encoder: params[key] for encoder, key in TABLES.items() if params.get(key)
    }


def is_mix_of_show(content: object) -> bool:
    """Whether a pickle's content is what Mix-of-Show writes.

    Args:
        content: What `read_pickle` gave.
    """
    return _params(content) is not None


def _params(content: object) -> dict[str, Any] | None:
    """The parts of a Mix-of-Show file, or None for any other content."""
    params = content.get("params", content) if isinstance(content, dict) else None
    known = (
        isinstance(params, dict)
        and not list_form(params)
        and bool(set(params) & set(PARTS))
        and not set(params) - {*PARTS, *TABLES.values()}
    )
    return params if known else None


def save_mix_of_show(
    expert: Expert, embeddings: Mapping[str, Mapping[str, Tensor]], path: PathLike, layout: str = "main"
) -> None:
    """Write a `.pth` as Mix-of-Show's tools read it, atomically; scales go into B, since the file holds no
    alpha.

    Args:
        expert: Layers of the UNet and of text encoders.
        embeddings: Text encoder -> token -> [L,K].
        path: The file.
        layout: The key dialect of either branch: "main" or "research".

    Raises:
        MoleFileError: The file could not be written.
        MoleKeyError: A layer of a component that these files do not hold.
        MoleValueError: An unknown layout.
    """
    if layout not in HALVES:
        raise MoleValueError("save_mix_of_show: layout", expected=" or ".join(HALVES), got=repr(layout))
    params: dict[str, dict[str, Tensor]] = {
        TABLES[encoder]: _plain(rows) for encoder, rows in embeddings.items() if rows
    }
    for name, layer in expert.layers.items():
        component, rest = split_component(name)
        if (component or "unet") not in PARTS:
            raise MoleKeyError(
                printable(path, 300), f"Mix-of-Show's files hold no {component}: {printable(name)}"
            )
        down, up = HALVES[layout]
        factors = {
            rest + down: layer.down,
            rest + up: layer.up if layer.scale == 1 else layer.up * layer.scale,
        }
        params.setdefault(component or "unet", {}).update(_plain(factors))
    atomic_write(path, lambda file: torch_save({"params": params}, file))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # a clone, else torch.save keeps all of the storage that a slice is of
    return {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
