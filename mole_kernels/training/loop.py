"""One training loop on accelerate: some tensors of a model train, all others stay as they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn import Parameter

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.training.checkpoint import (
    Checkpoint,
    clear_unfinished,
    list_checkpoints,
    load_latest,
    save_checkpoint,
)
from mole_kernels.training.config import OPTIMISERS, TrainConfig, learning_rate
from mole_kernels.training.data import BatchStream, counted_generator
from mole_kernels.training.progress import ProgressLine
from mole_kernels.training.session import (
    CtrlC,
    Parameters,
    accelerated,
    get_rng,
    in_training,
    named_parameters,
    set_rng,
)

LossFunction = Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], Tensor]


class RunOptions(TypedDict, total=False):
    """The arguments of `fit` that a method hands on unread."""

    run_dir: str | Path | None
    resume: bool
    progress: bool
    on_step: Callable[[int, float], None] | None
    trackers: Sequence[str]


@dataclass(frozen=True)
class TrainResult:
    """What `fit` returns.

    Args:
        losses: Of every step, those before a resume included.
        steps: Steps taken in all.
        seconds: Of this call.
        throughput: Samples a second in this call.
    """

    losses: list[float]
    steps: int
    seconds: float
    throughput: float

    def late_loss(self, steps: int = 50) -> float:
        """The mean loss of the last steps; NaN for a run without any."""
        late = self.losses[-steps:]
        return sum(late) / len(late) if late else math.nan


def fit(
    model: nn.Module,
    parameters: Parameters,
    batches: Iterable[Mapping[str, Tensor]],
    config: TrainConfig,
    *,
    loss_fn: LossFunction,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    trackers: Sequence[str] = (),
    identity: Mapping[str, str] | None = None,
    rates: Mapping[str, float] | None = None,
) -> TrainResult:
    """Train `parameters` of `model` in place for `config.steps` steps; all else in the model stays bit for
    bit.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; a second one stops at once. The
    model is left on accelerate's device; `requires_grad` and train/eval modes are put back.

    Args:
        model: The model that the loss calls.
        parameters: Tensors of the model that train: a dict by name, (name, tensor) pairs, or tensors alone.
        batches: An iterable of dicts of tensors, see `BatchStream`; batch n is drawn by process n mod P.
        config: Steps, optimiser, schedule, precision.
        loss_fn: (model, batch, generator) -> scalar; whatever it draws from `generator` depends on (seed, n)
            alone.
        run_dir: Where checkpoints go; with `resume` the run goes on from the newest, or begins if there is
            none.
            A resumed run equals one that was never interrupted, bit for bit on a CPU.
        resume: Go on from the newest checkpoint of `run_dir`.
        progress: A bar on a terminal, else a line at the end (and every `config.log_every` steps), on stderr.
        on_step: Called as (steps done, loss) after each step.
        trackers: Accelerate's, such as ("tensorboard",): loss, learning rate and samples/s of each step,
            below
            run_dir.
        identity: What else must be the same on resume, by name.
        rates: Parameter name -> its learning rate as a multiple of the config's; 1 where not given.

    Returns:
        The losses, steps, seconds and throughput.

    Raises:
        MoleStateError: A loss that is not finite (the newest checkpoint stays good), or a resume that does
            not
            fit.
    """
    named = named_parameters(model, parameters)
    folder = None if run_dir is None else Path(run_dir)
    if resume and folder is None:
        raise MoleValueError("fit: resume", expected="a run_dir to resume from", got="none")
    with (
        accelerated(config, trackers, folder) as accelerator,
        in_training(model, named, config.gradient_checkpointing),
    ):
        stream = BatchStream(batches, accelerator.process_index, accelerator.num_processes)
        run = _Run(
            accelerator, model, named, stream, config, loss_fn, folder, dict(identity or {}), rates or {}
        )
        if folder is not None:
            run.open(folder, resume)
        began, first = time.perf_counter(), run.step
        run.train(progress and accelerator.is_main_process, on_step, bool(trackers))
        run.finish()
        seconds = time.perf_counter() - began
        return TrainResult(run.losses, run.step, seconds, run.samples / seconds if run.step > first else 0.0)


class _Run:
    """The state of a run and the one way it changes: `advance`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        named: dict[str, Parameter],
        stream: BatchStream,
        config: TrainConfig,
        loss_fn: LossFunction,
        folder: Path | None,
        identity: dict[str, str],
        rates: Mapping[str, float],
    ) -> None:
        self.accelerator, self.named, self.stream = accelerator, named, stream
        # the precision in use, not None, is what a resume has to match
        self.config = replace(config, mixed_precision=accelerator.mixed_precision)
        self.loss_fn, self.folder, self.identity = loss_fn, folder, identity
        self.model = accelerator.prepare_model(model)
        self.optimiser = accelerator.prepare_optimizer(
            OPTIMISERS[config.optimiser](_groups(named, rates), config)
        )
        self.ema = (
            None if config.ema_decay is None else {name: p.detach().clone() for name, p in named.items()}
        )
        self.step, self.samples, self.losses = 0, 0, []  # type: tuple[int, int, list[float]]
        self._saved = -1
        self._dtypes = {name: p.dtype for name, p in named.items()}
        torch.manual_seed(config.seed + accelerator.process_index)

    def train(self, show: bool, on_step: Callable[[int, float], None] | None, tracked: bool) -> None:
        """All steps that are left, with their checkpoints; KeyboardInterrupt after a Ctrl-C."""
        began, config = time.perf_counter(), self.config
        line = ProgressLine("training", config.steps, self.step, config.log_every, show)
        with line, CtrlC(self.folder is not None, show) as ctrl_c:
            while self.step < config.steps:
                loss = self.advance()
                line.update(self.step, loss, self.samples)
                if tracked:
                    self._track(loss, time.perf_counter() - began)
                if on_step is not None:
                    on_step(self.step, loss)
                stopped = self.anywhere(ctrl_c.pressed)
                due = self.step % (config.checkpoint_every or math.inf) == 0
                if stopped or due or self.step == config.steps:
                    self.save()
                if stopped:
                    line.say(
                        f"stopped after step {self.step}; resume=True (--resume) goes on from {self.folder}"
                    )
                    raise KeyboardInterrupt

    def _track(self, loss: float, seconds: float) -> None:
        figures = {
            "loss": loss,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "samples_per_second": self.samples / seconds,
        }
        self.accelerator.log(figures, step=self.step)

    def advance(self) -> float:
        """One optimiser step; returns its loss, the mean over batches and processes."""
        self._check_dtypes()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step) * group.get("rate", 1.0)
        total = 0.0
        for _ in range(self.config.accumulation):
            number, batch = self.stream.draw()
            batch = send_to_device(batch, self.accelerator.device)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.loss_fn(
                        self.model, batch, counted_generator(self.config.seed, "batch", number)
                    )
                total += self._checked(loss, number) / self.config.accumulation
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip()
                self.optimiser.step()
                self.optimiser.zero_grad()
            self.samples += _samples(batch) * self.accelerator.num_processes
        self._check_dtypes()
        if self.ema is not None:
            for name, p in self.named.items():
                self.ema[name].lerp_(p.detach(), 1.0 - float(self.config.ema_decay or 0.0))
        self.step += 1
        self.losses.append(total)
        return total

    def _checked(self, loss: Tensor, number: int) -> float:
        """The loss over all processes; every process stops if one of them has no finite one."""
        if loss.dim() != 0 or not loss.requires_grad:
            got = f"shape {list(loss.shape)}, requires_grad {loss.requires_grad}"
            raise MoleTypeError("fit: loss_fn", expected="a scalar that depends on what trains", got=got)
        value = float(self.accelerator.reduce(loss.detach().clone().float(), "mean"))
        if not math.isfinite(value):
            names = self.stream.describe(number)
            self._stop(f"the loss is {value} (batch {number}{': ' + names if names else ''})")
        return value

    def _clip(self) -> None:
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        norm = self.accelerator.clip_grad_norm_(self.named.values(), limit)
        # fp16's scaler skips such a step by itself
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            self._stop(f"the gradient's norm is {float(norm)}")

    def _check_dtypes(self) -> None:
        """MoleStateError where `model.to(dtype)` has rounded what trains."""
        for name, dtype in self._dtypes.items():
            if self.named[name].dtype != dtype:
                self._stop(
                    f"{name} was cast to {self.named[name].dtype} in the middle of training, which "
                    "rounds it; "
                    f"it began as {dtype}",
                    "train first and cast a copy afterwards; for speed, mixed_precision keeps float32 "
                    "tensors",
                )

    def _stop(self, problem: str, advice: str = "try a lower lr, more warmup, or look at that batch") -> None:
        checkpoints = list_checkpoints(self.folder)[-1:] if self.folder is not None else []
        where = (
            f"the last good checkpoint is {checkpoints[0][1]}" if checkpoints else "there is no checkpoint"
        )
        raise MoleStateError(
            f"fit: step {self.step + 1}",
            problem,
            hint=f"{where}; {advice}",
        )

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0
        )

    def open(self, folder: Path, resume: bool) -> None:
        """Begins in an empty `folder`, or goes on from its newest checkpoint."""
        checkpoint = load_latest(folder) if resume else None
        if not resume and list_checkpoints(folder):
            hint = "resume=True (--resume) goes on from them; another run_dir begins anew"
            raise MoleStateError(f"fit: run_dir {folder}", "already holds checkpoints", hint=hint)
        if self.accelerator.is_main_process:
            clear_unfinished(folder)
        if checkpoint is not None:
            self.restore(checkpoint)
        self.accelerator.wait_for_everyone()

    def restore(self, c: Checkpoint) -> None:
        """Takes over a checkpoint, after all of it has been found to fit."""
        c.check_kinds()
        for name, before, here in self.config.differences(c.config):
            raise MoleStateError(
                f"resume: config.{name}", expected=f"{before!r} as when the run began", got=repr(here)
            )
        c.check_identity(self.identity)
        c.check_weights(self.named)
        # the model comes last: nothing that a broken checkpoint raises finds it changed
        with c.understood():
            self.stream.restore(c.data)
            self.optimiser.load_state_dict(c.optimiser)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(c.scaler)
            set_rng(c.rng[self.accelerator.process_index])
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(c.weights[name])
        if self.ema is not None and c.ema is not None:
            self.ema = {name: c.ema[name].to(p) for name, p in self.named.items()}
        self.step = self._saved = c.step
        self.losses = list(c.losses)

    def save(self) -> None:
        """A checkpoint of this step, unless it has one."""
        self._check_dtypes()
        if self.folder is None or self._saved == self.step:
            return
        rng = gather_object([get_rng()])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint = Checkpoint(
                step=self.step,
                weights={name: p.detach() for name, p in self.named.items()},
                ema=self.ema,
                optimiser=self.optimiser.state_dict(),
                losses=self.losses,
                rng=rng,
                data=self.stream.state(),
                scaler={} if scaler is None else scaler.state_dict(),
                config=self.config.to_dict(),
                identity=self.identity,
            )
            save_checkpoint(self.folder, checkpoint, self.config.keep_last)
        self._saved = self.step
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """The running mean, where there is one, becomes the result."""
        self._check_dtypes()
        if self.ema is not None:
            with torch.no_grad():
                for name, p in self.named.items():
                    p.copy_(self.ema[name])


def _groups(named: Mapping[str, Parameter], rates: Mapping[str, float]) -> Iterable[Any]:
    """The optimiser's groups: the parameters as they are where all have one rate, else one group for each
    rate.
    """
    if unknown := sorted(set(rates) - set(named)):
        raise MoleValueError("fit: rates", expected="names of what trains", got=", ".join(unknown[:3]))
    by_rate: dict[float, list[Parameter]] = {}
    for name, p in named.items():
        by_rate.setdefault(float(rates.get(name, 1.0)), []).append(p)
    if list(by_rate) == [1.0]:
        return named.values()
    return [{"params": own, "rate": rate} for rate, own in by_rate.items()]


def _samples(batch: Mapping[str, Any]) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
