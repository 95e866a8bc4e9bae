"""Stage 2: one picture per prompt by any diffusers pipeline, shared out over processes and machines, none
made twice.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mole_kernels.errors import (
    MoleStateError,
    MoleTypeError,
    MoleValueError,
    MoleWarning,
    printable,
)
from mole_kernels.files.writer import atomic_write
from mole_kernels.methods.selma.project import Project, write_lines
from mole_kernels.training.data import counted_generator
from mole_kernels.training.pictures import picture_errors

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are made.

    Args:
        seed: With a picture's number it gives the picture's own seed, whatever process makes it and
            beside which others.
        batch: Pictures at once on each process.
        options: Further arguments of the pipeline's call, plain values: num_inference_steps,
            guidance_scale, height, width, …
    """

    seed: int = 42
    batch: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.batch, int) or self.batch < 1:
            raise MoleValueError(
                "PictureSettings: batch", expected="an integer of at least 1", got=repr(self.batch)
            )
        ours = {"prompt", "generator", "output_type", "num_images_per_prompt", "return_dict"} & set(
            self.options
        )
        if ours:
            raise MoleValueError(
                "PictureSettings: options",
                expected=f"nothing but the stage's own {', '.join(sorted(ours))}",
                got="them too",
            )


def make_pictures(
    project: Project,
    skill: str,
    pipe: Any,
    settings: PictureSettings = PictureSettings(),
    *,
    on_picture: Callable[[int], None] | None = None,
) -> int:
    """Stage 2 for one skill: the pictures that are not there yet, into the project's folder; returns how many
    this process made.
    """
    from mole_kernels.training.processes import processes

    prompts, state = project.prompts(skill), processes()
    if state.is_main_process:
        project.settle("pictures", skill, asdict(settings) | {"model": name_of(pipe)}, ("batch",))
    state.wait_for_everyone()
    count = draw_prompts(pipe, prompts, project.pictures_folder(skill), settings, on_picture=on_picture)
    if state.is_main_process:
        flagged = len(list(flagged_folder(project.pictures_folder(skill)).glob("*.png")))
        project.note("pictures", skill, {"pictures": len(prompts) - flagged, "flagged": flagged})
    return count


def draw_prompts(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    settings: PictureSettings = PictureSettings(),
    *,
    on_picture: Callable[[int], None] | None = None,
) -> int:
    """One picture for each prompt: folder/000000.png, … and metadata.jsonl; returns how many this process
    made.

    Run under `accelerate launch` the missing pictures are shared out evenly; the folder must be one that all
    processes see.
    Each file is whole or not there and holds its prompt and seed as PNG text; metadata.jsonl {file_name,
    text, seed} is written
    once all are made. What the pipeline's own safety checker flags goes to a folder beside it,
    `flagged_folder`.
    """
    from accelerate.utils import broadcast_object_list

    from mole_kernels.training.processes import processes

    if not callable(pipe) or "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise MoleTypeError(
            "draw: pipe", expected="a diffusers pipeline that takes prompts", got=type(pipe).__name__
        )
    state = processes()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(folder)
    # one process looks and tells the others: each would see another folder once pictures are being made
    missing = [_missing(prompts, folder, settings.seed) if state.is_main_process else None]
    missing = broadcast_object_list(missing, from_process=0)[0]
    count = 0
    with state.split_between_processes(missing) as mine:
        for numbers in _chunks(mine, settings.batch):
            for number in _make(pipe, prompts, numbers, folder, settings):
                count += 1
                if on_picture is not None:
                    on_picture(number)
    state.wait_for_everyone()
    if state.is_main_process:
        _write_metadata(prompts, folder, settings.seed)
    state.wait_for_everyone()
    return count


def seed_of(seed: int, number: int) -> int:
    """The seed of picture `number`, 63 bits that depend on (seed, number) alone."""
    return counted_generator(seed, "picture", number).initial_seed()


def file_name(number: int) -> str:
    return f"{number:06d}.png"


def flagged_folder(folder: Path) -> Path:
    """Where pictures go that are none to train on: beside the folder, since what lies below it is trained
    on.
    """
    return folder.with_name(folder.name + "_flagged")


def name_of(pipe: Any) -> str:
    """The class of a pipeline, and the folder or hub name it was read from."""
    source = getattr(getattr(pipe, "config", None), "_name_or_path", None) or getattr(
        pipe, "name_or_path", None
    )
    return f"{type(pipe).__name__} {source}" if source else type(pipe).__name__


def _make(
    pipe: Any, prompts: Sequence[str], numbers: Sequence[int], folder: Path, settings: PictureSettings
) -> Iterator[int]:
    """Makes and writes some pictures; yields the number of each once it is on the disk."""
    seeds = [seed_of(settings.seed, number) for number in numbers]
    # on the CPU, so that a picture's noise is the same on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    out = pipe(
        prompt=[prompts[number] for number in numbers],
        generator=generators,
        output_type="pil",
        **settings.options,
    )
    if len(out.images) != len(numbers):
        raise MoleStateError(
            "draw: pipe", expected=f"{len(numbers)} pictures for as many prompts", got=len(out.images)
        )
    flags = getattr(out, "nsfw_content_detected", None) or [False] * len(numbers)
    for number, seed, image, flagged in zip(numbers, seeds, out.images, flags, strict=True):
        path = (flagged_folder(folder) if flagged else folder) / file_name(number)
        if not flagged and all(high == 0 for _, high in image.convert("RGB").getextrema()):
            warnings.warn(
                f"{path} is black all over; a half-precision VAE that overflows does that",
                MoleWarning,
                stacklevel=2,
            )
        _save(image, path, prompts[number], seed)
        yield number


def _save(image: Any, path: Path, prompt: str, seed: int) -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("prompt", prompt)
    text.add_text("seed", str(seed))

    def write(file: BinaryIO) -> None:
        image.save(file, "PNG", pnginfo=text)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def _missing(prompts: Sequence[str], folder: Path, seed: int) -> list[int]:
    """Numbers without a picture; one that was made for another prompt or with another seed is a
    MoleStateError.
    """
    out = []
    for number, prompt in enumerate(prompts):
        path = _found(folder, number)
        if path is None:
            out.append(number)
            continue
        about = _about(path)
        wanted = {"prompt": prompt, "seed": str(seed_of(seed, number))}
        for key, value in wanted.items():
            if about.get(key) != value:
                hint = "go on with the prompts and the seed the folder began with, or take another folder"
                raise MoleStateError(
                    f"{printable(path, 300)}: {key}",
                    expected=printable(value),
                    got=printable(about.get(key)),
                    hint=hint,
                )
    return out


def _found(folder: Path, number: int) -> Path | None:
    return next(
        (
            path
            for path in (folder / file_name(number), flagged_folder(folder) / file_name(number))
            if path.exists()
        ),
        None,
    )


def _about(path: Path) -> dict[str, Any]:
    """The texts of a PNG, from its header alone."""
    from PIL import Image

    with picture_errors(path, "remove it and it is made again"), Image.open(path) as image:
        return dict(image.info)


def _write_metadata(prompts: Sequence[str], folder: Path, seed: int) -> None:
    rows = [
        {"file_name": file_name(number), "text": prompt, "seed": seed_of(seed, number)}
        for number, prompt in enumerate(prompts)
        if (folder / file_name(number)).exists()
    ]
    write_lines(folder / METADATA, rows)


def _clear_unfinished(folder: Path) -> None:
    """What a killed process left half-written."""
    for part in (folder, flagged_folder(folder)):
        for path in part.glob(".*.png.*.tmp"):
            path.unlink(missing_ok=True)


def _chunks(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]
