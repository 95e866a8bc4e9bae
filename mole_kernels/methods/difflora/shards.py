"""Shards of flat vectors: packed from the experts of a set, read back by name.

work/shards/index.json      layout, settings, and which person lies in which shard-NNNNN.safetensors
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import (
    MoleFileError,
    MoleKeyError,
    printable,
)
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save, write_json
from mole_kernels.io import load_expert
from mole_kernels.methods.difflora.manifest import Manifest, tensors_of
from mole_kernels.methods.difflora.store import read_record
from mole_kernels.modules.names import few
from mole_kernels.training.processes import processes

FORMAT = "mole-kernels-loras-1"
INDEX = "index.json"


def pack_shards(work: str | Path, names: Sequence[str] | None = None) -> LoRADataset:
    """Shards of flat vectors from the experts of `train_identities`, each `per_shard` long; replaces those
    there are, all or none.

    Raises MoleValueError or MoleShapeError, the layer named, where two experts do not have one layout.

    Args:
        names: A part of them, in this order; None for all, by name.
    """
    work, state = Path(work), processes()
    files = {path.stem: path for path in sorted((work / "experts").glob("*.safetensors"))}
    chosen = list(files) if names is None else list(names)
    if unknown := [name for name in chosen if name not in files]:
        raise MoleKeyError(
            f"{printable(work, 300)}: experts", f"{len(unknown)} are not there: {few(unknown)}"
        )
    if not chosen:
        raise MoleFileError(
            printable(work / "experts", 300), expected="at least one trained expert", got="none"
        )
    settings = settings_of_set(work)
    first = _widened(load_expert(files[chosen[0]]))
    manifest = Manifest.of_expert(first).fit(
        tensors_of(_widened(load_expert(files[name]))) for name in chosen
    )
    shards = work / "shards"
    per, parts = int(settings["per_shard"]), []
    if state.is_main_process:
        shards.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    used_names = _packed(shards)
    for number, at in enumerate(range(0, len(chosen), per)):
        # never over a shard that the index of now speaks of: it holds until the new index is there
        free = (f"shard-{number:05d}{f'-{k}' * (k > 0)}.safetensors" for k in itertools.count())
        part = {"file": next(name for name in free if name not in used_names), "names": chosen[at : at + per]}
        parts.append(part)
        if number % state.num_processes == state.process_index:
            vectors = {
                name: manifest.flatten_expert(_widened(load_expert(files[name]))) for name in part["names"]
            }
            atomic_save(vectors, shards / str(part["file"]), {"format": FORMAT})
    state.wait_for_everyone()
    if state.is_main_process:
        about = {
            "format": FORMAT,
            "training": settings,
            "manifest": json.loads(manifest.to_json()),
            "shards": parts,
        }
        write_json(shards / INDEX, about)
        for old in set(shards.glob("shard-*.safetensors")) - {shards / str(part["file"]) for part in parts}:
            old.unlink()
    state.wait_for_everyone()
    return LoRADataset(shards)


def _packed(shards: Path) -> set[str]:
    """The files of the index that is there; none where there is none that can be read."""
    try:
        return {str(shard["file"]) for shard in read_record(shards / INDEX, FORMAT, "shards")["shards"]}
    except (MoleFileError, KeyError, TypeError):
        return set()


class LoRADataset:
    """Identities and their flat vectors, read from the shards when asked for.

    Attributes:
        names: All identities, in the order of the shards.
        manifest: The layout of the vectors.

    Raises:
        MoleFileError: A folder without an index, or one whose shards are not all there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        record = read_record(self.folder / INDEX, FORMAT, "a folder of LoRA shards with an index.json")
        where = printable(self.folder / INDEX, 300)
        try:
            places = {str(name): str(shard["file"]) for shard in record["shards"] for name in shard["names"]}
            self.manifest = Manifest.from_json(json.dumps(record["manifest"]), where)
        except (KeyError, TypeError) as error:
            raise MoleFileError(where, f"is no index of shards ({type(error).__name__})") from error
        files = sorted(set(places.values()))
        if gone := [name for name in files if Path(name).name != name or not (self.folder / name).is_file()]:
            raise MoleFileError(where, f"{len(gone)} of its {len(files)} shards are not there: {few(gone)}")
        self._places, self.names = places, list(places)

    def __len__(self) -> int:
        return len(self.names)

    def vectors(self, names: Sequence[str] | None = None) -> Tensor:
        """[n,length] float32 of these identities, None for all, in their order."""
        wanted = self.names if names is None else list(names)
        if unknown := [name for name in wanted if name not in self._places]:
            raise MoleKeyError(printable(self.folder, 300), f"has no identity {few(unknown)}")
        by_shard: dict[str, list[str]] = {}
        for name in wanted:
            by_shard.setdefault(self._places[name], []).append(name)
        by_name: dict[str, Tensor] = {}
        for file, held in by_shard.items():
            by_name |= read_tensors(self.folder / file, keys=held)[0]
        for name, vector in by_name.items():
            if vector.shape != (self.manifest.length,) or vector.dtype != torch.float32:
                got = f"{list(vector.shape)} {vector.dtype}"
                raise MoleFileError(
                    printable(self.folder / self._places[name], 300),
                    f"{printable(name)}: expected [{self.manifest.length}]",
                    got=got,
                )
        return (
            torch.stack([by_name[name] for name in wanted])
            if wanted
            else torch.empty(0, self.manifest.length)
        )

    def parts(self, size: int = 64) -> Iterator[Tensor]:
        """All vectors, [≤ size, length] at a time."""
        for at in range(0, len(self), size):
            yield self.vectors(self.names[at : at + size])


def settings_of_set(work: Path) -> dict[str, Any]:
    """The settings that a set was begun with, as `as_plain` makes them."""
    path = work / "settings.json"
    settings = read_record(path, FORMAT, "the work folder of train_identities").get("training")
    per_shard = settings.get("per_shard") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or type(per_shard) is not int or per_shard < 1:
        raise MoleFileError(
            f"{printable(path, 300)}, training",
            expected="settings with per_shard of at least 1",
            got=printable(settings),
        )
    return settings


def _widened(expert: Expert) -> Expert:
    expert.check_low_rank("DiffLoRA's data")
    return Expert(
        {path: layer.to(torch.float32) for path, layer in expert.layers.items()}, source=expert.source
    )
