"""Pickles of plain tensors: the one place where they are opened, with torch's loader that builds nothing but
tensors and plain containers.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.limits import MAX_TENSORS
from mole_kernels.files.opening import PathLike, open_regular, words_for_read_errors
from mole_kernels.io.dialects.keys import parse_key, unsupported
from mole_kernels.io.dialects.kinds import kind_of_pickle, list_form
from mole_kernels.io.experts import expert_from_tensors
from mole_kernels.io.resolve import Pipeline
from mole_kernels.io.source import find_adapter


def read_pickle(path: PathLike) -> object:
    """The content of a torch file, read with `weights_only=True`.

    Raises:
        MoleFileError: A file that cannot be read, or that holds more than tensors and plain containers.
    """
    where = printable(path, 300)
    with open_regular(path, pickles=True) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        with words_for_read_errors(where):
            beginning = file.read(32)
            file.seek(0)
        if beginning.startswith(b"version https://git-lfs"):
            raise MoleFileError(
                where,
                "is a Git LFS pointer: the file itself was not downloaded",
                hint="git lfs pull, or download the file from the repository's page",
            )
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
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
            raise MoleFileError(
                where, f"is no torch file of plain tensors ({type(error).__name__}: {reason})"
            ) from None


def load_pickled_expert(path: PathLike, *, pipeline: Pipeline = None, alpha: float | None = None) -> Expert:
    """The expert of a flat pickle, such as `adapter_model.bin`: a dictionary with a tensor under each key.

    Args:
        path: The file; an `adapter_config.json` beside it is read.
        pipeline: As `load_expert`'s.
        alpha: As `load_expert`'s.

    Raises:
        MoleFileError: A pickle of something else: a list form, an embedding, a checkpoint.
        MoleKeyError: As `load_expert`.
    """
    where = printable(path, 300)
    content = read_pickle(path)
    tensors = flat_tensors(content)
    if tensors is None:
        what, hint = kind_of_pickle(content)
        raise MoleFileError(
            where, expected="a dictionary with a tensor under each key of a LoRA", got=what, hint=hint
        )
    return expert_from_tensors(
        tensors, {}, os.fsdecode(path), pipeline=pipeline, alpha=alpha, beside=find_adapter(path)
    )


def flat_tensors(content: object) -> dict[str, Tensor] | None:
    """The tensors of a LoRA by key, where a pickle's content is such a dictionary; else None."""
    if not isinstance(content, Mapping) or list_form(content) or not 0 < len(content) <= MAX_TENSORS:
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return None
    known = any(parse_key(key) or unsupported(key) for key in content)
    return dict(content) if known else None
