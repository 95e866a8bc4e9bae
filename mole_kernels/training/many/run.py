"""`TrainMany`: one forward and backward a step over the batches of many jobs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import (
    MoleError,
    MoleKeyError,
    MoleStateError,
    MoleTypeError,
    MoleValueError,
    MoleWarning,
)
from mole_kernels.experts.lowrank import Expert
from mole_kernels.training.families.loss import FamilyLoss
from mole_kernels.training.loss import DenoisingLoss
from mole_kernels.training.many.job import RunningJob, TrainJob
from mole_kernels.training.many.layers import MixedLayers, Part
from mole_kernels.training.objectives.noised import Noised, merged
from mole_kernels.training.objectives.objective import objective_of
from mole_kernels.training.session import in_training

# what a job's own data, loss or optimiser may raise; it ends that job and no other
_OF_A_JOB = (MoleError, ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError, ArithmeticError)

# so many first steps of a mixture, and every so many-th one, are compared with the jobs alone
_COMPARED, _AGAIN = 2, 100


class TrainMany:
    """Experts trained side by side on one frozen base; each is bit for bit what it is alone.

    In one step every job draws a batch from its own random streams; batches of one shape go through the base
    in one forward and backward, and each job's own optimiser steps on its own gradients. Jobs join and leave
    between steps. A job that fails (a loss that is not finite, data that cannot be read) ends alone.

    Exactness is looked after, not assumed: a layer computes several jobs' rows in one call only for shapes
    where that gives each job's bits, and steps of each mixture are compared with the jobs alone; a
    job that came out differently has a forward of its own from then on, with a MoleWarning.

    Args:
        pipe: A diffusers pipeline with a UNet or a transformer, frozen.
        run_dir: Folder of the jobs' checkpoints, one below it for each.
        most_samples: Samples of one step over all jobs; jobs with fewer steps done come first. None for no
            limit.

    Raises:
        MoleTypeError: No such pipeline.
        MoleValueError: The base has dropout, whose draws depend on the batch.
    """

    def __init__(
        self, pipe: Any, *, run_dir: str | Path | None = None, most_samples: int | None = None
    ) -> None:
        self.component = "unet" if isinstance(getattr(pipe, "unet", None), nn.Module) else "transformer"
        model = getattr(pipe, self.component, None)
        if not isinstance(model, nn.Module) or getattr(pipe, "scheduler", None) is None:
            expected = "a pipeline with a UNet or a transformer, and a scheduler"
            raise MoleTypeError("train many", expected=expected, got=type(pipe).__name__)
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            raise MoleValueError("train many: base", expected="a base without dropout", got="dropout above 0")
        if most_samples is not None and most_samples < 1:
            raise MoleValueError("train many: most_samples", expected="at least 1, or None", got=most_samples)
        self.pipe, self.model, self.most_samples = pipe, model, most_samples
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.jobs: dict[str, RunningJob] = {}
        self._layers: MixedLayers | None = None
        # steps of each mixture so far
        self._exact: dict[tuple[object, ...], int] = {}
        self.separate: set[str] = set()
        self._ended: list[str] = []
        # samples of a job's last batch, for the limit
        self._samples: dict[str, int] = {}

    # -- jobs

    def add(self, job: TrainJob) -> RunningJob:
        """A job joins at the next step.

        Raises:
            MoleValueError: Its name is taken, or it has no layer to adapt.
            MoleStateError: A resume that does not fit.
        """
        if job.name in self.jobs or not job.name or "/" in job.name:
            raise MoleValueError(
                "train many: job", expected="a name of its own, without /", got=repr(job.name)
            )
        folder = None if self.run_dir is None else self.run_dir / job.name
        running = RunningJob(job, self.model, self.component, self._loss(job), folder)
        if self._layers is not None and running.status == "running":
            self._layers.add(job.name, running.experts)
        self.jobs[job.name] = running
        return running

    def cancel(self, name: str) -> None:
        """A job leaves; its last checkpoint stays.

        Raises:
            MoleKeyError: No such job.
        """
        if name not in self.jobs:
            raise MoleKeyError("train many", expected=f"one of {', '.join(self.jobs) or 'no job'}", got=name)
        if self.jobs[name].status == "running":
            self._end(self.jobs[name], "cancelled")
            self._drop_ended()

    @property
    def running(self) -> list[RunningJob]:
        """The jobs under way, in the order they joined."""
        return [job for job in self.jobs.values() if job.status == "running"]

    def experts(self) -> dict[str, Expert]:
        """The experts of the jobs that are done."""
        return {name: job.expert() for name, job in self.jobs.items() if job.status == "done"}

    # -- steps

    def run(
        self, jobs: Iterable[TrainJob] = (), on_step: Callable[[TrainMany], None] | None = None
    ) -> dict[str, Expert]:
        """Train until no job is left.

        Args:
            jobs: Jobs to add first.
            on_step: Called after each step; it may add and cancel jobs.

        Returns:
            The experts of the jobs that are done; `jobs` tells why another failed.
        """
        for job in jobs:
            self.add(job)
        while self.running:
            with self.mixing():
                while self.running:
                    self.step()
                    if on_step is not None:
                        on_step(self)
        return self.experts()

    def mixing(self) -> _Mixing:
        """Inside, the base's layers can mix jobs; afterwards the base is as before, bit for bit."""
        return _Mixing(self)

    def step(self) -> None:
        """One batch of every job whose turn it is.

        Raises:
            MoleStateError: Called outside of `mixing`.
        """
        if self._layers is None:
            raise MoleStateError("train many", "step() outside of mixing()", hint="with many.mixing(): …")
        drawn: list[tuple[RunningJob, Noised]] = []
        for job in self._turn():
            if (noised := self._try(job, lambda job=job: job.draw(self._dtype, self._device))) is not None:  # type: ignore[misc]
                self._samples[job.job.name] = len(noised.noisy)
                drawn.append((job, noised))
        for group in self._groups(drawn):
            self._train(group)
        self._drop_ended()

    def _train(self, group: Sequence[tuple[RunningJob, Noised]]) -> None:
        key = tuple((job.job.name, noised.signature(), len(noised.noisy)) for job, noised in group)
        seen = self._exact[key] = self._exact.get(key, 0) + 1
        if len(group) > 1 and (seen <= _COMPARED or seen % _AGAIN == 0):
            group = self._compared(group)
        else:
            group = self._backward(group)
        assert self._layers is not None
        for job, _ in group:
            name = job.job.name
            changed = self._try(job, job.advance)
            if changed and job.status == "running":
                self._layers.written(name)
            elif job.status == "done":
                self._end(job, "done")

    def _backward(self, group: Sequence[tuple[RunningJob, Noised]]) -> list[tuple[RunningJob, Noised]]:
        """Each job's gradients, by one forward and backward; the jobs that have not failed."""
        assert self._layers is not None
        parts = [Part(job.job.name, len(noised.noisy)) for job, noised in group]
        try:
            with self._layers.running(parts):
                prediction = group[0][0].loss.predict(merged([noised for _, noised in group]), self.model)
        except _OF_A_JOB as error:
            if len(group) == 1:
                self._fail(group[0][0], error)
                return []
            # whose it is shows when each has a forward of its own
            return [pair for drawn in group for pair in self._backward([drawn])]
        total: Tensor | None = None
        good = []
        for (job, noised), rows in zip(group, prediction.split([part.rows for part in parts])):
            loss = self._try(job, lambda job=job, noised=noised, rows=rows: _loss(job, rows, noised))  # type: ignore[misc]
            if loss is not None:
                total = loss if total is None else total + loss
                good.append((job, noised))
        if total is not None:
            with self._layers.running(parts):
                total.backward()
        self._layers.collect({part.job for part in parts})
        return good

    def _compared(self, group: Sequence[tuple[RunningJob, Noised]]) -> list[tuple[RunningJob, Noised]]:
        """`_backward`, and each job's gradients compared with those it has alone, which are the ones kept."""
        before = {job.job.name: _grads(job) for job, _ in group}
        totals = {job.job.name: job.total for job, _ in group}
        good = self._backward(group)
        for job, noised in list(good):
            mixed = _grads(job)
            _restore(job, before[job.job.name])
            job.total = totals[job.job.name]
            if not self._backward([(job, noised)]):
                good = [pair for pair in good if pair[0] is not job]
                continue
            if not all(_same(a, b) for a, b in zip(mixed, _grads(job))):
                self.separate.add(job.job.name)
                text = f"job {job.job.name} is not the same in a mixed step here, and takes steps of its own"
                warnings.warn(text, MoleWarning, stacklevel=2)
        return good

    def _groups(self, drawn: Sequence[tuple[RunningJob, Noised]]) -> list[list[tuple[RunningJob, Noised]]]:
        """Jobs that one forward can take together: one loss's way to call the base, one shape."""
        groups: dict[tuple[object, ...], list[tuple[RunningJob, Noised]]] = {}
        for job, noised in drawn:
            guidance = getattr(job.loss, "guidance", None)
            own = job.job.name if job.job.name in self.separate else None
            key = (type(job.loss), guidance, noised.signature(), own)
            groups.setdefault(key, []).append((job, noised))
        return list(groups.values())

    def _turn(self) -> list[RunningJob]:
        """All jobs, or those with the fewest steps done as far as the limit of samples goes."""
        jobs = self.running
        if self.most_samples is None:
            return jobs
        turn: list[RunningJob] = []
        total = 0
        for job in sorted(jobs, key=lambda job: job.step):
            total += self._samples.get(job.job.name, 1)
            if turn and total > self.most_samples:
                break
            turn.append(job)
        return turn

    def _try(self, job: RunningJob, act: Callable[[], Any]) -> Any:
        """What `act` returns; None where it fails, which ends this job alone."""
        try:
            return act()
        except _OF_A_JOB as error:
            self._fail(job, error)
            return None

    def _fail(self, job: RunningJob, error: Exception) -> None:
        job.error = error
        self._end(job, "failed")

    def _end(self, job: RunningJob, status: Any) -> None:
        job.status = status
        for p in job.named.values():
            p.grad = None
        self._ended.append(job.job.name)

    def _drop_ended(self) -> None:
        """Between steps: a pool that loses a job in the middle of one would lose the others' gradients."""
        for name in self._ended:
            if self._layers is not None:
                self._layers.drop(name)
        self._ended.clear()

    def _loss(self, job: TrainJob) -> Any:
        if job.loss is not None:
            return job.loss
        config = job.config
        if self.component == "unet":
            return DenoisingLoss(self.pipe.scheduler, job.null, config.cond_dropout, config.snr_gamma)
        if isinstance(job.null, Tensor):
            expected = "a dict of the pipeline's arguments"
            raise MoleValueError(f"job {job.name}: null", expected=expected, got="one tensor")
        objective = objective_of(self.pipe.scheduler, snr_gamma=config.snr_gamma)
        return FamilyLoss(self.pipe, objective=objective, null=job.null, cond_dropout=config.cond_dropout)

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class _Mixing:
    """The base with layers that mix, and as it was."""

    def __init__(self, many: TrainMany) -> None:
        self._many = many

    def __enter__(self) -> TrainMany:
        many = self._many
        if many._layers is not None:
            raise MoleStateError("train many", "is mixing already")
        self._session = in_training(many.model, {}, False)
        self._session.__enter__()
        many._layers = MixedLayers(many.model)
        for job in many.running:
            many._layers.add(job.job.name, job.experts)
        return many

    def __exit__(self, *error: Any) -> None:
        assert self._many._layers is not None
        self._many._layers.remove()
        self._many._layers = None
        self._session.__exit__(*error)


def _loss(job: RunningJob, prediction: Tensor, noised: Noised) -> Tensor:
    loss: Tensor = job.loss.compare(prediction, noised)
    job.check(loss)
    return loss if job.config.accumulation == 1 else loss / job.config.accumulation


def _grads(job: RunningJob) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in job.named.values()]


def _restore(job: RunningJob, grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(job.named.values(), grads):
        p.grad = grad


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
