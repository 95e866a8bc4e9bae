"""One training loop on accelerate: some tensors of a model train, all others stay as they are."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import GradientAccumulationPlugin, gather_object, send_to_device
from torch import Tensor, nn
from torch.nn import Parameter

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.training.checkpoint import Checkpoint, clear_unfinished, list_checkpoints, load_latest, save_checkpoint
from mole_kernels.training.config import OPTIMISERS, TrainConfig, learning_rate
from mole_kernels.training.data import BatchStream, counted_generator
from mole_kernels.training.progress import ProgressLine

LossFunction = Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], Tensor]
Parameters = Mapping[str, Parameter] | Iterable[Parameter | tuple[str, Parameter]]


class RunOptions(TypedDict, total=False):
    """The arguments of `fit` that a method hands on unread."""

    run_dir: str | Path | None
    resume: bool
    progress: bool
    on_step: Callable[[int, float], None] | None


@dataclass(frozen=True)
class TrainResult:
    """losses: of every step, those before a resume included; steps taken in all; seconds and samples/s of this call."""

    losses: list[float]
    steps: int
    seconds: float
    throughput: float


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
    identity: Mapping[str, str] | None = None,
) -> TrainResult:
    """Trains `parameters` of `model` in place for `config.steps` steps; everything else in the model stays bit for bit.

    parameters  tensors of the model that train: a dict by name, (name, tensor) pairs, or tensors alone
    batches     an iterable of dicts of tensors, see `BatchStream`; batch n is drawn by process n mod P
    loss_fn     (model, batch, generator) -> scalar; whatever it draws from `generator` depends on (seed, n) alone
    run_dir     where checkpoints go; with `resume` the run goes on from the newest, or begins if there is none.
                A resumed run equals one that was never interrupted, bit for bit on a CPU
    progress    a bar on a terminal, else a line every `config.log_every` steps, on stderr
    on_step     called as (steps done, loss) after each step
    identity    what else must be the same on resume, by name

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; a second one stops at once.
    Raises MoleStateError for a loss that is not finite (the newest checkpoint stays good) and for a resume that does not fit.
    The model is left on accelerate's device; `requires_grad` and train/eval modes are put back.
    """
    named = _named(model, parameters)
    folder = None if run_dir is None else Path(run_dir)
    if resume and folder is None:
        raise MoleValueError("fit: resume", expected="a run_dir to resume from", got="none")
    with _accelerator(config) as accelerator, _training(model, named):
        stream = BatchStream(batches, accelerator.process_index, accelerator.num_processes)
        run = _Run(accelerator, model, named, stream, config, loss_fn, folder, dict(identity or {}))
        if folder is not None:
            run.open(folder, resume)
        began, first = time.perf_counter(), run.step
        enabled = progress and accelerator.is_main_process
        line = ProgressLine("training", config.steps, run.step, config.log_every, enabled)
        with line, _CtrlC(folder is not None, enabled) as ctrl_c:
            while run.step < config.steps:
                loss = run.advance()
                line.update(run.step, loss, run.samples)
                if on_step is not None:
                    on_step(run.step, loss)
                stopped = run.anywhere(ctrl_c.pressed)
                if stopped or run.step == config.steps or run.step % (config.checkpoint_every or math.inf) == 0:
                    run.save()
                if stopped:
                    line.say(f"stopped after step {run.step}; resume=True goes on from {folder}")
                    raise KeyboardInterrupt
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
    ) -> None:
        self.accelerator, self.named, self.stream = accelerator, named, stream
        # the precision in use, not None, is what a resume has to match
        self.config = replace(config, mixed_precision=accelerator.mixed_precision)
        self.loss_fn, self.folder, self.identity = loss_fn, folder, identity
        self.model = accelerator.prepare_model(model)
        self.optimiser = accelerator.prepare_optimizer(OPTIMISERS[config.optimiser](named.values(), config))
        self.ema = None if config.ema_decay is None else {name: p.detach().clone() for name, p in named.items()}
        self.step, self.samples, self.losses = 0, 0, []  # type: tuple[int, int, list[float]]
        self._saved = -1
        torch.manual_seed(config.seed + accelerator.process_index)

    def advance(self) -> float:
        """One optimiser step; returns its loss, the mean over batches and processes."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        total = 0.0
        for _ in range(self.config.accumulation):
            number, batch = self.stream.draw()
            batch = send_to_device(batch, self.accelerator.device)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.loss_fn(self.model, batch, counted_generator(self.config.seed, "batch", number))
                total += self._checked(loss, number) / self.config.accumulation
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip()
                self.optimiser.step()
                self.optimiser.zero_grad()
            self.samples += _samples(batch) * self.accelerator.num_processes
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

    def _stop(self, what: str) -> None:
        kept = list_checkpoints(self.folder)[-1:] if self.folder is not None else []
        where = f"the last good checkpoint is {kept[0][1]}" if kept else "there is no checkpoint"
        raise MoleStateError(f"fit: step {self.step + 1}", what, hint=f"{where}; try a lower lr, more warmup, or look at that batch")

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def open(self, folder: Path, resume: bool) -> None:
        """Begins in an empty `folder`, or goes on from its newest checkpoint."""
        found = load_latest(folder) if resume else None
        if not resume and list_checkpoints(folder):
            hint = "resume=True goes on from them; another run_dir begins anew"
            raise MoleStateError(f"fit: run_dir {folder}", "already holds checkpoints", hint=hint)
        if self.accelerator.is_main_process:
            clear_unfinished(folder)
        if found is not None:
            self.restore(found)
        self.accelerator.wait_for_everyone()

    def restore(self, c: Checkpoint) -> None:
        """Takes over a checkpoint, after all of it has been found to fit."""
        for name, before, here in self.config.differences(c.config):
            raise MoleStateError(f"resume: config.{name}", expected=f"{before!r} as when the run began", got=repr(here))
        c.check_identity(self.identity)
        c.check_weights(self.named)
        self.stream.restore(c.data)
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(c.weights[name])
        if self.ema is not None and c.ema is not None:
            self.ema = {name: c.ema[name].to(p) for name, p in self.named.items()}
        self.optimiser.load_state_dict(c.optimiser)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(c.scaler)
        _set_rng(c.rng[self.accelerator.process_index])
        self.step = self._saved = c.step
        self.losses = list(c.losses)

    def save(self) -> None:
        """A checkpoint of this step, unless it has one."""
        if self.folder is None or self._saved == self.step:
            return
        rng = gather_object([_get_rng()])
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
        if self.ema is not None:
            with torch.no_grad():
                for name, p in self.named.items():
                    p.copy_(self.ema[name])


class _CtrlC:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in two; the second raises as ever."""

    def __init__(self, enabled: bool, say: bool) -> None:
        # only the main thread may set handlers
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.say, self.pressed = say, False

    def __enter__(self) -> _CtrlC:
        if self.enabled:
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        if self.say:
            # not through print: the signal may have come in the middle of one
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextmanager
def _accelerator(config: TrainConfig) -> Iterator[Accelerator]:
    """An Accelerator for one run. Its process-wide state goes with it, if it was not there before."""
    owned = not is_initialized()
    # the plugin and not the number, which an environment variable of the launcher would override
    plugin = GradientAccumulationPlugin(num_steps=config.accumulation, adjust_scheduler=False, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_plugin=plugin)
    except ValueError as error:
        hint = "mixed_precision=None takes what this process already uses"
        problem = f"{config.mixed_precision!r} was refused by accelerate ({error})"
        raise MoleValueError("fit: mixed_precision", problem, hint=hint) from error
    try:
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # accelerate would go on in float32 without a word
            raise MoleValueError("fit: mixed_precision", expected="'no' or 'bf16' on a CPU", got="'fp16'")
        yield accelerator
    finally:
        if owned:
            # else the next run of this process could not choose another mixed precision
            AcceleratorState._reset_state()


@contextmanager
def _training(model: nn.Module, named: dict[str, Parameter]) -> Iterator[None]:
    """Only `named` asks for gradients, the model is in training mode; these, `forward` and torch's random state are put back."""
    rng = _get_rng()
    asked = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    own: dict[str, Any] = {key: model.__dict__[key] for key in ("forward", "_original_forward") if key in model.__dict__}
    wanted = {id(p) for p in named.values()}
    try:
        for p, _ in asked:
            p.requires_grad_(id(p) in wanted)
        model.train()
        yield
    finally:
        for p in named.values():
            p.grad = None
        for p, before in asked:
            p.requires_grad_(before)
        for module, mode in modes:
            module.training = mode
        # accelerate wraps forward for mixed precision and leaves it so
        for key in ("forward", "_original_forward"):
            model.__dict__.pop(key, None)
        model.__dict__.update(own)
        _set_rng(rng)


def _named(model: nn.Module, parameters: Parameters) -> dict[str, Parameter]:
    """{name: tensor} of what trains; tensors given without a name take the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    items = list(parameters.items()) if isinstance(parameters, Mapping) else list(parameters)
    named: dict[str, Parameter] = {}
    for item in items:
        given, p = item if isinstance(item, tuple) else (None, item)
        if not isinstance(p, Parameter) or id(p) not in names:
            raise MoleTypeError("fit: parameters", expected="parameters of the model", got=given or type(p).__name__)
        if p.dtype not in (torch.float32, torch.float64):
            hint = "steps of a usual size vanish in 16 bits: train float32 tensors, with mixed_precision for speed"
            raise MoleTypeError(f"fit: {given or names[id(p)]}", expected="float32 or float64", got=p.dtype, hint=hint)
        named[given or names[id(p)]] = p
    if not named:
        raise MoleValueError("fit: parameters", expected="at least one tensor to train", got="none")
    return named


def _samples(batch: Mapping[str, Any]) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)


def _get_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
