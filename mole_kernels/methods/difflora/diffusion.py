"""Noise, the loss, and sampling through diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError

Denoise = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def noise_schedule(kind: str = "ddim", steps: int = 1000) -> Any:
    """A diffusers scheduler on the squared-cosine schedule that expects the clean sample: "ddim" or "dpm"
    (DPM-Solver++ of order 2).

    The paper predicts x0; its schedule is not published, cosine is ours.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    common = {"num_train_timesteps": steps, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
    if kind == "ddim":
        return DDIMScheduler(
            **common, clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=False
        )
    if kind == "dpm":
        return DPMSolverMultistepScheduler(**common, timestep_spacing="trailing")
    raise MoleValueError("noise_schedule", expected="'ddim' or 'dpm'", got=repr(kind))


def x0_loss(
    denoise: Denoise,
    scheduler: Any,
    x0: Tensor,
    condition: Tensor,
    generator: torch.Generator,
    drop: float = 0.1,
) -> Tensor:
    """mean((f(√ᾱ x0 + √(1−ᾱ) ε, t, c) − x0)²); with probability `drop` a sample's condition is None's, for
    guidance.

    x0 [B,C,L], condition [B,D]; `denoise` is a LoRADenoiser. Everything random comes from `generator`.
    """
    B = x0.shape[0]
    t = torch.randint(
        0, scheduler.config.num_train_timesteps, (B,), generator=generator, device=generator.device
    ).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype).to(x0.device)
    dropped = (torch.rand(B, 1, generator=generator, device=generator.device) < drop).to(x0.device)
    null = denoise.null  # type: ignore[attr-defined]
    shown = torch.where(dropped, null.expand_as(condition).to(condition.dtype), condition)
    return (denoise(scheduler.add_noise(x0, noise, t), t, shown) - x0).square().mean()


@torch.no_grad()
def sample_latents(
    denoise: Denoise,
    scheduler: Any,
    condition: Tensor,
    shape: tuple[int, int],
    *,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Latents [B,C,L] for conditions [B,D]: x0 = x0_null + guidance · (x0_c − x0_null) in every step. The
    seed decides the noise alone.

    Args:
        seed: Of all, or one for each sample. Sample b's noise depends on the seed and b, not on the
            batch's size; on its own seed alone where each has one: one person's LoRA is the same alone
            or among others.
    """
    if steps < 1:
        raise MoleValueError("sample", expected="steps >= 1", got=steps)
    B = condition.shape[0]
    seeds = [seed * 1_000_003 + b for b in range(B)] if isinstance(seed, int) else list(seed)
    if len(seeds) != B:
        raise MoleValueError("sample", expected=f"a seed for each of {B} conditions", got=len(seeds))
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(own_seed)) for own_seed in seeds]
    x = torch.stack(noise).to(condition.device, condition.dtype) if B else condition.new_zeros(0, *shape)
    scheduler.set_timesteps(steps, device=condition.device)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x0 = denoise(x, t.expand(B), condition)
        if guidance != 1:
            null = denoise(x, t.expand(B), None)
            x0 = null + guidance * (x0 - null)
        x = scheduler.step(x0, t, x, return_dict=False)[0]
    return x
