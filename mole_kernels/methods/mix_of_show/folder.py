"""What a fusion leaves behind: a folder with the fused expert, the concepts' embeddings, their names, and the
report.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.writer import write_json
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.mix_of_show.concept import load_embeddings, save_embeddings
from mole_kernels.methods.mix_of_show.fusion import FusedConcepts, put_into_weights
from mole_kernels.methods.mix_of_show.tokens import Tokens, add_concepts

EXPERT, EMBEDDINGS, CONFIG, REPORT, PIPELINE = (
    "fused.safetensors",
    "fused.embeddings.safetensors",
    "new_concept_cfg.json",
    "report.json",
    "pipeline",
)
# a fusion that is not yet in its place, and the file that says that it is whole
DRAFT, WHOLE = ".next", "whole"


def save_fused(
    fused: FusedConcepts,
    folder: Path,
    dialect: Literal["diffusers", "kohya"] = "diffusers",
    dtype: torch.dtype | None = None,
) -> None:
    """fused.safetensors, fused.embeddings.safetensors, new_concept_cfg.json (as the paper's tools keep it),
    report.json.

    All four or none, over an older fusion too: they are written into a folder beside them and then moved;
    `load_fused` finds them in either place, and the next `save_fused` ends a move that was cut off.

    Args:
        fused: What `fuse_pipeline` gave.
        folder: Where they go.
        dialect: Of the expert's file.
        dtype: Of the expert's factors; None keeps theirs.

    Raises:
        MoleFileError: The folder cannot be written.
    """
    draft = folder / DRAFT
    draft.mkdir(parents=True, exist_ok=True)
    _move(folder)
    save_expert(fused.expert, draft / EXPERT, dialect, dtype)
    save_embeddings(fused.embeddings, draft / EMBEDDINGS)
    write_json(draft / CONFIG, fused.tokens.config())
    write_json(draft / REPORT, {"totals": fused.totals(), "layers": [layer.row() for layer in fused.layers]})
    write_json(draft / WHOLE, True)
    _move(folder)
    draft.rmdir()


def _move(folder: Path) -> None:
    """What is whole in the draft goes to its place, what is not is dropped; the mark that says so goes
    last.
    """
    draft = folder / DRAFT
    whole = (draft / WHOLE).exists()
    for path in sorted(draft.iterdir()):
        if path.name != WHOLE and whole:
            os.replace(path, folder / path.name)
        elif path.name != WHOLE:
            path.unlink()
    (draft / WHOLE).unlink(missing_ok=True)


def _place(folder: Path, name: str) -> Path:
    """Where a file of the last whole fusion is."""
    drafted = folder / DRAFT / name
    return drafted if (folder / DRAFT / WHOLE).exists() and drafted.exists() else folder / name


def save_dense(pipe: Any, fused: FusedConcepts, folder: Path) -> None:
    """The pipeline itself with the fused weights and the concepts' tokens in it, and new_concept_cfg.json;
    changes `pipe` for good.
    """
    put_into_weights(pipe, fused.expert)
    tokens = add_concepts(pipe, fused.embeddings)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    write_json(folder / CONFIG, tokens.config())


def load_fused(pipe: Any, folder: Path) -> tuple[Expert, Tokens]:
    """What `save_fused` wrote; the tokens are added to the pipeline.

    Args:
        pipe: The pipeline that takes the tokens.
        folder: The folder.

    Returns:
        (expert, tokens): the expert is for `mk.patch`.

    Raises:
        MoleFileError: A file is missing or broken.
    """
    expert, embeddings = read_fused(folder)
    return expert, add_concepts(pipe, embeddings)


def read_fused(folder: Path) -> tuple[Expert, dict[str, dict[str, Tensor]]]:
    """(expert, embeddings) of what `save_fused` wrote.

    Raises:
        MoleFileError: A file that is missing.
    """
    files = [_place(folder, EXPERT), _place(folder, EMBEDDINGS)]
    if not all(path.is_file() for path in files):
        raise MoleFileError(
            printable(folder, 300), expected=f"{EXPERT} and {EMBEDDINGS}", got="no such files"
        )
    return replace(load_expert(files[0]), source=str(folder)), load_embeddings(files[1])
