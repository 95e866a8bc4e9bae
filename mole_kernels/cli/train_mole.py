"""What `mole-kernels train mole` does: settings, data, model, training, file. Everything that can be wrong is
looked at before training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.screen import done, facts, out
from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl
from mole_kernels.io.experts import load_expert
from mole_kernels.io.gates import OFFICIAL_NAMES, load_gates
from mole_kernels.io.save import save_expert
from mole_kernels.methods.mole import PRESETS, train_expert, train_gates, train_unet
from mole_kernels.modules.scan import mole_targets
from mole_kernels.patching.apply import patch
from mole_kernels.training.cached import CacheSize, PictureBatches, cache_size, picture_batches
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.encode import Encoder
from mole_kernels.training.pictures import PictureFolder
from mole_kernels.training.processes import processes

Given = Mapping[str, Any]
# zero on the command line is None in a config
_OFF_AT_ZERO = ("snr_gamma", "ema_decay")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_unet(given: Given) -> None:
    """Stage 1."""
    asked, preset = _plain(given), PRESETS[given["preset"].value]
    if preset.unet is None:
        raise MoleValueError(
            "train mole unet: --preset",
            f"{given['preset'].value} has no stage 1",
            hint="--preset small or sd15",
        )
    config, folder = settings(preset.unet, asked), _folder(asked, preset.resolution)
    _echo("stage 1: the UNet", asked, config, folder, {})
    pipe = _pipeline(asked["model"], torch.float32)
    batches = _batches(pipe, folder, asked, preset.batch_size)
    if batches is None:
        return
    result = train_unet(pipe, batches, config, null=batches.null, **_run(asked))
    if _main():
        _save_pipeline(pipe, asked["out"])
        done(str(asked["out"]), f"a pipeline whose UNet took {result.steps} more steps")


def run_expert(given: Given) -> None:
    """Stage 2."""
    asked, preset = _plain(given), PRESETS[given["preset"].value]
    mine = preset.expert(asked["name"])
    rank = asked["rank"] or preset.rank
    # the preset's scale, unless told otherwise: alpha goes with the rank
    alpha = mine.alpha / preset.rank * rank if asked["alpha"] is None else asked["alpha"]
    config, folder = settings(mine.config, asked), _folder(asked, preset.resolution)
    _echo(
        f"stage 2: expert {asked['name']}",
        asked,
        config,
        folder,
        {"rank, alpha": f"{rank}, {alpha:g} (scale {alpha / rank:g})"},
    )
    pipe = _pipeline(asked["model"], _dtype(asked, config))
    if asked["to"] == "kohya":
        _check_kohya([f"unet.{path}" for path in mole_targets(pipe.unet)])
    batches = _batches(pipe, folder, asked, preset.batch_size)
    if batches is None:
        return
    pipe = _denoiser_alone(pipe)
    options = {"name": asked["name"], "rank": rank, "alpha": alpha, "config": config, "null": batches.null}
    expert = train_expert(pipe, batches, **options, **_run(asked))
    if _main():
        save_expert(expert, asked["out"], asked["to"])
        done(
            str(asked["out"]),
            f"expert {asked['name']}: {len(expert.layers)} layers, rank {rank}, late loss {expert.metadata['loss']}",
        )


def run_gates(given: Given) -> None:
    """Stage 3."""
    asked, preset = _plain(given), PRESETS[given["preset"].value]
    files = named_files(asked["expert"])
    kind = {"both": "mole"}.get(asked["kind"], asked["kind"])
    if asked["to"] == "official" and (set(files) != set(OFFICIAL_NAMES) or kind != "mole"):
        expected = f"experts {' and '.join(OFFICIAL_NAMES)} with --kind both"
        raise MoleValueError(
            "train mole gates: --to official",
            expected=expected,
            got=f"{', '.join(files)} with --kind {asked['kind']}",
        )
    config, folder = settings(preset.gates, asked), _folder(asked, preset.resolution)
    experts = {name: load_expert(path) for name, path in files.items()}
    start = None if asked["start"] is None else load_gates(asked["start"])
    if (
        asked["to"] == "official"
        and start is not None
        and any(len(layer.present()) != 4 for layer in start.layers.values())
    ):
        raise MoleValueError(
            "train mole gates: --to official",
            expected="token and sample gates in --start",
            got="one kind of them",
        )
    named = ", ".join(f"{name} r{'/'.join(map(str, sorted(one.ranks())))}" for name, one in experts.items())
    _echo(
        "stage 3: gates",
        asked,
        config,
        folder,
        {"experts": named, "gates": asked["kind"] if start is None else asked["start"]},
    )
    pipe = _pipeline(asked["model"], _dtype(asked, config))
    batches = _batches(pipe, folder, asked, preset.batch_size)
    if batches is None:
        return
    pipe = _denoiser_alone(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        handle = patch(pipe, experts, start if start is not None else kind)
    with handle:
        result = train_gates(handle, batches, config, null=batches.null, **_run(asked))
        if _main():
            handle.save_gates(asked["out"], dialect=asked["to"])
    if _main():
        late = sum(result.losses[-50:]) / max(1, len(result.losses[-50:]))
        done(str(asked["out"]), f"gates of {', '.join(files)}: {result.steps} steps, late loss {late:.6g}")


def settings(preset: TrainConfig, asked: Given) -> TrainConfig:
    """The preset's run with what was asked for in its place; what does not fit is a MoleValueError."""
    known = {f.name for f in fields(TrainConfig)}
    given = {key: value for key, value in asked.items() if key in known and value is not None}
    given |= {key: None for key in _OFF_AT_ZERO if given.get(key) == 0}
    if asked.get("precision") is not None:
        given["mixed_precision"] = asked["precision"]
    if given.get("optimiser") == "lion" and preset.optimiser != "lion":
        given["betas"] = (0.9, 0.99)
    # a shorter run keeps its share of warm-up, a longer one the steps
    steps = given.get("steps", preset.steps)
    given.setdefault("warmup", min(preset.warmup, max(0, steps // 20)))
    return replace(preset, **given)


def named_files(said: Sequence[str]) -> dict[str, Path]:
    """{"face": Path("a.safetensors"), …} of NAME=FILE, in the order given."""
    files: dict[str, Path] = {}
    for one in said:
        name, mark, path = one.partition("=")
        if not mark or not name or not path:
            raise MoleValueError("--expert", expected="NAME=FILE", got=printable(one))
        if name in files:
            raise MoleValueError("--expert", f"two are called {printable(name)}")
        files[name] = Path(path)
    return files


def _plain(given: Given) -> dict[str, Any]:
    """Options as plain values; the folder of --out is made, so that a run of days does not end before a
    closed door.
    """
    asked = {key: value.value if isinstance(value, Enum) else value for key, value in given.items()}
    target: Path = asked["out"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoleFileError(printable(target.parent, 300), f"cannot be made ({error.strerror})") from error
    if not os.access(target.parent, os.W_OK):
        raise MoleFileError(printable(target.parent, 300), "may not be written to")
    asked["run_dir"] = asked["run_dir"] or target.with_name(target.name + ".run")
    asked["cache"] = asked["cache"] or target.parent / "cache"
    return asked


def _folder(asked: Given, resolution: int) -> PictureFolder:
    said = str(asked["resolution"] or resolution)
    sides = said.split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise MoleValueError(
            "--resolution", expected="a side in pixels, or HEIGHTxWIDTH", got=printable(said)
        )
    size = int(said) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
    options = {
        "buckets": asked["buckets"],
        "on_bad": asked["on_bad"],
        "multiple": asked["multiple"],
        "column": asked["column"],
    }
    return PictureFolder(asked["data"], size, **options)


def _echo(
    title: str, asked: Given, config: TrainConfig, folder: PictureFolder, more: Mapping[str, object]
) -> None:
    if not _main():
        return
    sizes = ", ".join(f"{n} of {h}x{w}" for (h, w), n in folder.counts().items())
    shown = {
        "preset": asked["preset"],
        **more,
        "pictures": f"{len(folder)}: {sizes}",
        "model": asked["model"],
    }
    if folder.skipped:
        shown["left out"] = len(folder.skipped)
    shown |= {f.name: getattr(config, f.name) for f in fields(config)}
    out().print(title, style="bold")
    out().print(facts(shown.items()))


def _pipeline(name: str, dtype: torch.dtype) -> Any:
    pipe = read_pipeline(name, dtype, processes().device, command="train")
    if not isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        raise MoleFileError(printable(name, 300), expected="a pipeline with a UNet", got=type(pipe).__name__)
    return pipe


def _batches(pipe: Any, folder: PictureFolder, asked: Given, batch_size: int) -> PictureBatches | None:
    """The batches, their cache made; None where only its size was asked for."""
    if asked["dry_run"]:
        encoder = Encoder(pipe)
        size = cache_size(folder, encoder, encoder.null(), encoder.dtype, None, None)
        _say(
            f"the cache would take {size.total:,} bytes in {asked['cache']}: latents {size.latents:,}, text {size.texts:,}; nothing trained"
        )
        return None

    def tell(size: CacheSize) -> None:
        _say(f"cache: {size.total:,} bytes in {asked['cache']}, of which {size.missing:,} are to be made")

    batches = picture_batches(
        pipe,
        folder,
        asked["batch_size"] or batch_size,
        cache=asked["cache"],
        seed=asked["seed"],
        on_size=tell,
    )
    _say(f"{batches.per_epoch} batches an epoch")
    return batches


def _denoiser_alone(pipe: Any) -> Any:
    """A pipeline of nothing but the UNet and its scheduler: the VAE and the text encoders have done their
    work.
    """
    return SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, components={"unet": pipe.unet})


def _dtype(asked: Given, config: TrainConfig) -> torch.dtype:
    if asked["dtype"] is not None:
        return getattr(torch, asked["dtype"])
    return (
        _DTYPES.get(config.mixed_precision or "", torch.float32)
        if torch.cuda.is_available()
        else torch.float32
    )


def _run(asked: Given) -> dict[str, Any]:
    return {"run_dir": asked["run_dir"], "resume": asked["resume"], "trackers": tuple(asked["tracker"] or ())}


def _check_kohya(paths: Sequence[str]) -> None:
    sdxl = looks_like_sdxl(paths)
    nameless = [path for path in paths if kohya_name(path, sdxl=sdxl) is None]
    if nameless:
        raise MoleValueError(
            "--to kohya", f"its names do not cover {printable(nameless[0])}", hint="--to diffusers"
        )


def _save_pipeline(pipe: Any, target: Path) -> None:
    """The whole folder or none of it; a folder that is there is replaced only at the end."""
    draft, old = target.with_name(f".{target.name}.draft"), target.with_name(f".{target.name}.old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with _named(target):
        pipe.save_pretrained(draft)
        if target.exists():
            target.rename(old)
        draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named(target: Path):
    try:
        yield
    except OSError as error:
        hint = "the last checkpoint holds the weights; --resume writes them again"
        raise MoleFileError(
            printable(target, 300), f"could not be written ({error.strerror})", hint=hint
        ) from error


def _main() -> bool:
    return bool(processes().is_main_process)


def _say(text: str) -> None:
    if _main():
        out().print(text, soft_wrap=True)
