"""Experts of any size: a file's layers read one by one when asked for, and written one by one as they are
made.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleWarning, printable
from mole_kernels.experts.format import FORMAT
from mole_kernels.experts.lazy import LazyLayers, Size, stored_dtype
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.reader import Entry, PathLike, SafetensorsFile
from mole_kernels.files.stream import atomic_save_stream
from mole_kernels.io.adapter_config import AdapterConfig
from mole_kernels.io.bank import load_bank
from mole_kernels.io.experts import LayerKeys, collect_layers, layer_of, refuse_unsupported
from mole_kernels.io.save import expert_tensors

Dialect = Literal["diffusers", "kohya"]


@contextmanager
def open_experts(path: PathLike, *, alpha: float | None = None) -> Iterator[dict[str, Expert]]:
    """The experts of a safetensors file by name, open until the block ends.

    A LoRA file holds one, named for the file; its layers are read when looked up, so only its header costs
    memory. Keys and shapes are
    checked at once, values (NaN) when read. A single file of ours is read whole; its gates are left out, with
    a warning.
    alpha  a Mix-of-Show file's scale, which it does not hold (default 1)
    """
    with SafetensorsFile(path) as file:
        if file.header.metadata.get("format") != FORMAT:
            yield {name_of(path): _lazy(file, os.fsdecode(path), alpha)}
            return
    bank, gates = load_bank(path)
    if gates is not None:
        warnings.warn(f"{printable(path, 300)}: its gates are left out", MoleWarning, stacklevel=4)
    yield bank.experts


def save_layers(
    layers: Iterable[tuple[str, LowRank]],
    path: PathLike,
    to: Dialect,
    *,
    read_as: str = "memory",
    made: str = "",
    sdxl: bool = False,
) -> None:
    """`save_expert` for layers that come one by one; only the one at hand is in memory. Atomic.

    read_as  the dialect that the paths were read in: a kohya name that stayed flat cannot be written in
             diffusers' dialect
    made     how this expert came about, for the file's metadata
    """
    seen: dict[str, tuple[int, int, int, float, bool | tuple[int, int]]] = {}
    note = {"mole_kernels": made} if made else {}

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, layer in layers:
            seen[name] = (layer.out_features, layer.in_features, layer.rank, layer.scale, layer.conv)
            yield from expert_tensors(Expert({name: layer}, read_as, made), to, None, sdxl)[0].items()

    def metadata() -> Mapping[str, str]:
        empty = {
            name: LowRank(torch.empty(R, K, device="meta"), torch.empty(N, R, device="meta"), scale, conv)
            for name, (N, K, R, scale, conv) in seen.items()
        }
        return expert_tensors(Expert(empty, read_as, made, note), to, None, sdxl)[1]

    atomic_save_stream(parts(), path, metadata)


def name_of(path: PathLike) -> str:
    """An expert's name from its file's: printable, without dots."""
    stem = os.path.basename(os.fsdecode(path)).removesuffix(".safetensors")
    return "".join(c if c.isprintable() and c != "." else "_" for c in stem)[:128] or "expert"


def _lazy(file: SafetensorsFile, source: str, alpha: float | None) -> Expert:
    entries, metadata, where = file.header.entries, file.header.metadata, file.where
    if not entries:
        raise MoleKeyError(where, "holds no tensors")
    refuse_unsupported(entries, where)
    found = {layer.path: layer for layer in collect_layers(entries, where)}
    config = AdapterConfig.from_metadata(metadata, where)
    sizes = {path: _size(layer, entries, where) for path, layer in found.items()}
    layers = LazyLayers(
        sizes, lambda path: layer_of(found[path], file.read(found[path].keys.values()), config, where, alpha)
    )
    return Expert(
        layers, "+".join(sorted({layer.dialect for layer in found.values()})), source, dict(metadata)
    )


def _size(layer: LayerKeys, entries: Mapping[str, Entry], where: str) -> Size:
    """Sizes of one layer from the header; what is wrong with them is found before anything is read."""
    down, up = entries[layer.keys["down"]], entries[layer.keys["up"]]
    shapes = [entry.shape[:2] if entry.shape[2:] == (1, 1) else entry.shape for entry in (down, up)]
    if "mid" in layer.keys and len(shapes[0]) == 2:
        mid = entries[layer.keys["mid"]].shape
        shapes[0] = (*shapes[0], *mid[2:]) if len(mid) == 4 and mid[:2] == (shapes[0][0],) * 2 else mid
    if len(shapes[0]) == 4:
        shapes[0] = (shapes[0][0], math.prod(shapes[0][1:]))
    if (
        any(len(shape) != 2 for shape in shapes)
        or shapes[0][0] != shapes[1][1]
        or 0 in (*shapes[0], *shapes[1])
    ):
        raise MoleShapeError(
            f"{where}, {printable(layer.path)}",
            expected="A [R,K] and B [N,R] of one rank, of a linear layer or a convolution",
            got=f"A {list(down.shape)}, B {list(up.shape)}",
        )
    return Size(shapes[1][0], shapes[0][1], shapes[0][0], stored_dtype([down.dtype, up.dtype]))
