"""What a fusion leaves behind: a folder with the fused expert, the concepts' embeddings, their names, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.writer import atomic_write
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.mix_of_show.concept import load_embeddings, save_embeddings
from mole_kernels.methods.mix_of_show.fusion import Fused, put_into_weights
from mole_kernels.methods.mix_of_show.tokens import Tokens, add_concepts

EXPERT, EMBEDDINGS, CONFIG, REPORT, PIPELINE = (
    "fused.safetensors", "fused.embeddings.safetensors", "new_concept_cfg.json", "report.json", "pipeline",
)  # fmt: skip


def save_fused(fused: Fused, folder: Path, dialect: Literal["diffusers", "kohya"] = "diffusers", dtype: torch.dtype | None = None) -> None:
    """fused.safetensors, fused.embeddings.safetensors, new_concept_cfg.json (as the paper's tools keep it) and report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_expert(fused.expert, folder / EXPERT, dialect, dtype)
    save_embeddings(fused.embeddings, folder / EMBEDDINGS)
    write_json(folder / CONFIG, fused.tokens.config())
    write_json(folder / REPORT, {"totals": fused.totals(), "layers": [layer.row() for layer in fused.layers]})


def save_dense(pipe: Any, fused: Fused, folder: Path) -> None:
    """The pipeline itself with the fused weights and the concepts' tokens in it, and new_concept_cfg.json; changes `pipe` for good."""
    put_into_weights(pipe, fused.expert)
    tokens = add_concepts(pipe, fused.embeddings)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    write_json(folder / CONFIG, tokens.config())


def load_fused(pipe: Any, folder: Path) -> tuple[Expert, Tokens]:
    """(expert, tokens) of what `save_fused` wrote; the tokens are added to the pipeline, the expert is for `patch`."""
    if not (folder / EXPERT).is_file() or not (folder / EMBEDDINGS).is_file():
        raise MoleFileError(printable(folder, 300), expected=f"{EXPERT} and {EMBEDDINGS}", got="no such files")
    expert = load_expert(folder / EXPERT)
    return replace(expert, source=str(folder)), add_concepts(pipe, load_embeddings(folder / EMBEDDINGS))


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def put(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(path, put)
