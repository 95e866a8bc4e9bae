"""From folders of pictures to a data set of LoRAs: filter, an expert for each identity, shards of flat
vectors.

work/pictures/NAME/         what the filter left of an identity's pictures, as links, with their captions
work/experts/NAME.safetensors   one trained LoRA each: an identity that has its file is not trained again
work/experts/NAME.json          how long it took: seconds, steps, pictures
work/shards/index.json      layout, settings, and which identity lies in which shard-NNNNN.safetensors
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mole_kernels.errors import (
    MoleFileError,
    MoleStateError,
    MoleValueError,
    MoleWarning,
    printable,
)
from mole_kernels.experts.bank import Init, check_name
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.writer import write_json
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.difflora.features import ImageEncoder, Picture
from mole_kernels.methods.difflora.identities import PriorBatches
from mole_kernels.methods.difflora.shards import FORMAT, settings_of_set
from mole_kernels.methods.difflora.store import as_plain
from mole_kernels.methods.lora import train_expert
from mole_kernels.modules.scan import mole_targets
from mole_kernels.training.cached import PictureBatches, picture_batches
from mole_kernels.training.captions import METADATA, read_beside, read_captions
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import SUFFIXES, PictureFolder, decode
from mole_kernels.training.processes import as_only_process, processes
from mole_kernels.training.progress import ProgressLine


@runtime_checkable
class IdentityFilter(Protocol):
    """Makes a filter of each identity's folder."""

    def for_folder(self, source: Path) -> PictureFilter: ...


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

    Args:
        config: Steps, rate, seed; all experts start from the same fresh weights and see the same noise,
            so that what differs between two vectors is what differs between two people (ours; a LoRA
            from another start is another point for the same person).
        rank: Rank of every expert of the set.
        alpha: Scale of every expert is alpha/rank.
        targets: Names that end the paths of the layers to adapt, () for all of MoLE's. The paper trains
            DreamBooth LoRAs, whose layers are these four of every attention.
        resolution: Side in pixels, or (height, width).
        multiple: Sizes are multiples of this.
        caption: Of pictures that have none; with a token, of all.
        token: Rare token that names the identity, as DreamBooth has it ("sks"): every caption becomes
            `caption` with {} replaced by it, "a photo of {} person". "" for captions as they are.
        prior: Weight of the class pictures' loss; 0 for none (DreamBooth: 1).
        per_shard: Vectors in each shard.
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
    token: str = ""
    prior: float = 0.0
    per_shard: int = 256

    def __post_init__(self) -> None:
        if self.token and "{}" not in self.caption:
            raise MoleValueError(
                "IdentityTraining: caption",
                expected="a text with {} for the token, as in 'a photo of {} person'",
                got=printable(self.caption),
            )
        if not 0 <= self.prior < float("inf"):
            raise MoleValueError("IdentityTraining: prior", expected="at least 0", got=self.prior)


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


def keep_pictures(
    source: Path, out: Path, accept: PictureFilter, caption: str, *, always: bool = False
) -> FilteredPictures:
    """Links in `out` to the pictures of `source` that can be read and that `accept` takes, with a
    metadata.jsonl of their captions.

    Raises MoleFileError, each picture's reason named, where none is left.

    Args:
        always: The caption is taken for all pictures, whatever theirs is.
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
        text = caption if always else captions.get(name) or read_beside(source / name) or caption
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
    accept: PictureFilter | IdentityFilter | None = None,
    class_pictures: str | Path | None = None,
    progress: bool = True,
    on_identity: Callable[[str, Expert | None], None] | None = None,
) -> dict[str, Path]:
    """An expert for each identity folder of `root`; {name: file}. Started again, it goes on with those that
    have no file yet.

    Under `accelerate launch` the identities are shared out over the processes of all machines (which then
    need one file system).
    An identity of which no picture is left is passed over with a MoleWarning; MoleStateError where other
    settings began the set.

    Args:
        accept: One filter for all, or one that makes a filter of each identity's folder (`SameFace`).
        class_pictures: Folder of class pictures, needed where `training.prior` is above 0 (`draw_class`).
        on_identity: Called after each one, with None where it was passed over.
    """
    if bool(training.prior) != (class_pictures is not None):
        raise MoleValueError(
            "train_identities: class_pictures",
            expected="a folder with prior above 0, none without",
            got=f"{printable(class_pictures)} with prior {training.prior:g}",
        )
    folders, work, state = identity_folders(root), Path(work), processes()
    accept = accept if accept is not None else MinimumSize()
    if state.is_main_process:
        _settle(work, training)
    state.wait_for_everyone()
    mine = list(folders)[state.process_index :: state.num_processes]
    targets = find_targets(pipe, training.targets)
    with ProgressLine("identities", len(mine), 0, 0, progress and state.is_main_process) as line:
        for done, name in enumerate(mine, 1):
            file = work / "experts" / f"{name}.safetensors"
            filtered, trained, begun = work / "pictures" / name, file.exists(), time.perf_counter()
            expert = (
                load_expert(file)
                if trained
                else _train_one(pipe, folders[name], filtered, training, accept, targets, class_pictures)
            )
            if expert is not None and not trained:
                save_expert(expert, file)
                about = {"seconds": time.perf_counter() - begun, "steps": training.config.steps}
                write_json(file.with_suffix(".json"), about | {"pictures": len(pictures_of(work, name))})
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
    accept: PictureFilter | IdentityFilter,
    targets: Mapping[str, Any],
    class_pictures: str | Path | None,
) -> Expert | None:
    caption = training.caption.replace("{}", training.token)
    try:
        own = accept.for_folder(source) if isinstance(accept, IdentityFilter) else accept
        keep_pictures(source, filtered, own, caption, always=bool(training.token))
    except MoleFileError as error:
        warnings.warn(f"{error} This identity is passed over.", MoleWarning, stacklevel=3)
        return None
    # each process trains its own identities, at its own pace
    with as_only_process(), warnings.catch_warnings():
        # of one person's pictures that is no accident
        warnings.filterwarnings("ignore", message=".*one and the same caption", category=MoleWarning)
        # beside class pictures all have one size
        buckets = class_pictures is None
        folder = PictureFolder(filtered, training.resolution, buckets=buckets, multiple=training.multiple)
        batches: PictureBatches | PriorBatches = picture_batches(
            pipe, folder, min(training.batch_size, len(folder)), seed=training.config.seed, progress=False
        )
        if class_pictures is not None:
            batches = _with_prior(pipe, batches, class_pictures, training)
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


def _with_prior(
    pipe: Any, own: PictureBatches | PriorBatches, class_pictures: str | Path, training: IdentityTraining
) -> PriorBatches:
    assert isinstance(own, PictureBatches)
    folder = PictureFolder(class_pictures, training.resolution, buckets=False, multiple=training.multiple)
    size = min(own.batch_size, len(folder))
    prior = picture_batches(pipe, folder, size, seed=training.config.seed, progress=False)
    return PriorBatches(own, prior, training.prior)


def _settle(work: Path, training: IdentityTraining) -> None:
    """Notes the settings of a set, or checks that they are those it was begun with."""
    path, here = work / "settings.json", as_plain(training)
    (work / "experts").mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, {"format": FORMAT, "training": here})
        return
    before = settings_of_set(work)
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
