"""From folders of pictures to a data set of LoRAs: filter, an expert for each identity, shards of flat
vectors.

work/pictures/NAME/         what the filter left of an identity's pictures, as links, with their captions
work/experts/NAME.safetensors   one trained LoRA each: an identity that has its file is not trained again
work/shards/index.json      layout, settings, and which identity lies in which shard-NNNNN.safetensors
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mole_kernels.errors import (
    MoleFileError,
    MoleKeyError,
    MoleStateError,
    MoleValueError,
    MoleWarning,
    printable,
)
from mole_kernels.experts.bank import Init, check_name
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save, write_json
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.difflora.features import ImageEncoder, Picture
from mole_kernels.methods.difflora.manifest import Manifest, tensors_of
from mole_kernels.methods.difflora.store import as_plain, read_record
from mole_kernels.methods.lora import train_expert
from mole_kernels.modules.names import few
from mole_kernels.modules.scan import mole_targets
from mole_kernels.training.cached import picture_batches
from mole_kernels.training.captions import METADATA, read_beside, read_captions
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import SUFFIXES, PictureFolder, decode
from mole_kernels.training.processes import as_only_process, processes
from mole_kernels.training.progress import ProgressLine

FORMAT = "mole-kernels-loras-1"
INDEX = "index.json"


class PictureFilter(Protocol):
    """Says why a picture is left out, or None where it stays."""

    def __call__(self, picture: Picture) -> str | None: ...


@dataclass(frozen=True)
class MinimumSize:
    """Keeps pictures whose shorter side has at least so many pixels."""

    pixels: int = 64

    def __call__(self, picture: Picture) -> str | None:
        short = min(picture.size)
        return (
            f"its shorter side has {short} pixels, at least {self.pixels} are asked for"
            if short < self.pixels
            else None
        )


@dataclass(frozen=True)
class HasFace:
    """Keeps pictures in which a face encoder, such as `InsightFaces`, finds a face."""

    encoder: ImageEncoder

    def __call__(self, picture: Picture) -> str | None:
        try:
            self.encoder([picture])
        except MoleValueError as error:
            return f"the face encoder got {error.got}" if error.got else error.problem
        return None


@dataclass(frozen=True)
class IdentityTraining:
    """How every identity's expert is trained: all alike, else their vectors could not be compared.

    config       steps, rate, seed; all experts start from the same fresh weights and see the same noise, so
                 that what differs between
                 two vectors is what differs between two people (ours; a LoRA from another start is another
                 point for the same person)
    rank, alpha  fixed for the set
    targets      names that end the paths of the layers to adapt, () for all of MoLE's. The paper trains
                 DreamBooth LoRAs, whose layers
                 are these four of every attention
    resolution   side in pixels, or (height, width); multiple: of what sizes are multiples
    caption      of pictures that have none
    per_shard    vectors in each shard
    """

    config: TrainConfig
    rank: int = 4
    alpha: float = 4.0
    batch_size: int = 1
    resolution: int | tuple[int, int] = 512
    multiple: int = 64
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    init: Init = "kaiming"
    caption: str = "a photo of a person"
    per_shard: int = 256


@dataclass(frozen=True)
class FilteredPictures:
    """What the filter said of one identity: pictures that stay, and {picture: why not}."""

    names: list[str]
    left_out: dict[str, str] = field(default_factory=dict)


def identity_folders(root: str | Path) -> dict[str, Path]:
    """{name: folder} of the folders in `root`, by name. Raises MoleFileError where there are none or a name
    makes no identity.
    """
    root = Path(root)
    if not root.is_dir():
        raise MoleFileError(
            printable(root, 300),
            expected="a folder with a folder of pictures for each identity",
            got="no folder",
        )
    folders = {
        path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")
    }
    if not folders:
        raise MoleFileError(
            printable(root, 300), expected="a folder of pictures for each identity", got="no folders in it"
        )
    for name in folders:
        check_name(name)
    return folders


def keep_pictures(source: Path, out: Path, accept: PictureFilter, caption: str) -> FilteredPictures:
    """Links in `out` to the pictures of `source` that can be read and that `accept` takes, with a
    metadata.jsonl of their captions.

    Raises MoleFileError, each picture's reason named, where none is left.
    """
    captions, _ = read_captions(source)
    names, left_out = [], {}
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        name = path.relative_to(source).as_posix()
        try:
            why = accept(decode(path))
        except MoleFileError as error:
            why = error.problem
        if why is None:
            names.append(name)
        else:
            left_out[name] = why
    if not names:
        reasons = "; ".join(f"{printable(name)}: {why}" for name, why in list(left_out.items())[:8])
        raise MoleFileError(
            printable(source, 300), f"no picture is left of this identity ({reasons or 'there are none'})"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    lines = []
    for i, name in enumerate(names):
        link = out / f"{i:05d}{Path(name).suffix.lower()}"
        # relative, so that pictures and data set can be moved together
        link.symlink_to(os.path.relpath((source / name).resolve(), out.resolve()))
        text = captions.get(name) or read_beside(source / name) or caption
        lines.append(json.dumps({"file_name": link.name, "text": text}))
    # last: a folder without it was not finished
    (out / METADATA).write_text("\n".join(lines) + "\n", "utf-8")
    return FilteredPictures(names, left_out)


def train_identities(
    pipe: Any,
    root: str | Path,
    work: str | Path,
    training: IdentityTraining,
    *,
    accept: PictureFilter | None = None,
    progress: bool = True,
    on_identity: Callable[[str, Expert | None], None] | None = None,
) -> dict[str, Path]:
    """An expert for each identity folder of `root`; {name: file}. Started again, it goes on with those that
    have no file yet.

    Under `accelerate launch` the identities are shared out over the processes of all machines (which then
    need one file system).
    An identity of which no picture is left is passed over with a MoleWarning; MoleStateError where other
    settings began the set.
    on_identity  called after each one, with None where it was passed over
    """
    folders, work, state = identity_folders(root), Path(work), processes()
    accept = accept if accept is not None else MinimumSize()
    if state.is_main_process:
        _settle(work, training)
    state.wait_for_everyone()
    mine = list(folders)[state.process_index :: state.num_processes]
    targets = find_targets(pipe, training.targets)
    with ProgressLine(
        "identities", len(mine), 0, max(1, len(mine) // 20), progress and state.is_main_process
    ) as line:
        for done, name in enumerate(mine, 1):
            file = work / "experts" / f"{name}.safetensors"
            filtered, trained = work / "pictures" / name, file.exists()
            expert = (
                load_expert(file)
                if trained
                else _train_one(pipe, folders[name], filtered, training, accept, targets)
            )
            if expert is not None and not trained:
                save_expert(expert, file)
            if on_identity is not None:
                on_identity(name, expert)
            line.update(done, samples=done)
    state.wait_for_everyone()
    return {name: file for name in folders if (file := work / "experts" / f"{name}.safetensors").exists()}


def find_targets(pipe: Any, names: Sequence[str]) -> dict[str, Any]:
    """{path: layer} of the layers whose paths end in one of `names`, all of MoLE's for none. MoleValueError
    where there are none.
    """
    unet = getattr(pipe, "unet", pipe)
    layers = {
        p: m
        for p, m in mole_targets(unet).items()
        if not names or p.endswith(tuple(f".{name}" for name in names))
    }
    if not layers:
        raise MoleValueError(
            "difflora: targets",
            expected=f"layers called {', '.join(names)}",
            got=f"none in {type(unet).__name__}",
        )
    return layers


def pack_shards(work: str | Path, names: Sequence[str] | None = None) -> LoRADataset:
    """Shards of flat vectors from the experts of `train_identities`, each `per_shard` long; replaces those
    there are, all or none.

    names  a part of them, in this order; None for all, by name
    Raises MoleValueError or MoleShapeError, the layer named, where two experts do not have one layout.
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
    settings = _settings_of(work)
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

    names  all identities, in the shards' order     manifest  the vectors' layout
    Raises MoleFileError for a folder without an index, or one whose shards are not all there.
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


def pictures_of(work: str | Path, name: str) -> list[Picture]:
    """The pictures that the filter left of an identity."""
    folder = Path(work) / "pictures" / name
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise MoleFileError(printable(folder, 300), expected="the pictures of an identity", got="none")
    return [decode(path) for path in paths]


def _train_one(
    pipe: Any,
    source: Path,
    filtered: Path,
    training: IdentityTraining,
    accept: PictureFilter,
    targets: Mapping[str, Any],
) -> Expert | None:
    try:
        keep_pictures(source, filtered, accept, training.caption)
    except MoleFileError as error:
        warnings.warn(f"{error} This identity is passed over.", MoleWarning, stacklevel=3)
        return None
    # each process trains its own identities, at its own pace
    with as_only_process(), warnings.catch_warnings():
        # of one person's pictures that is no accident
        warnings.filterwarnings("ignore", message=".*one and the same caption", category=MoleWarning)
        folder = PictureFolder(filtered, training.resolution, multiple=training.multiple)
        batches = picture_batches(
            pipe, folder, min(training.batch_size, len(folder)), seed=training.config.seed, progress=False
        )
        # one name for all: fresh weights are drawn by seed and name
        return train_expert(
            pipe,
            batches,
            name="identity",
            rank=training.rank,
            alpha=training.alpha,
            config=training.config,
            null=batches.null,
            targets=targets,
            init=training.init,
            progress=False,
        )


def _settings_of(work: Path) -> dict[str, Any]:
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


def _settle(work: Path, training: IdentityTraining) -> None:
    """Notes the settings of a set, or checks that they are those it was begun with."""
    path, here = work / "settings.json", as_plain(training)
    (work / "experts").mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, {"format": FORMAT, "training": here})
        return
    before = _settings_of(work)
    for key in here:
        # how they are packed changes no expert
        if key != "per_shard" and before.get(key) != here[key]:
            hint = "all experts of a set are trained alike; begin another work folder"
            raise MoleStateError(
                f"{printable(path, 300)}: {key}",
                expected=f"{before.get(key)!r} as when the set began",
                got=repr(here[key]),
                hint=hint,
            )
    write_json(path, {"format": FORMAT, "training": here})


def _widened(expert: Expert) -> Expert:
    return Expert(
        {path: layer.to(torch.float32) for path, layer in expert.layers.items()}, source=expert.source
    )
