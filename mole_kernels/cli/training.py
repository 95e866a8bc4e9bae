"""What all commands that train on pictures share: settings, folder, base, what is said beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mole_kernels.cli.options import DtypeName, LoopArgs, PictureArgs
from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.place import ready_folder
from mole_kernels.cli.screen import facts, out
from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import PictureFolder
from mole_kernels.training.processes import processes

# zero on the command line is None in a config
_OFF_AT_ZERO = ("snr_gamma", "ema_decay")
# accelerate's words for mixed precision
_MIXED = {"no": "no", "bfloat16": "bf16", "float16": "fp16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RunLike(Protocol):
    """What `RunArgs` and its like hold of a run."""

    @property
    def out(self) -> Path: ...
    @property
    def run_dir(self) -> Path | None: ...
    @property
    def resume(self) -> bool: ...
    @property
    def tracker(self) -> list[str] | None: ...


def settings(preset: TrainConfig, asked: LoopArgs, seed: int) -> TrainConfig:
    """The preset's run with what was asked for in its place.

    Raises:
        MoleValueError: Settings that do not fit each other.
    """
    known = {f.name for f in fields(TrainConfig)}
    values: dict[str, Any] = {key: value for key, value in vars(asked).items() if key in known}
    values = {key: value for key, value in values.items() if value is not None} | {"seed": seed}
    values |= {key: None for key in _OFF_AT_ZERO if values.get(key) == 0}
    if asked.mixed_precision is not None:
        values["mixed_precision"] = _MIXED[asked.mixed_precision]
    if values.get("optimiser") == "lion" and preset.optimiser != "lion":
        values["betas"] = (0.9, 0.99)
    # a shorter run keeps its share of warm-up, a longer one the steps
    steps = values.get("steps", preset.steps)
    values.setdefault("warmup", min(preset.warmup, max(0, steps // 20)))
    return replace(preset, **values)


def named(entries: Sequence[str], where: str, form: str) -> dict[str, str]:
    """{name: value} of NAME=VALUE entries, in their order.

    Raises:
        MoleValueError: An entry of another form, or two of one name.
    """
    values: dict[str, str] = {}
    for entry in entries:
        name, mark, value = entry.partition("=")
        if not mark or not name or not value:
            raise MoleValueError(where, expected=form, got=printable(entry))
        if name in values:
            raise MoleValueError(where, f"two are called {printable(name)}")
        values[name] = value
    return values


def resolution_of(text: str | None) -> int | tuple[int, int] | None:
    """A side in pixels, or (height, width).

    Raises:
        MoleValueError: The text is neither.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise MoleValueError(
            "--resolution", expected="a side in pixels, or HEIGHTxWIDTH", got=f"'{printable(text, 40)}'"
        )
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def picture_folder(asked: PictureArgs, resolution: int, *, buckets: bool | None = None) -> PictureFolder:
    """The folder of --data, at the resolution asked for or this one."""
    return PictureFolder(
        asked.data,
        resolution_of(asked.resolution) or resolution,
        buckets=asked.buckets if buckets is None else buckets,
        on_bad=asked.on_bad,
        multiple=asked.multiple,
        column=asked.column,
    )


def run_options(asked: RunLike) -> dict[str, Any]:
    """run_dir, resume and trackers, as `fit` takes them."""
    run_dir = asked.run_dir or asked.out.with_name(asked.out.name + ".run")
    return {"run_dir": run_dir, "resume": asked.resume, "trackers": tuple(asked.tracker or ())}


def ready_run(asked: RunLike) -> None:
    """Fail now, not after days of training, where --out or --run-dir cannot be written."""
    ready_folder(asked.out.parent)
    ready_folder(run_options(asked)["run_dir"].parent)


def echo(title: str, facts_before: Mapping[str, object], config: TrainConfig, folder: PictureFolder) -> None:
    """Say what will be trained, on what, and how."""
    if not is_main():
        return
    sizes = ", ".join(f"{n} of {h}x{w}" for (h, w), n in folder.counts().items())
    shown: dict[str, object] = {**facts_before, "pictures": f"{len(folder)}: {sizes}"}
    if folder.skipped:
        shown["left out"] = len(folder.skipped)
    shown |= {f.name: getattr(config, f.name) for f in fields(config)}
    out().print(title, style="bold")
    out().print(facts(shown.items()))


def pipeline_with_unet(name: str, dtype: torch.dtype) -> Any:
    """The base, on this process's device.

    Raises:
        MoleFileError: A pipeline without a UNet.
    """
    pipe = read_pipeline(name, dtype, processes().device, command="train")
    if not isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        raise MoleFileError(printable(name, 300), expected="a pipeline with a UNet", got=type(pipe).__name__)
    return pipe


def named_dtype(name: DtypeName | None, config: TrainConfig) -> torch.dtype:
    """The dtype of the frozen base; where none is asked for, float32 on a CPU, else mixed precision's."""
    if name is not None:
        return getattr(torch, name)
    mixed = _DTYPES.get(config.mixed_precision or "", torch.float32)
    return mixed if torch.cuda.is_available() else torch.float32


def late_loss(losses: Sequence[float]) -> float:
    """Mean of the last 50 losses."""
    return sum(losses[-50:]) / max(1, len(losses[-50:]))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(processes().is_main_process)


def tell(text: str) -> None:
    """Print a line, in the main process alone."""
    if is_main():
        out().print(text, soft_wrap=True)
