"""What `mole-kernels train CONFIG` and `mole-kernels train-many CONFIG` do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.place import ready_folder
from mole_kernels.cli.screen import done, facts, out
from mole_kernels.cli.training import is_main, named_dtype, tell
from mole_kernels.errors import MoleStateError, MoleValueError, printable
from mole_kernels.io.save import save_expert
from mole_kernels.methods.lora import denoiser_and_loss, train_expert
from mole_kernels.modules.scan import scan
from mole_kernels.training.cached import PictureBatches, picture_batches
from mole_kernels.training.families.loss import FamilyLoss
from mole_kernels.training.many.job import TrainJob
from mole_kernels.training.many.run import TrainMany
from mole_kernels.training.objectives.objective import objective_of
from mole_kernels.training.pictures import PictureFolder
from mole_kernels.training.processes import processes
from mole_kernels.training.progress import ProgressLine
from mole_kernels.training.recipe import (
    JobSection,
    ObjectiveSection,
    Recipe,
    chosen,
    read_many,
    read_recipe,
)
from mole_kernels.training.validation import Validation


def run_config(path: Path, *, resume: bool, dry_run: bool) -> None:
    """Train the expert of a file.

    Raises:
        MoleFileError: The file has mistakes, before anything is loaded.
    """
    recipe = read_recipe(path)
    ready_folder(recipe.out.parent)
    folder = _folder(recipe)
    _echo(f"expert {recipe.expert.name}", {"base": recipe.base, "out": recipe.out}, recipe, folder)
    if dry_run:
        tell("the file and its pictures are right; nothing trained")
        return
    pipe = read_pipeline(
        recipe.base, named_dtype(recipe.dtype, recipe.train), processes().device, command="train"
    )
    job = _job(pipe, recipe, folder, resume=resume)
    run_dir = recipe.run_dir or recipe.out.with_name(recipe.out.name + ".run")
    validation = _validation(pipe, recipe, run_dir)
    expert = train_expert(
        pipe,
        job.batches,
        name=job.name,
        rank=job.rank,
        alpha=job.alpha,
        config=job.config,
        null=job.null,
        init=job.init,
        targets=job.targets,
        loss_fn=job.loss,
        run_dir=run_dir,
        resume=resume,
        trackers=recipe.trackers,
        on_step=None if validation is None else lambda step, _: _look(validation, step),
    )
    if is_main():
        save_expert(expert, recipe.out, recipe.expert.to)
        late = expert.metadata["loss"]
        done(str(recipe.out), f"expert {job.name}: {len(expert.layers)} layers, late loss {late}")


def run_many(path: Path, *, resume: bool, dry_run: bool) -> None:
    """Train all jobs of a file in mixed steps.

    Raises:
        MoleFileError: The file has mistakes, before anything is loaded.
        MoleStateError: A job failed; the others' files are written.
    """
    recipe = read_many(path)
    ready_folder(recipe.out)
    folders = [_folder(job) for job in recipe.jobs]
    for job, folder in zip(recipe.jobs, folders):
        _echo(f"job {job.expert.name}", {"base": recipe.base}, job, folder)
    if dry_run:
        tell("the file and its pictures are right; nothing trained")
        return
    dtype = named_dtype(recipe.dtype, recipe.jobs[0].train)
    pipe = read_pipeline(recipe.base, dtype, processes().device, command="train-many")
    many = TrainMany(pipe, run_dir=recipe.run_dir or recipe.out / "runs", most_samples=recipe.most_samples)
    for job, folder in zip(recipe.jobs, folders):
        running = many.add(_job(pipe, job, folder, resume=resume))
        tell(f"job {job.expert.name} adds {running.bytes:,} bytes beside its activations")
    written: set[str] = set()

    def write_those_done(many: TrainMany) -> None:
        line.update(sum(job.step for job in many.jobs.values()))
        for section in recipe.jobs:
            name = section.expert.name
            if many.jobs[name].status == "done" and name not in written:
                written.add(name)
                target = recipe.out / f"{name}.safetensors"
                save_expert(many.jobs[name].expert(), target, section.expert.to)
                line.say(f"{target}: {many.jobs[name].step} steps")

    total = sum(job.train.steps for job in recipe.jobs)
    start = sum(job.step for job in many.jobs.values())
    with ProgressLine("training", total, start, 0, is_main()) as line:
        many.run(on_step=write_those_done)
        write_those_done(many)
    failed = {name: job.error for name, job in many.jobs.items() if job.status == "failed"}
    done(str(recipe.out), f"{len(written)} of {len(recipe.jobs)} experts")
    if failed:
        text = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise MoleStateError(f"{len(failed)} of {len(recipe.jobs)} jobs failed", printable(text, 1000))


def _validation(pipe: Any, recipe: Recipe, run_dir: Path) -> Validation | None:
    if recipe.validation is None:
        return None
    held_out = replace(recipe.data, folder=recipe.validation.folder)
    section = replace(recipe, data=held_out, train=replace(recipe.train, cond_dropout=0.0))
    job = _job(pipe, section, _folder(section), resume=False)
    learner = denoiser_and_loss(pipe, None, None, section.train, "validation", job.loss)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Validation(
        learner.model,
        learner.loss,
        job.batches,
        job.batches.per_epoch,  # type: ignore[attr-defined]
        recipe.validation.every,
        recipe.validation.draws,
        recipe.train.seed,
        run_dir / "validation.jsonl" if is_main() else None,
    )


def _look(validation: Validation, step: int) -> None:
    loss = validation(step)
    if loss is not None:
        tell(f"step {step}: loss {loss:.5f} on what is held out")


def _folder(job: JobSection) -> PictureFolder:
    data = job.data
    return PictureFolder(
        data.folder,
        data.resolution,
        buckets=data.buckets,
        on_bad=data.on_bad,
        multiple=data.multiple,
        column=data.column,
    )


def _job(pipe: Any, job: JobSection, folder: PictureFolder, *, resume: bool) -> TrainJob:
    data, expert = job.data, job.expert
    batches = picture_batches(
        pipe, folder, data.batch_size, cache=data.cache, seed=job.train.seed, progress=False
    )
    model = denoiser_and_loss(pipe, None, batches.null, job.train, f"job {expert.name}").model
    return TrainJob(
        name=expert.name,
        batches=batches,
        config=job.train,
        rank=expert.rank,
        alpha=expert.alpha,
        init=expert.init,
        targets=chosen(scan(model).layers, expert.targets, f"job {expert.name}"),
        null=batches.null,
        loss=_loss(pipe, job, batches),
        resume=resume,
    )


def _loss(pipe: Any, job: JobSection, batches: PictureBatches) -> FamilyLoss | None:
    """None for a UNet of the usual loss."""
    asked, config = job.objective, job.train
    if isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        if asked != ObjectiveSection():
            expected = "nothing for a UNet, whose weights are train: snr_gamma"
            raise MoleValueError(f"job {job.expert.name}: objective", expected=expected, got=str(asked))
        return None
    objective = objective_of(
        pipe.scheduler,
        density=asked.density,
        weights=asked.weights,
        snr_gamma=config.snr_gamma,
        debiased=asked.debiased,
    )
    return FamilyLoss(
        pipe,
        objective=objective,
        null=batches.null,
        cond_dropout=config.cond_dropout,
        noise_offset=asked.noise_offset,
        guidance=asked.guidance,
    )


def _echo(title: str, before: Mapping[str, object], job: JobSection, folder: PictureFolder) -> None:
    if not is_main():
        return
    sizes = ", ".join(f"{n} of {h}x{w}" for (h, w), n in folder.counts().items())
    shown: dict[str, object] = {**before, "pictures": f"{len(folder)}: {sizes}"}
    for section in (job.expert, job.objective, job.train):
        shown |= {f.name: getattr(section, f.name) for f in fields(section)}
    out().print(title, style="bold")
    out().print(facts(shown.items()))
