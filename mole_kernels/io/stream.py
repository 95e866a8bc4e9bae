"""Experts of any size: a file's layers read one by one when asked for, and written one by one as they are
made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleWarning, printable
from mole_kernels.experts.format import FORMAT
from mole_kernels.experts.lazy import LazyLayers
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.opening import PathLike
from mole_kernels.files.reader import INDEX, SafetensorsFile
from mole_kernels.files.stream import atomic_save_stream
from mole_kernels.io.bank import load_bank
from mole_kernels.io.experts import layer_from_tensors, load_expert, settings_beside
from mole_kernels.io.families import has_family
from mole_kernels.io.layer_keys import account_for, size_from_shapes
from mole_kernels.io.resolve import Pipeline, resolve
from mole_kernels.io.save import LayerWriter
from mole_kernels.io.source import AdapterSource, adapter_name, find_adapter
from mole_kernels.io.strength import strength_of

Dialect = Literal["diffusers", "kohya"]


@contextmanager
def open_experts(
    path: PathLike, *, alpha: float | None = None, pipeline: Pipeline = None
) -> Iterator[dict[str, Expert]]:
    """Open the experts of a file by name, until the block ends.

    A LoRA file holds one, named for the file; its layers are read when looked up, so only its header costs
    memory. Keys and shapes are checked at once, values (NaN) when read. Sharded files, single files of ours
    (whose gates are left out, with a warning) and files that a converter must see whole are read whole.

    Args:
        path: A file or an adapter's folder.
        alpha: A Mix-of-Show file's scale, which it does not hold (default 1).
        pipeline: As `load_expert`'s: what the names are resolved against.

    Raises:
        MoleFileError, MoleKeyError, MoleShapeError, MoleTypeError: As `load_expert`.
    """
    adapter = find_adapter(path)
    if adapter.weights.endswith(INDEX):
        yield {adapter_name(path): load_expert(path, alpha=alpha, pipeline=pipeline)}
        return
    with SafetensorsFile(adapter.weights) as file:
        if file.header.metadata.get("format") != FORMAT:
            expert = _lazy(file, adapter, os.fsdecode(path), alpha, pipeline)
            yield {adapter_name(path): expert or load_expert(path, alpha=alpha, pipeline=pipeline)}
            return
    bank, gates = load_bank(adapter.weights)
    if gates is not None:
        warnings.warn(f"{printable(path, 300)}: its gates are left out", MoleWarning, stacklevel=4)
    yield bank.experts


def save_layers(
    layers: Iterable[tuple[str, LowRank]],
    path: PathLike,
    to: Dialect,
    *,
    read_as: str = "memory",
    origin: str = "",
    sdxl: bool = False,
    paths: Sequence[str] = (),
) -> None:
    """`save_expert` for layers that come one by one, atomically; only the one at hand is in memory.

    Args:
        layers: (path, factors), one after the other.
        path: The file.
        to: The dialect to write.
        read_as: The dialect that the paths were read in: a kohya name that stayed flat cannot be written in
            diffusers'.
        origin: How this expert came about, for the file's metadata.
        sdxl: For kohya's dialect: LDM's block names.
        paths: Of all layers, where they are known: their names are checked before the first layer is asked
            for.

    Raises:
        MoleFileError: The file could not be written.
        MoleKeyError: A path that the dialect does not cover.
    """
    writer = LayerWriter(to, read_as, origin, sdxl=sdxl)
    writer.check(list(paths))

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, layer in layers:
            yield from writer.tensors(name, layer).items()

    atomic_save_stream(parts(), path, lambda: writer.metadata({"mole_kernels": origin} if origin else {}))


def _lazy(
    file: SafetensorsFile, adapter: AdapterSource, source: str, alpha: float | None, pipeline: Pipeline
) -> Expert | None:
    """The expert whose layers are read when looked up; None where a converter must see the file whole."""
    entries, metadata, where = file.header.entries, file.header.metadata, printable(source, 300)
    if not entries:
        raise MoleKeyError(where, "holds no tensors")
    layers = account_for(entries, where, lambda key: file.read([key])[key])
    if any(has_family(layer) for layer in layers):
        return None
    resolve(layers, entries, pipeline, where)
    if any(layer.foreign for layer in layers):
        return None
    strength = strength_of(layers, metadata, settings_beside(adapter, layers, where), alpha, where)
    by_path = {layer.path: layer for layer in layers}
    sizes = {
        path: size_from_shapes(layer, entries, f"{where}, {printable(path)}")
        for path, layer in by_path.items()
    }

    def read(path: str) -> LowRank:
        return layer_from_tensors(by_path[path], file.read(by_path[path].keys.values()), strength, where)

    dialect = "+".join(sorted({layer.dialect for layer in layers}))
    return Expert(LazyLayers(sizes, read), dialect, source, dict(metadata), strength.origin)
