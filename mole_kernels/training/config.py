"""What one training run is made of, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from mole_kernels.errors import MoleValueError
from mole_kernels.training.lion import Lion

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")

# what may change between a run and its resume without changing any step already taken
_FREE_ON_RESUME = {"steps", "checkpoint_every", "keep_last", "log_every", "gradient_checkpointing"}


@dataclass(frozen=True)
class TrainConfig:
    """One run: `steps` optimiser steps of `accumulation` batches on each process.

    Args:
        steps: Optimiser steps in all, those before a resume included.
        lr: Peak learning rate.
        warmup: Steps over which the rate rises linearly to its peak.
        schedule: "constant", "linear" or "cosine" (the last two fall to 0 at `steps`).
        weight_decay: Decoupled, as in AdamW.
        betas: Of the optimiser; Lion's own are (0.9, 0.99).
        optimiser: A name in `OPTIMISERS`: "adamw" or "lion".
        grad_clip: Largest gradient norm over all trained tensors, None for no limit.
        accumulation: Batches per optimiser step and process.
        mixed_precision: "no", "bf16", "fp16"; None takes what `accelerate launch` was told, else "no".
        seed: Decides noise, timesteps, dropped conditions and fresh weights.
        cond_dropout: Probability with which a sample's condition is replaced by the null one.
        snr_gamma: Min-SNR weighting of the loss, None for none.
        ema_decay: Decay of a running mean of the trained tensors, which then is the result; None for
            none.
        gradient_checkpointing: Keep only each block's input and compute the block again in the
            backward: less memory, the same gradients.
        checkpoint_every: Steps between checkpoints, None for one at the end only.
        keep_last: How many checkpoints stay.
        log_every: Steps between progress lines where there is no terminal; 0 for one line at the end alone.
    """

    steps: int
    lr: float = 1e-4
    warmup: int = 0
    schedule: str = "constant"
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    optimiser: str = "adamw"
    grad_clip: float | None = 1.0
    accumulation: int = 1
    mixed_precision: str | None = None
    seed: int = 0
    cond_dropout: float = 0.0
    snr_gamma: float | None = None
    ema_decay: float | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    keep_last: int = 2
    log_every: int = 0

    def __post_init__(self) -> None:
        # json gives lists back, and a resumed config has to compare equal
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (
            ("steps", 0),
            ("warmup", 0),
            ("accumulation", 1),
            ("keep_last", 1),
            ("log_every", 0),
        ):
            value = getattr(self, name)
            _check(_integer(value) and value >= least, name, f"an integer of at least {least}", value)
        _check(_integer(self.seed), "seed", "an integer", self.seed)
        _check(_number(self.lr) and self.lr > 0, "lr", "a finite number above 0", self.lr)
        _check(
            _number(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            "a finite number of at least 0",
            self.weight_decay,
        )
        betas_fit = len(self.betas) == 2 and all(_number(b) and 0 <= b < 1 for b in self.betas)
        _check(betas_fit, "betas", "two numbers in [0, 1)", self.betas)
        _check(
            _number(self.cond_dropout) and 0 <= self.cond_dropout <= 1,
            "cond_dropout",
            "a probability",
            self.cond_dropout,
        )
        for name in ("grad_clip", "snr_gamma"):
            value = getattr(self, name)
            _check(
                value is None or (_number(value) and value > 0),
                name,
                "None or a finite number above 0",
                value,
            )
        decay, every = self.ema_decay, self.checkpoint_every
        _check(
            decay is None or (_number(decay) and 0 <= decay < 1),
            "ema_decay",
            "None or a number in [0, 1)",
            decay,
        )
        _check(
            every is None or (_integer(every) and every >= 1),
            "checkpoint_every",
            "None or an integer of at least 1",
            every,
        )
        _check(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        _check(self.optimiser in OPTIMISERS, "optimiser", f"one of {', '.join(OPTIMISERS)}", self.optimiser)
        checkpointing = self.gradient_checkpointing
        _check(isinstance(checkpointing, bool), "gradient_checkpointing", "True or False", checkpointing)
        precision = self.mixed_precision
        _check(
            precision is None or precision in PRECISIONS,
            "mixed_precision",
            f"None or one of {', '.join(PRECISIONS)}",
            precision,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self) | {"betas": list(self.betas)}

    def differences(self, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """[(field, saved value, value here)] for fields that would change the steps of a run begun with
        `saved`.
        """
        free = _FREE_ON_RESUME if self.schedule == "constant" else _FREE_ON_RESUME - {"steps"}
        here = self.to_dict()
        return [
            (f.name, saved.get(f.name), here[f.name])
            for f in fields(self)
            if f.name not in free and saved.get(f.name) != here[f.name]
        ]


def learning_rate(config: TrainConfig, step: int) -> float:
    """lr of step 0, 1, …: rises linearly over `warmup` steps, then follows the schedule to 0 at `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * (1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def _adamw(parameters: Iterable[Any], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _lion(parameters: Iterable[Any], config: TrainConfig) -> torch.optim.Optimizer:
    return Lion(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


OPTIMISERS: dict[str, Callable[[Iterable[Any], TrainConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "lion": _lion,
}


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return (_integer(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


def _check(right: bool, name: str, expected: str, got: object) -> None:
    if not right:
        raise MoleValueError(f"TrainConfig: {name}", expected=expected, got=repr(got))
