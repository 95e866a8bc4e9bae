"""One file into another dialect."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from mole_kernels.errors import MoleKeyError, MoleValueError, printable
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.format import FORMAT
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.opening import PICKLES, PathLike
from mole_kernels.files.reader import read_header
from mole_kernels.files.writer import atomic_save
from mole_kernels.io.bank import load_bank, save_bank
from mole_kernels.io.experts import load_expert
from mole_kernels.io.gates import OFFICIAL_MIDDLE, GateFile, load_gates, save_gates
from mole_kernels.io.mix_of_show import is_mix_of_show, load_mix_of_show
from mole_kernels.io.pickles import load_pickled_expert, read_pickle
from mole_kernels.io.resolve import Pipeline
from mole_kernels.io.save import save_expert
from mole_kernels.io.source import adapter_name, find_adapter

TargetDialect = Literal["diffusers", "kohya", "native", "official"]
FileKind = Literal["expert", "bank", "gates"]


@dataclass
class Converted:
    """What a conversion wrote.

    Attributes:
        written: Path of a file -> a line on what it holds.
    """

    written: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Conversion:
    """The arguments of `convert`."""

    source: PathLike
    target: PathLike
    to: TargetDialect
    dtype: torch.dtype | None
    expert: str | None
    alpha: float | None
    sdxl: bool | None
    pipeline: Pipeline


def kind_of(path: PathLike) -> FileKind:
    """What a safetensors file is, from its header alone; an expert's file where nothing says otherwise."""
    header = read_header(find_adapter(path).weights)
    if header.metadata.get("format") == FORMAT:
        return "bank" if "experts" in header.metadata else "gates"
    return "gates" if any(OFFICIAL_MIDDLE in key for key in header.entries) else "expert"


def convert(
    source: PathLike,
    target: PathLike,
    to: TargetDialect,
    *,
    dtype: torch.dtype | None = None,
    expert: str | None = None,
    alpha: float | None = None,
    sdxl: bool | None = None,
    pipeline: Pipeline = "auto",
) -> Converted:
    """Read a file of any dialect and write it in another.

    Args:
        source: A LoRA file or folder, gates, a single file of ours, or a Mix-of-Show .pth.
        target: The safetensors file to write, atomically.
        to: "diffusers", "kohya": one expert. "official": MoLE's gate file. "native": our single file
            (experts, gates, or both).
        dtype: Of the factors; None keeps theirs.
        expert: Which expert of a single file; the name of the expert in a new single file.
        alpha: A Mix-of-Show file's scale, which it does not hold (default 1).
        sdxl: LDM's block names in kohya's and official files; None decides by the layers.
        pipeline: As `load_expert`'s. "auto" resolves names for diffusers' dialect alone, from the keys.

    Returns:
        The files written.

    Raises:
        MoleFileError: A file that cannot be read, or a target that cannot be written.
        MoleKeyError: A file that holds no such thing, or names that the dialect does not cover.
        MoleValueError: An unknown dialect, or a factor that overflows in `dtype`.

    Example:
        >>> convert("face.safetensors", "face_kohya.safetensors", "kohya")
    """
    if to not in get_args(TargetDialect):
        expected = f"one of {', '.join(get_args(TargetDialect))}"
        raise MoleValueError("convert", expected=expected, got=repr(printable(to)))
    if isinstance(pipeline, str) and pipeline == "auto" and to != "diffusers":
        # names of a model's own code need a converter only to become diffusers'
        pipeline = None
    asked = _Conversion(source, target, to, dtype, expert, alpha, sdxl, pipeline)
    if str(source).lower().endswith(PICKLES):
        return _convert_pickle(asked)
    kind = kind_of(source)
    if kind == "gates":
        return _write_gates(asked, load_gates(source))
    if kind == "bank":
        return _convert_bank(asked)
    return _write_expert(asked, load_expert(source, alpha=alpha, pipeline=pipeline))


def _convert_bank(asked: _Conversion) -> Converted:
    bank, gates = load_bank(asked.source)
    if asked.to == "official":
        if gates is None:
            raise MoleKeyError(printable(asked.source, 300), "holds no gates")
        return _write_gates(asked, gates)
    if asked.to == "native" and asked.expert is None:
        save_bank(_cast(bank, asked.dtype), asked.target, gates)
        more = f", gates on {len(gates.layers)} layers" if gates else ""
        return Converted({os.fsdecode(asked.target): f"{len(bank)} experts{more}"})
    return _write_expert(asked, _pick(bank, asked.expert, asked.source))


def _convert_pickle(asked: _Conversion) -> Converted:
    if not is_mix_of_show(read_pickle(asked.source)):
        expert = load_pickled_expert(asked.source, alpha=asked.alpha, pipeline=asked.pipeline)
        return _write_expert(asked, expert)
    expert, embeddings = load_mix_of_show(asked.source, alpha=asked.alpha)
    converted = _write_expert(asked, expert)
    if embeddings:
        beside = Path(os.fsdecode(asked.target)).with_suffix(".embeddings.safetensors")
        atomic_save(embeddings, beside, {"format": "pt"})
        converted.written[str(beside)] = f"{len(embeddings)} concept embeddings, which no LoRA dialect holds"
    return converted


def _write_expert(asked: _Conversion, expert: Expert) -> Converted:
    if asked.to == "official":
        raise MoleKeyError(
            printable(expert.source, 300),
            "is an expert; the official dialect is for gates",
            hint="--to diffusers, kohya or native",
        )
    if asked.to == "native":
        name = asked.expert or adapter_name(expert.source)
        save_bank(_cast(ExpertBank({name: expert}), asked.dtype), asked.target)
    else:
        save_expert(expert, asked.target, asked.to, asked.dtype, sdxl=asked.sdxl)
    line = f"{len(expert.layers)} layers, {expert.dialect} → {asked.to}"
    return Converted({os.fsdecode(asked.target): line})


def _write_gates(asked: _Conversion, gates: GateFile) -> Converted:
    if asked.to not in ("native", "official"):
        raise MoleKeyError(
            printable(asked.source, 300),
            f"is a gate file; {asked.to} is a dialect of experts",
            hint="--to official or native",
        )
    save_gates(gates, asked.target, asked.to, asked.dtype, sdxl=asked.sdxl)
    line = f"gates of {', '.join(gates.expert_names)} on {len(gates.layers)} layers → {asked.to}"
    return Converted({os.fsdecode(asked.target): line})


def _pick(bank: ExpertBank, name: str | None, source: PathLike) -> Expert:
    if name is None and len(bank) == 1:
        name = bank.names[0]
    if name not in bank.experts:
        expected = f"--expert as one of {', '.join(bank.names)}"
        raise MoleKeyError(printable(source, 300), expected=expected, got=printable(name))
    return bank.experts[name]


def _cast(bank: ExpertBank, dtype: torch.dtype | None) -> ExpertBank:
    if dtype is None:
        return bank
    return ExpertBank(
        {
            name: replace(
                expert,
                layers={
                    path: layer.to(dtype, where=printable(path)) for path, layer in expert.layers.items()
                },
            )
            for name, expert in bank.experts.items()
        }
    )
