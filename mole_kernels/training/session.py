"""What surrounds a run and is put back after it: accelerate's process state, the model's modes and flags, the
keyboard.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import GradientAccumulationPlugin, LoggerType
from torch import Tensor, nn
from torch.nn import Parameter

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.training.config import TrainConfig

Parameters = Mapping[str, Parameter] | Iterable[Parameter | tuple[str, Parameter]]


@contextmanager
def accelerated(
    config: TrainConfig, trackers: Sequence[str] = (), folder: Path | None = None
) -> Iterator[Accelerator]:
    """An Accelerator for one run. Its process-wide state goes with the last run of this process that uses it,
    if it was not there before the first.

    Args:
        trackers: Accelerate's names, such as "tensorboard", which writes below `folder`.
    """
    if trackers and folder is None:
        raise MoleValueError("fit: trackers", expected="a run_dir to write to", got="none")
    known = [str(kind) for kind in LoggerType.list() if kind != "all"]
    if unknown := [name for name in trackers if name not in known]:
        raise MoleValueError("fit: trackers", expected=f"among {', '.join(known)}", got=", ".join(unknown))
    # the plugin and not the number, which an environment variable of the launcher would override
    plugin = GradientAccumulationPlugin(
        num_steps=config.accumulation, adjust_scheduler=False, sync_with_dataloader=False
    )
    more: dict[str, Any] = {"log_with": list(trackers), "project_dir": str(folder)} if trackers else {}
    with _shared_state():
        try:
            accelerator = Accelerator(
                mixed_precision=config.mixed_precision, gradient_accumulation_plugin=plugin, **more
            )
        except ValueError as error:
            hint = "mixed_precision=None takes what this process already uses"
            problem = f"{config.mixed_precision!r} was refused by accelerate ({error})"
            raise MoleValueError("fit: mixed_precision", problem, hint=hint) from error
        with _tracked(accelerator, config, trackers):
            yield accelerator


@contextmanager
def _tracked(accelerator: Accelerator, config: TrainConfig, trackers: Sequence[str]) -> Iterator[None]:
    try:
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # accelerate would go on in float32 without a word
            raise MoleValueError("fit: mixed_precision", expected="'no' or 'bf16' on a CPU", got="'fp16'")
        if trackers:
            _begin_tracking(accelerator, config, trackers)
        yield
    finally:
        if trackers:
            accelerator.end_training()


class _Runs:
    """The runs of this process that are under way, in any thread, and whether they made accelerate's
    state.
    """

    lock = threading.Lock()
    count = 0
    made_state = False


@contextmanager
def _shared_state() -> Iterator[None]:
    """accelerate's process-wide state for one run among several.

    It is dropped with the last of them, if the first one made it: else the next run of this process could not
    choose another mixed precision.
    """
    with _Runs.lock:
        if _Runs.count == 0:
            _Runs.made_state = not is_initialized()
        _Runs.count += 1
    try:
        yield
    finally:
        with _Runs.lock:
            _Runs.count -= 1
            if _Runs.count == 0 and _Runs.made_state:
                AcceleratorState._reset_state()


def _begin_tracking(accelerator: Accelerator, config: TrainConfig, trackers: Sequence[str]) -> None:
    have = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if lacking := [name for name in trackers if name not in have]:
        # accelerate leaves out what is not installed without a word
        hint = 'pip install "mole-kernels[train]" brings tensorboard; the others have packages of their own'
        raise MoleStateError("fit: trackers", f"{', '.join(lacking)} cannot be used here", hint=hint)
    plain = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in config.to_dict().items()
    }
    accelerator.init_trackers("log", config=plain)


@contextmanager
def in_training(model: nn.Module, named: Mapping[str, Parameter], checkpointing: bool) -> Iterator[None]:
    """Only `named` asks for gradients, the model is in training mode; these, `forward` and torch's random
    state are put back.
    """
    rng = get_rng()
    asked = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    own: dict[str, Any] = {
        key: model.__dict__[key] for key in ("forward", "_original_forward") if key in model.__dict__
    }
    wanted = {id(p) for p in named.values()}
    already = bool(getattr(model, "is_gradient_checkpointing", False))
    if checkpointing and not callable(getattr(model, "enable_gradient_checkpointing", None)):
        expected = "a model with enable_gradient_checkpointing, as diffusers' have"
        raise MoleTypeError("fit: gradient_checkpointing", expected=expected, got=type(model).__name__)
    try:
        if checkpointing and not already:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        for p, _ in asked:
            p.requires_grad_(id(p) in wanted)
        model.train()
        yield
    finally:
        if checkpointing and not already:
            model.disable_gradient_checkpointing()  # type: ignore[operator]
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
        set_rng(rng)


def named_parameters(model: nn.Module, parameters: Parameters) -> dict[str, Parameter]:
    """{name: tensor} of what trains; tensors given without a name take the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    items = list(parameters.items()) if isinstance(parameters, Mapping) else list(parameters)
    named: dict[str, Parameter] = {}
    for item in items:
        own_name, p = item if isinstance(item, tuple) else (None, item)
        if not isinstance(p, Parameter) or id(p) not in names:
            raise MoleTypeError(
                "fit: parameters", expected="parameters of the model", got=own_name or type(p).__name__
            )
        if p.dtype not in (torch.float32, torch.float64):
            hint = (
                "steps of a usual size vanish in 16 bits: train float32 tensors, with "
                "mixed_precision for speed"
            )
            raise MoleTypeError(
                f"fit: {own_name or names[id(p)]}", expected="float32 or float64", got=p.dtype, hint=hint
            )
        named[own_name or names[id(p)]] = p
    if not named:
        raise MoleValueError("fit: parameters", expected="at least one tensor to train", got="none")
    return named


class CtrlC:
    """Turns the first Ctrl-C into a flag, so that no step is interrupted; the second one raises as usual."""

    def __init__(self, enabled: bool, say: bool) -> None:
        # only the main thread may set handlers
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.say, self.pressed = say, False

    def __enter__(self) -> CtrlC:
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


def get_rng() -> dict[str, Tensor]:
    """torch's random states of this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
