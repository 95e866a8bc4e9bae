"""One file into another dialect."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
from mole_kernels.io.save import save_expert
from mole_kernels.io.source import adapter_name, find_adapter

Dialect = Literal["diffusers", "kohya", "native", "official"]
Kind = Literal["expert", "bank", "gates"]


@dataclass
class Converted:
    """What a conversion wrote: files, and a line on each."""

    written: dict[str, str] = field(default_factory=dict)


def kind_of(path: PathLike) -> Kind:
    """What a safetensors file is, from its header alone; an expert's file where nothing says otherwise."""
    header = read_header(find_adapter(path).weights)
    if header.metadata.get("format") == FORMAT:
        return "bank" if "experts" in header.metadata else "gates"
    return "gates" if any(OFFICIAL_MIDDLE in key for key in header.entries) else "expert"


def convert(
    source: PathLike,
    target: PathLike,
    to: Dialect,
    *,
    dtype: torch.dtype | None = None,
    expert: str | None = None,
    alpha: float | None = None,
    sdxl: bool | None = None,
) -> Converted:
    """Read `source`, whatever it is, and write it as `target`.

    to      "diffusers", "kohya": one expert · "official": MoLE's gate file · "native": our single file
            (experts, gates, or both)
    expert  which one of a single file; the name of the expert in a new single file
    alpha   a Mix-of-Show file's scale
    sdxl    LDM block names in kohya and official files; None decides by the layers
    """
    dialects = ("diffusers", "kohya", "native", "official")
    if to not in dialects:
        raise MoleValueError("convert", expected=f"one of {', '.join(dialects)}", got=repr(printable(to)))
    if str(source).lower().endswith(PICKLES):
        return _from_pth(source, target, to, dtype, expert, alpha, sdxl)
    kind = kind_of(source)
    if kind == "gates":
        return _gates(load_gates(source), source, target, to, dtype, sdxl)
    if kind == "bank":
        bank, gates = load_bank(source)
        if to == "official":
            if gates is None:
                raise MoleKeyError(printable(source, 300), "holds no gates")
            return _gates(gates, source, target, to, dtype, sdxl)
        if to == "native" and expert is None:
            save_bank(_cast(bank, dtype), target, gates)
            return Converted(
                {
                    os.fsdecode(target): f"{len(bank)} experts"
                    + (f", gates on {len(gates.layers)} layers" if gates else "")
                }
            )
        return _expert(_pick(bank, expert, source), target, to, dtype, expert, sdxl)
    # names of a model's own code need diffusers' converter only to become diffusers'
    return _expert(
        load_expert(source, alpha=alpha, pipeline="auto" if to == "diffusers" else None),
        target,
        to,
        dtype,
        expert,
        sdxl,
    )


def _expert(
    found: Expert,
    target: PathLike,
    to: Dialect,
    dtype: torch.dtype | None,
    name: str | None,
    sdxl: bool | None,
) -> Converted:
    if to == "official":
        raise MoleKeyError(
            printable(found.source, 300),
            "is an expert; the official dialect is for gates",
            hint="--to diffusers, kohya or native",
        )
    if to == "native":
        save_bank(_cast(ExpertBank({name or adapter_name(found.source): found}), dtype), target)
    else:
        save_expert(found, target, to, dtype, sdxl=sdxl)
    return Converted({os.fsdecode(target): f"{len(found.layers)} layers, {found.dialect} → {to}"})


def _gates(
    gates: GateFile,
    source: PathLike,
    target: PathLike,
    to: Dialect,
    dtype: torch.dtype | None,
    sdxl: bool | None,
) -> Converted:
    if to not in ("native", "official"):
        raise MoleKeyError(
            printable(source, 300),
            f"is a gate file; {to} is a dialect of experts",
            hint="--to official or native",
        )
    save_gates(gates, target, "official" if to == "official" else "native", dtype, sdxl=sdxl)
    return Converted(
        {
            os.fsdecode(
                target
            ): f"gates of {', '.join(gates.expert_names)} on {len(gates.layers)} layers → {to}"
        }
    )


def _from_pth(
    source: PathLike,
    target: PathLike,
    to: Dialect,
    dtype: torch.dtype | None,
    name: str | None,
    alpha: float | None,
    sdxl: bool | None,
) -> Converted:
    if not is_mix_of_show(read_pickle(source)):
        pipeline = "auto" if to == "diffusers" else None
        return _expert(
            load_pickled_expert(source, alpha=alpha, pipeline=pipeline), target, to, dtype, name, sdxl
        )
    found, embeddings = load_mix_of_show(source, alpha=alpha)
    done = _expert(found, target, to, dtype, name, sdxl)
    if embeddings:
        beside = Path(target).with_suffix(".embeddings.safetensors")
        atomic_save(embeddings, beside, {"format": "pt"})
        done.written[str(beside)] = f"{len(embeddings)} concept embeddings, which no LoRA dialect holds"
    return done


def _pick(bank: ExpertBank, name: str | None, source: PathLike) -> Expert:
    if name is None and len(bank) == 1:
        name = bank.names[0]
    if name not in bank.experts:
        raise MoleKeyError(
            printable(source, 300),
            expected=f"--expert as one of {', '.join(bank.names)}",
            got=printable(name),
        )
    return bank.experts[name]


def _cast(bank: ExpertBank, dtype: torch.dtype | None) -> ExpertBank:
    if dtype is None:
        return bank
    return ExpertBank(
        {
            name: Expert(
                {path: layer.to(dtype, where=printable(path)) for path, layer in expert.layers.items()},
                expert.dialect,
                expert.source,
                expert.metadata,
            )
            for name, expert in bank.experts.items()
        }
    )
