"""Mix-of-Show's published `.pth` files: the one place where a pickle is opened, with torch's loader that builds nothing but tensors.

{"params": {"new_concept_embedding": {"<potter1>": [16,768], …}, "text_encoder": {…}, "unet": {…}}}
"""

from __future__ import annotations

import os
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.reader import PathLike, open_regular
from mole_kernels.io.experts import expert_from_tensors

PARTS = ("unet", "text_encoder")
EMBEDDINGS = "new_concept_embedding"


def load_mix_of_show(path: PathLike, *, alpha: float | None = None) -> tuple[Expert, dict[str, Tensor]]:
    """(expert, concept embeddings by token) of a Mix-of-Show `.pth`; alpha is its scale itself, which the file does not hold."""
    where = printable(path, 300)
    with open_regular(path, pickles=True) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        # torch raises many kinds for a broken file; none of them ran anything of it
        except (
            pickle.UnpicklingError,
            RuntimeError,
            ValueError,
            EOFError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            OSError,
        ) as error:
            reason = printable(str(error).strip().split("\n")[0], 160)
            raise MoleFileError(where, f"is no torch file of plain tensors ({type(error).__name__}: {reason})") from None
    params = found.get("params", found) if isinstance(found, dict) else None
    if not isinstance(params, dict) or not set(params) & set(PARTS) or set(params) - {*PARTS, EMBEDDINGS}:
        got = ", ".join(printable(key, 40) for key in list(params)[:5]) if isinstance(params, dict) else type(found).__name__
        raise MoleFileError(where, expected=f"params of {', '.join(PARTS)} and {EMBEDDINGS}, as Mix-of-Show writes them", got=got)
    for name, part in params.items():
        if not isinstance(part, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in part.items()):
            raise MoleFileError(where, expected=f"tensors by name in '{name}'", got="something else")
    tensors: dict[str, Any] = {f"{part}.{key}": tensor for part in PARTS for key, tensor in params.get(part, {}).items()}
    return expert_from_tensors(tensors, {}, os.fsdecode(path), alpha=alpha), params.get(EMBEDDINGS, {})
