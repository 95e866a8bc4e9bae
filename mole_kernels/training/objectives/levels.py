"""Noise levels σ of flow matching: how SD3, FLUX, Qwen-Image and Wan draw them in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError

DENSITIES = ("uniform", "logit_normal", "mode")
SHIFT_KINDS = ("exponential", "linear")


@dataclass(frozen=True)
class ResolutionShift:
    """μ(L) on the line through (base_tokens, base) and (most_tokens, most); the shift is exp(μ), or μ.

    L is the number of image tokens of the denoiser. Source: Esser et al. 2024 (SD3, section 5.3.2);
    `calculate_shift` of diffusers' FLUX and Qwen-Image pipelines.
    """

    base: float = 0.5
    most: float = 1.15
    base_tokens: int = 256
    most_tokens: int = 4096
    kind: str = "exponential"

    def __post_init__(self) -> None:
        if self.kind not in SHIFT_KINDS:
            expected = f"one of {', '.join(SHIFT_KINDS)}"
            raise MoleValueError("ResolutionShift: kind", expected=expected, got=repr(self.kind))
        if self.base_tokens == self.most_tokens:
            raise MoleValueError(
                "ResolutionShift", expected="two numbers of tokens that differ", got=self.base_tokens
            )

    def shift(self, tokens: int) -> float:
        """The factor s of `shifted` for this many image tokens."""
        slope = (self.most - self.base) / (self.most_tokens - self.base_tokens)
        mu = self.base + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.kind == "exponential" else mu


@dataclass(frozen=True)
class LevelSampling:
    """σ = s·u/(1 + (s−1)·u), with u of a density on (0, 1) and s the shift.

    Args:
        density: "uniform"; "logit_normal", u = sigmoid(mean + std·n); "mode", u' = 1 − u − m·(cos²(πu/2) − 1
            + u), heavy in the middle for m = `mode_scale` > 0.
        mean: Of the logit-normal density.
        std: Of the logit-normal density.
        mode_scale: m of the density "mode".
        shift: s for every picture: 3 for SD3, 5 for Wan at 720p.
        by_resolution: s by the number of image tokens instead, as FLUX and Qwen-Image have it.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 (densities) and 5.3.2
    (shift); `compute_density_for_timestep_sampling` of diffusers' training_utils.
    """

    density: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    by_resolution: ResolutionShift | None = None

    def __post_init__(self) -> None:
        if self.density not in DENSITIES:
            raise MoleValueError(
                "LevelSampling: density", expected=f"one of {', '.join(DENSITIES)}", got=repr(self.density)
            )
        for name in ("std", "shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise MoleValueError(
                    f"LevelSampling: {name}", expected="a finite number above 0", got=repr(value)
                )

    def draw(self, samples: int, tokens: int, generator: torch.Generator) -> Tensor:
        """σ [samples] float32 in (0, 1], drawn on the CPU.

        Args:
            samples: How many to draw.
            tokens: Image tokens of one sample, for `by_resolution`.
            generator: On the CPU.
        """
        return self.shifted(self._density(samples, generator), tokens)

    def shifted(self, u: Tensor, tokens: int) -> Tensor:
        """σ = s·u/(1 + (s−1)·u) [any shape], s of this many tokens."""
        s = self.shift if self.by_resolution is None else self.by_resolution.shift(tokens)
        return s * u / (1.0 + (s - 1.0) * u)

    def _density(self, samples: int, generator: torch.Generator) -> Tensor:
        # at σ = 0 nothing is left to predict
        least = torch.finfo(torch.float32).eps
        if self.density == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.randn(samples, generator=generator))
            return u.clamp(least, 1.0)
        u = torch.rand(samples, generator=generator)
        if self.density == "mode":
            u = 1.0 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1.0 + u)
        return u.clamp(least, 1.0)

    @classmethod
    def of_scheduler(cls, scheduler: Any, density: str = "logit_normal") -> LevelSampling:
        """The shift that a scheduler samples with, for training with the same levels.

        Args:
            scheduler: Of diffusers: FlowMatchEulerDiscreteScheduler, or one with `use_flow_sigmas` (Wan's
                UniPC).
            density: Of u.
        """
        config: Mapping[str, Any] = scheduler.config
        if config.get("use_dynamic_shifting", False):
            by_resolution = ResolutionShift(
                base=config.get("base_shift") or 0.5,
                most=config.get("max_shift") or 1.15,
                base_tokens=config.get("base_image_seq_len", 256),
                most_tokens=config.get("max_image_seq_len", 4096),
                kind=config.get("time_shift_type", "exponential"),
            )
            return cls(density, by_resolution=by_resolution)
        return cls(density, shift=float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0))


# as the models were trained, where that is published; a scheduler's own shift is `of_scheduler`
SD3 = LevelSampling("logit_normal", shift=3.0)
FLUX = LevelSampling("logit_normal", by_resolution=ResolutionShift())
QWEN_IMAGE = LevelSampling("logit_normal", by_resolution=ResolutionShift(0.5, 0.9, 256, 8192))
WAN = LevelSampling("uniform", shift=5.0)
