"""The training loss of any pipeline: noise latents by its objective, predict by its own step, compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.training.families.family import Family
from mole_kernels.training.objectives.noised import Noised
from mole_kernels.training.objectives.objective import Objective, noisy, objective_of
from mole_kernels.training.objectives.reduce import offset_noise, reduced


class FamilyLoss:
    """loss(model, batch, generator) for `fit`: w·(prediction − target)², reduced.

    A batch is what `Family` takes, and may hold mask [B,1|C,h,w] (video: [B,1|C,f,h,w]) and prior [B] bool.
    Draws are made on the CPU in this order: noise, levels, dropped texts, offset noise.

    Args:
        pipe: A diffusers pipeline, or its `Family`.
        objective: None takes that of the pipeline's scheduler.
        null: {argument: one sample's value for an empty text}, for `cond_dropout`.
        cond_dropout: Probability with which a sample's texts are replaced by `null`.
        noise_offset: σ of a constant added to the noise of each channel.
        prior_weight: λ of the samples with prior True.
        guidance: Told to a guidance-distilled denoiser (FLUX.1 [dev], HunyuanVideo); 1 leaves the guidance
            that users ask for at sampling to the distilled model.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        objective: Objective | None = None,
        null: Mapping[str, Tensor] | None = None,
        cond_dropout: float = 0.0,
        noise_offset: float = 0.0,
        prior_weight: float = 1.0,
        guidance: float = 1.0,
    ) -> None:
        self.family = pipe if isinstance(pipe, Family) else Family(pipe)
        self.objective = objective or objective_of(self.family.pipe.scheduler)
        self.null, self.cond_dropout = dict(null or {}), cond_dropout
        self.noise_offset, self.prior_weight, self.guidance = noise_offset, prior_weight, guidance
        if cond_dropout > 0 and not self.null:
            raise MoleValueError(
                "FamilyLoss: cond_dropout",
                f"texts are to be dropped with probability {cond_dropout}, but nothing takes their place",
                hint="pass null=, the text encoder's output for the empty caption, or cond_dropout=0",
            )

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        noised = self.noised(batch, generator)
        return self.compare(self.predict(noised, model), noised)

    def noised(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, dtype: torch.dtype | None = None
    ) -> Noised:
        """All that is drawn for a batch, and what follows from it before the denoiser runs.

        Args:
            batch: As for the call.
            generator: On the CPU.
            dtype: The denoiser's; None asks it.
        """
        latents = self.family.check(batch)
        n = latents.shape[0]
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        levels = self.objective.draw(n, self.family.tokens(latents), generator)
        dropped = torch.rand(n, generator=generator) < self.cond_dropout
        noise = offset_noise(noise, self.noise_offset, generator)
        conditions = self.family.conditions(batch)
        if self.cond_dropout > 0:
            conditions = {key: self._drop(key, value, dropped) for key, value in conditions.items()}
        dtype = dtype or self.family.dtype
        mask = batch.get("mask")
        return Noised(
            noisy(latents, noise, levels).to(dtype),
            self.family.packed(self.objective.target(latents, noise, levels)),
            levels.timesteps,
            levels.weight,
            conditions,
            None if mask is None else self.family.packed(_over(mask, latents)),
            batch.get("prior"),
        )

    def predict(self, noised: Noised, model: nn.Module | None = None) -> Tensor:
        """The denoiser's prediction for a batch that `noised` has made."""
        return self.family.predict(noised.noisy, noised.timesteps, noised.conditions, self.guidance, model)

    def compare(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The loss of a prediction, a float32 scalar."""
        if prediction.shape != noised.target.shape:
            raise MoleShapeError(
                "FamilyLoss: prediction", expected=tuple(noised.target.shape), got=tuple(prediction.shape)
            )
        error = (prediction.float() - noised.target).square()
        return reduced(error, noised.weight, noised.mask, noised.prior, self.prior_weight)

    def _drop(self, key: str, value: Tensor, dropped: Tensor) -> Tensor:
        if key not in self.null:
            return value
        null = self.null[key].to(value)
        short = value.shape[1] - null.shape[0] if value.dim() == null.dim() + 1 and null.dim() else 0
        if short > 0:
            # an empty text is shorter; its mask, filled up too, leaves the rest out
            null = torch.cat([null, null.new_zeros(short, *null.shape[1:])])
        if tuple(null.shape) not in (tuple(value.shape[1:]), (1, *value.shape[1:])):
            expected = f"one sample's shape {tuple(value.shape[1:])}"
            raise MoleShapeError(f"FamilyLoss: null {key}", expected=expected, got=tuple(null.shape))
        return torch.where(dropped.to(value.device).view(-1, *(1,) * (value.dim() - 1)), null, value)


def _over(mask: Tensor, latents: Tensor) -> Tensor:
    fits = mask.dim() == latents.dim() and all(m in (1, e) for m, e in zip(mask.shape, latents.shape))
    if not fits or mask.shape[0] != latents.shape[0]:
        expected = f"[B,1 or C,…] for latents {tuple(latents.shape)}"
        raise MoleShapeError("batch: mask", expected=expected, got=tuple(mask.shape))
    return mask.float().expand_as(latents)
