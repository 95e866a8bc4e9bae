"""Objectives: ε, v and x of variance-preserving diffusion, and the velocity of flow matching."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mole_kernels.errors import MoleTypeError, MoleValueError
from mole_kernels.training.objectives.levels import LevelSampling

KINDS = ("epsilon", "v_prediction", "sample")
FLOW_WEIGHTS = ("none", "sigma_sqrt", "cosmap")


class Levels(NamedTuple):
    """How much noise each sample gets. All on the CPU.

    Args:
        timesteps: [B] as the pipeline counts them: int64 0 … T−1, or σ·T float32.
        signal: [B] float32, the latent's factor: √ᾱ, or 1 − σ.
        spread: [B] float32, the noise's factor: √(1−ᾱ), or σ.
        weight: [B] float32, of the squared error.
    """

    timesteps: Tensor
    signal: Tensor
    spread: Tensor
    weight: Tensor


class Objective(Protocol):
    """What `FamilyLoss` asks of an objective."""

    def draw(self, samples: int, tokens: int, generator: torch.Generator) -> Levels:
        """Levels of a batch, drawn on the CPU."""
        ...

    def target(self, latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """What the denoiser should say, float32, of the latents' shape."""
        ...


def noisy(latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """signal·x + spread·ε in float32, of the latents' shape [B,…]."""
    signal, spread = over(levels.signal, latents), over(levels.spread, latents)
    return signal * latents.float() + spread * noise.float()


def over(values: Tensor, like: Tensor) -> Tensor:
    """values [B] on `like`'s device, shaped to multiply a tensor [B,…] of its dimensions."""
    return values.to(like.device).view(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True)
class Diffusion:
    """x_t = √ᾱ_t x + √(1−ᾱ_t) ε;  target ε, v = √ᾱ_t ε − √(1−ᾱ_t) x, or x.

    Args:
        alphas: ᾱ [T], a scheduler's `alphas_cumprod`.
        kind: "epsilon", "v_prediction" or "sample", as diffusers' `prediction_type`.
        snr_gamma: γ of min-SNR: w = min(SNR, γ) for x, divided by SNR for ε and by SNR + 1 for v. SNR =
            ᾱ/(1−ᾱ).
        debiased: w = 1/√SNR for ε, SNR at most 1000; multiplied by SNR for x, and by SNR/(SNR + 1) for v.

    Source: Ho et al. 2020; Salimans and Ho 2022 (v); Hang et al. 2023, arXiv 2303.09556 (min-SNR); Yu et al.
    2023, "Debias the Training of Diffusion Models", arXiv 2310.08442.
    """

    alphas: Tensor
    kind: str = "epsilon"
    snr_gamma: float | None = None
    debiased: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MoleValueError(
                "Diffusion: kind", expected=f"one of {', '.join(KINDS)}", got=repr(self.kind)
            )
        if self.snr_gamma is not None and self.debiased:
            raise MoleValueError(
                "Diffusion", expected="one weight: snr_gamma or debiased", got="both of them"
            )

    def draw(self, samples: int, tokens: int, generator: torch.Generator) -> Levels:
        """Timesteps uniform in 0 … T−1."""
        del tokens
        return self.levels(torch.randint(0, len(self.alphas), (samples,), generator=generator))

    def levels(self, timesteps: Tensor) -> Levels:
        """The levels of timesteps [B] int64."""
        alpha = self.alphas.cpu()[timesteps].float()
        return Levels(timesteps, alpha.sqrt(), (1.0 - alpha).sqrt(), self._weight(timesteps))

    def target(self, latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """ε, v or x by `kind`."""
        if self.kind == "epsilon":
            return noise.float()
        if self.kind == "sample":
            return latents.float()
        return over(levels.signal, latents) * noise.float() - over(levels.spread, latents) * latents.float()

    def _weight(self, timesteps: Tensor) -> Tensor:
        alpha = self.alphas.cpu()[timesteps].double()
        snr = alpha / (1.0 - alpha)
        if self.snr_gamma is not None:
            gamma = self.snr_gamma
            # γ/SNR rather than min(SNR, γ)/SNR, so that SNR 0 gives its limit 1 and not 0/0
            by_kind = {
                "epsilon": lambda: (gamma / snr).clamp(max=1.0),
                "v_prediction": lambda: snr.clamp(max=gamma) / (snr + 1.0),
                "sample": lambda: snr.clamp(max=gamma),
            }
        elif self.debiased:
            bound = snr.clamp(max=1000.0)
            by_kind = {
                "epsilon": lambda: bound.rsqrt(),
                "v_prediction": lambda: bound.sqrt() / (bound + 1.0),
                "sample": lambda: bound.sqrt(),
            }
        else:
            return torch.ones_like(snr).float()
        return by_kind[self.kind]().float()


@dataclass(frozen=True)
class FlowMatching:
    """x_σ = (1−σ) x + σ ε;  target the velocity ε − x;  the denoiser is told σ·T.

    Args:
        sampling: How σ is drawn.
        steps: T, the scheduler's `num_train_timesteps`.
        weights: "none"; "sigma_sqrt", σ⁻²; "cosmap", 2/(π(1 − 2σ + 2σ²)).

    Source: Lipman et al. 2023 and Liu et al. 2023 (rectified flow); Esser et al. 2024 (weights; diffusers'
    `compute_loss_weighting_for_sd3`).
    """

    sampling: LevelSampling = field(default_factory=LevelSampling)
    steps: int = 1000
    weights: str = "none"

    def __post_init__(self) -> None:
        if self.weights not in FLOW_WEIGHTS:
            raise MoleValueError(
                "FlowMatching: weights", expected=f"one of {', '.join(FLOW_WEIGHTS)}", got=repr(self.weights)
            )

    def draw(self, samples: int, tokens: int, generator: torch.Generator) -> Levels:
        """σ by `sampling`."""
        return self.levels(self.sampling.draw(samples, tokens, generator))

    def levels(self, sigma: Tensor) -> Levels:
        """The levels of σ [B] float32 in (0, 1]."""
        return Levels(sigma * self.steps, 1.0 - sigma, sigma, self._weight(sigma))

    def target(self, latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """ε − x."""
        del levels
        return noise.float() - latents.float()

    def _weight(self, sigma: Tensor) -> Tensor:
        if self.weights == "sigma_sqrt":
            return sigma**-2.0
        if self.weights == "cosmap":
            return 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))
        return torch.ones_like(sigma)


def objective_of(
    scheduler: Any,
    *,
    density: str = "logit_normal",
    weights: str = "none",
    snr_gamma: float | None = None,
    debiased: bool = False,
) -> Diffusion | FlowMatching:
    """What a scheduler's model was trained on.

    Args:
        scheduler: Of diffusers: variance-preserving, or of flow matching.
        density: Of flow matching's levels.
        weights: Of flow matching's errors.
        snr_gamma: Min-SNR, for diffusion alone.
        debiased: Debiased weights, for diffusion alone.

    Returns:
        The objective: levels, prediction and weights.

    Raises:
        MoleTypeError: No scheduler of either kind.
        MoleValueError: Weights of the other kind, or a prediction that is not covered.
    """
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "epsilon")
    name = type(scheduler).__name__
    of_flow = any("FlowMatch" in cls.__name__ for cls in type(scheduler).__mro__)
    if of_flow or config.get("use_flow_sigmas", False) or kind == "flow_prediction":
        if snr_gamma is not None or debiased:
            expected = f"weights= among {', '.join(FLOW_WEIGHTS)}, as {name} is of flow matching"
            raise MoleValueError("objective_of", expected=expected, got="snr_gamma or debiased")
        sampling = LevelSampling.of_scheduler(scheduler, density)
        return FlowMatching(sampling, int(config.get("num_train_timesteps", 1000)), weights)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        expected = "a diffusers scheduler with alphas_cumprod, or one of flow matching"
        raise MoleTypeError("objective_of: scheduler", expected=expected, got=name)
    if weights != "none":
        expected = f"snr_gamma= or debiased=, as {name} is not of flow matching"
        raise MoleValueError("objective_of", expected=expected, got=f"weights={weights!r}")
    return Diffusion(alphas, kind, snr_gamma, debiased)
