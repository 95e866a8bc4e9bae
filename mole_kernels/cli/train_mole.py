"""What `mole-kernels train mole` does; everything is checked before training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mole_kernels.cli.screen import done
from mole_kernels.cli.train import MoleExpertArgs, MoleGatesArgs, MoleUnetArgs
from mole_kernels.cli.training import (
    echo,
    is_main,
    late_loss,
    named,
    named_dtype,
    picture_folder,
    pipeline_with_unet,
    ready_run,
    run_options,
    settings,
    tell,
)
from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl
from mole_kernels.io.experts import load_expert
from mole_kernels.io.gates import OFFICIAL_NAMES, GateFile, load_gates
from mole_kernels.io.save import save_expert
from mole_kernels.methods.mole import PRESETS, train_expert, train_gates, train_unet
from mole_kernels.modules.scan import mole_targets
from mole_kernels.patching.apply import patch
from mole_kernels.training.cached import CacheSize, PictureBatches, cache_size, picture_batches
from mole_kernels.training.encode import Encoder
from mole_kernels.training.pictures import PictureFolder

# MoLE's words for the kinds of gates
_GATES = {"both": "mole", "token": "local", "sample": "global"}


def run_unet(asked: MoleUnetArgs) -> None:
    """Stage 1."""
    preset = _preset(asked)
    if preset.unet is None:
        raise MoleValueError(
            "train mole unet: --preset", f"{asked.preset} has no stage 1", hint="--preset small or sd15"
        )
    ready_run(asked)
    config, folder = settings(preset.unet, asked, asked.seed), picture_folder(asked, preset.resolution)
    echo("stage 1: the UNet", {"preset": asked.preset, "model": asked.model}, config, folder)
    pipe = pipeline_with_unet(asked.model, torch.float32)
    batches = _batches(pipe, folder, asked, asked.batch_size or preset.batch_size)
    if batches is None:
        return
    result = train_unet(pipe, batches, config, null=batches.null, **run_options(asked))
    if is_main():
        _save_pipeline(pipe, asked.out)
        done(str(asked.out), f"a pipeline whose UNet took {result.steps} more steps")


def run_expert(asked: MoleExpertArgs) -> None:
    """Stage 2."""
    preset = _preset(asked)
    own = preset.expert(asked.name)
    rank = asked.rank or preset.rank
    # the preset's scale, unless told otherwise: alpha goes with the rank
    alpha = own.alpha / preset.rank * rank if asked.alpha is None else asked.alpha
    ready_run(asked)
    config, folder = settings(own.config, asked, asked.seed), picture_folder(asked, preset.resolution)
    before = {"preset": asked.preset, "rank, alpha": f"{rank}, {alpha:g} (scale {alpha / rank:g})"}
    echo(f"stage 2: expert {asked.name}", before | {"model": asked.model}, config, folder)
    pipe = pipeline_with_unet(asked.model, named_dtype(asked.dtype, config))
    if asked.to == "kohya":
        _check_kohya([f"unet.{path}" for path in mole_targets(pipe.unet)])
    batches = _batches(pipe, folder, asked, asked.batch_size or preset.batch_size)
    if batches is None:
        return
    expert = train_expert(
        _denoiser_alone(pipe),
        batches,
        name=asked.name,
        rank=rank,
        alpha=alpha,
        config=config,
        null=batches.null,
        **run_options(asked),
    )
    if is_main():
        save_expert(expert, asked.out, asked.to)
        what = f"{len(expert.layers)} layers, rank {rank}, late loss {expert.metadata['loss']}"
        done(str(asked.out), f"expert {asked.name}: {what}")


def run_gates(asked: MoleGatesArgs) -> None:
    """Stage 3."""
    preset = _preset(asked)
    files = named(asked.expert_file, "--expert-file", "NAME=FILE")
    start = None if asked.initial_gates is None else load_gates(asked.initial_gates)
    _check_official(asked, list(files), start)
    ready_run(asked)
    config, folder = settings(preset.gates, asked, asked.seed), picture_folder(asked, preset.resolution)
    experts = {name: load_expert(path) for name, path in files.items()}
    ranks = ", ".join(f"{name} r{'/'.join(map(str, sorted(e.ranks())))}" for name, e in experts.items())
    before: dict[str, object] = {"preset": asked.preset, "experts": ranks, "model": asked.model}
    before["gates"] = asked.gate_kind if start is None else asked.initial_gates
    echo("stage 3: gates", before, config, folder)
    pipe = pipeline_with_unet(asked.model, named_dtype(asked.dtype, config))
    batch_size = asked.batch_size or preset.gates_batch_size or preset.batch_size
    batches = _batches(pipe, folder, asked, batch_size)
    if batches is None:
        return
    pipe = _denoiser_alone(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        handle = patch(pipe, experts, start if start is not None else _GATES[asked.gate_kind])
    with handle:
        result = train_gates(handle, batches, config, null=batches.null, **run_options(asked))
        if is_main():
            handle.save_gates(asked.out, dialect=asked.to)
    if is_main():
        late = late_loss(result.losses)
        done(str(asked.out), f"gates of {', '.join(files)}: {result.steps} steps, late loss {late:.6g}")


def _preset(asked: MoleUnetArgs) -> Any:
    if asked.preset not in PRESETS:
        raise MoleValueError("--preset", expected=f"one of {', '.join(PRESETS)}", got=asked.preset)
    return PRESETS[asked.preset]


def _check_official(asked: MoleGatesArgs, names: list[str], start: GateFile | None) -> None:
    """Refuse what MoLE's gate file cannot hold."""
    if asked.to != "official":
        return
    if set(names) != set(OFFICIAL_NAMES) or asked.gate_kind != "both":
        raise MoleValueError(
            "train mole gates: --to official",
            expected=f"experts {' and '.join(OFFICIAL_NAMES)} with --gate-kind both",
            got=f"{', '.join(names)} with --gate-kind {asked.gate_kind}",
        )
    if start is not None and any(len(layer.present()) != 4 for layer in start.layers.values()):
        raise MoleValueError(
            "train mole gates: --to official",
            expected="token and sample gates in --initial-gates",
            got="one kind of them",
        )


def _batches(pipe: Any, folder: PictureFolder, asked: MoleUnetArgs, batch_size: int) -> PictureBatches | None:
    """The batches, their cache made; None where only its size was asked for."""
    cache = asked.cache or asked.out.parent / "cache"
    if asked.dry_run:
        encoder = Encoder(pipe)
        size = cache_size(folder, encoder, encoder.null(), encoder.dtype, None, None)
        parts = f"latents {size.latents:,}, text {size.texts:,}"
        tell(f"the cache would take {size.total:,} bytes in {cache}: {parts}; nothing trained")
        return None

    def on_size(size: CacheSize) -> None:
        tell(f"cache: {size.total:,} bytes in {cache}, of which {size.missing:,} are to be made")

    batches = picture_batches(pipe, folder, batch_size, cache=cache, seed=asked.seed, on_size=on_size)
    tell(f"{batches.per_epoch} batches an epoch")
    return batches


def _denoiser_alone(pipe: Any) -> Any:
    """A pipeline of the UNet and its scheduler alone: the VAE and the text encoders have done their work."""
    return SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, components={"unet": pipe.unet})


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
    with _naming(target):
        pipe.save_pretrained(draft)
        if target.exists():
            target.rename(old)
        draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _naming(target: Path):
    """An error of the system as one that names the target and what to do."""
    try:
        yield
    except OSError as error:
        hint = "the last checkpoint holds the weights; --resume writes them again"
        raise MoleFileError(
            printable(target, 300), f"could not be written ({error.strerror})", hint=hint
        ) from error
