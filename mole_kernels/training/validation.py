"""The loss on held-out pictures at fixed noise: the same draws at every step, so that values compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.training.data import counted_generator
from mole_kernels.training.loop import LossFunction


@dataclass(frozen=True)
class Validation:
    """What is held out, and how often it is looked at.

    Args:
        model: The denoiser, as it trains.
        loss_fn: As `fit` takes it, without dropped conditions.
        batches: Held-out batches; the first `count` of them each time.
        count: Number of batches.
        every: Steps between two looks.
        draws: Noises and levels for each batch.
        seed: Of the draws.
        file: A line {"step", "loss"} for each look; None for none.

    Raises:
        MoleValueError: A count, every or draws below 1.
    """

    model: nn.Module
    loss_fn: LossFunction
    batches: Iterable[Mapping[str, Tensor]]
    count: int
    every: int
    draws: int = 4
    seed: int = 0
    file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("count", "every", "draws"):
            if getattr(self, name) < 1:
                raise MoleValueError(f"Validation: {name}", expected="at least 1", got=getattr(self, name))

    def __call__(self, step: int) -> float | None:
        """The loss, where this step is one to look at; written to the file.

        Raises:
            MoleFileError: The file cannot be written.
        """
        if step % self.every:
            return None
        loss = self.loss()
        if self.file is not None:
            try:
                with self.file.open("a") as file:
                    file.write(json.dumps({"step": step, "loss": loss}) + "\n")
            except OSError as error:
                where = printable(self.file, 300)
                raise MoleFileError(where, f"cannot be written ({error.strerror})") from error
        return loss

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over batches and draws."""
        modes = [(module, module.training) for module in self.model.modules()]
        device = next(self.model.parameters()).device
        total = 0.0
        try:
            self.model.eval()
            for number, batch in enumerate(islice(self.batches, self.count)):
                here: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
                for draw in range(self.draws):
                    generator = counted_generator(self.seed, "validation", number, draw)
                    total += float(self.loss_fn(self.model, here, generator))
        finally:
            for module, mode in modes:
                module.training = mode
        return total / (self.count * self.draws)
