"""The denoising loss of a diffusers UNet: noise a latent, predict, compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.training.objectives.noised import Noised
from mole_kernels.training.objectives.reduce import reduced

TARGETS = ("epsilon", "v_prediction")
CONDITIONS = ("encoder_hidden_states", "text_embeds", "time_ids")


def denoising_error(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """(unet(√ᾱ_t x + √(1−ᾱ_t) ε, t, c) − target)², float32 [B,C,h,w];  target ε, or v = √ᾱ_t ε − √(1−ᾱ_t) x.

    latents, noise [B,C,h,w]   timesteps [B] int64   encoder_hidden_states [B,T,K]
    ᾱ is `scheduler.alphas_cumprod`, the target is named by `scheduler.config.prediction_type`; no other part
    of the
    scheduler is used, so any variance-preserving one of diffusers will do. v: Salimans and Ho 2022, arXiv
    2202.00512.
    """
    kind, signal, spread = _coefficients(scheduler, timesteps, latents)
    if noise.shape != latents.shape:
        raise MoleShapeError(
            "denoising_loss: noise",
            expected=f"the latents' shape {tuple(latents.shape)}",
            got=tuple(noise.shape),
        )
    noisy = signal * latents.float() + spread * noise.float()
    dtype = _dtype(unet, latents.dtype)
    extra = {} if added_cond_kwargs is None else {"added_cond_kwargs": dict(added_cond_kwargs)}
    predicted = unet(noisy.to(dtype), timesteps, encoder_hidden_states.to(dtype), return_dict=False, **extra)[
        0
    ]
    target = noise.float() if kind == "epsilon" else signal * noise.float() - spread * latents.float()
    return (predicted.float() - target).square()


def denoising_loss(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    snr_gamma: float | None = None,
    mask: Tensor | None = None,
    *,
    per_picture: bool = False,
) -> Tensor:
    """mean of w_t · `denoising_error`: w_t = min(SNR_t, γ)/SNR_t for ε, min(SNR_t, γ)/(SNR_t + 1) for v, 1
    without γ.

    SNR_t = ᾱ_t/(1−ᾱ_t). Weights: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
    Strategy",
    arXiv 2303.09556 (the weights for ε and v follow from that for x).

    Args:
        unet: The denoiser.
        scheduler: Its scheduler.
        latents: [B,C,h,w], clean.
        timesteps: [B] int64.
        noise: [B,C,h,w].
        encoder_hidden_states: [B,T,K].
        added_cond_kwargs: SDXL's further conditions.
        snr_gamma: γ of the weights, or None.
        mask: [B,1|C,h,w]: the mean becomes Σ mask·w·error / Σ mask over the whole batch.
        per_picture: The mean over the pictures of Σ mask·w·error / Σ mask, a mask of one channel counted
            once, as
            Mix-of-Show has it.

    Returns:
        A float32 scalar.

    Raises:
        MoleError: Sizes or a prediction type that do not fit.
    """
    error = denoising_error(
        unet, scheduler, latents, timesteps, noise, encoder_hidden_states, added_cond_kwargs
    )
    if snr_gamma is not None:
        error = error * min_snr_weight(scheduler, timesteps, snr_gamma).to(error.device)[:, None, None, None]
    if mask is None:
        return error.mean()
    if (
        mask.dim() != 4
        or mask.shape[0] != error.shape[0]
        or mask.shape[1] not in (1, error.shape[1])
        or mask.shape[2:] != error.shape[2:]
    ):
        raise MoleShapeError(
            "denoising_loss: mask",
            expected=f"[B,1 or C,h,w] for latents {tuple(error.shape)}",
            got=tuple(mask.shape),
        )
    if per_picture:
        counted = mask.float().to(error.device)
        sums = (error * counted).sum((1, 2, 3))
        return (sums / counted.sum((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)).mean()
    weight = mask.float().expand_as(error)
    # an all-zero mask asks for nothing: loss 0, not 0/0
    return (error * weight).sum() / weight.sum().clamp_min(torch.finfo(torch.float32).tiny)


def min_snr_weight(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """w_t of `denoising_loss` [B] float32, also right at SNR 0 and ∞."""
    kind, alphas = _scheduler_parts(scheduler)
    alpha_bar = alphas[timesteps.cpu()].double()
    snr = alpha_bar / (1.0 - alpha_bar)
    # γ/SNR rather than min(SNR, γ)/SNR, so that SNR 0 gives its limit 1 and not 0/0
    weight = (gamma / snr).clamp(max=1.0) if kind == "epsilon" else snr.clamp(max=gamma) / (snr + 1.0)
    return weight.float()


@dataclass
class DenoisingLoss:
    """loss(unet, batch, generator): draws ε, t and dropped conditions for `denoising_loss`, always in this
    order.

    batch: latents [B,C,h,w], encoder_hidden_states [B,T,K]; optional mask [B,1|C,h,w]; for SDXL text_embeds
    [B,P] and
    time_ids [B,6]. All draws are made on the CPU, so a run is the same on any device.

    Args:
        null: {condition: one sample's null value [T,K] or [1,T,K]}, or just that of
            encoder_hidden_states.
        cond_dropout: Probability of replacing a sample's conditions by `null`.
    """

    scheduler: Any
    null: Mapping[str, Tensor] | Tensor | None = None
    cond_dropout: float = 0.0
    snr_gamma: float | None = None
    _null: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        _scheduler_parts(self.scheduler)
        if self.null is not None:
            self._null = (
                {"encoder_hidden_states": self.null} if isinstance(self.null, Tensor) else dict(self.null)
            )
        if unknown := sorted(set(self._null) - set(CONDITIONS)):
            raise MoleValueError(
                "DenoisingLoss: null", expected=f"keys among {', '.join(CONDITIONS)}", got=", ".join(unknown)
            )
        if self.cond_dropout > 0 and not self._null:
            raise MoleValueError(
                "DenoisingLoss: cond_dropout",
                f"conditions are to be dropped with probability {self.cond_dropout}, but nothing is "
                "given to put in their place",
                hint="pass null=, the text encoder's output for the empty caption, or cond_dropout=0",
            )

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        noised = self.noised(batch, generator, unet_dtype(model, batch))
        return self.compare(self.predict(noised, model), noised)

    def noised(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Noised:
        """All that is drawn for a batch, and what follows from it before the UNet runs.

        Args:
            batch: As for the call.
            generator: On the CPU.
            dtype: The UNet's.
        """
        latents = self._latents(batch)
        n = latents.shape[0]
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(0, len(self.scheduler.alphas_cumprod), (n,), generator=generator).to(
            latents.device
        )
        dropped = (torch.rand(n, generator=generator) < self.cond_dropout).to(latents.device)
        conditions = {key: self._drop(key, batch[key], dropped) for key in CONDITIONS if key in batch}
        conditions["encoder_hidden_states"] = conditions["encoder_hidden_states"].to(dtype)
        kind, signal, spread = _coefficients(self.scheduler, timesteps, latents)
        noisy = signal * latents.float() + spread * noise.float()
        target = noise.float() if kind == "epsilon" else signal * noise.float() - spread * latents.float()
        weight = None if self.snr_gamma is None else min_snr_weight(self.scheduler, timesteps, self.snr_gamma)
        mask = batch.get("mask")
        return Noised(noisy.to(dtype), target, timesteps, weight, conditions, mask)

    def predict(self, noised: Noised, model: nn.Module) -> Tensor:
        """The UNet's prediction for a batch that `noised` has made."""
        added = dict(noised.conditions)
        text = added.pop("encoder_hidden_states")
        extra = {"added_cond_kwargs": added} if added else {}
        return model(noised.noisy, noised.timesteps, text, return_dict=False, **extra)[0]

    def compare(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The loss of a prediction, a float32 scalar."""
        return reduced((prediction.float() - noised.target).square(), noised.weight, noised.mask)

    def _latents(self, batch: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(batch, Mapping):
            raise MoleTypeError(
                "batch", expected="a dict with latents and encoder_hidden_states", got=type(batch).__name__
            )
        if missing := [key for key in ("latents", "encoder_hidden_states") if key not in batch]:
            raise MoleKeyError(
                "batch",
                expected=f"keys latents and encoder_hidden_states, without {', '.join(missing)}",
                got=sorted(batch),
            )
        return batch["latents"]

    def _drop(self, key: str, value: Tensor, dropped: Tensor) -> Tensor:
        if key not in self._null or self.cond_dropout == 0:
            return value
        null = self._null[key].to(value)
        wanted = tuple(value.shape[1:])
        if tuple(null.shape) not in (wanted, (1, *wanted)):
            raise MoleShapeError(
                f"DenoisingLoss: null {key}", expected=f"one sample's shape {wanted}", got=tuple(null.shape)
            )
        return torch.where(dropped.view(-1, *(1,) * (value.dim() - 1)), null, value)


def _scheduler_parts(scheduler: Any) -> tuple[str, Tensor]:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        raise MoleTypeError(
            "denoising_loss: scheduler",
            expected="a diffusers scheduler with alphas_cumprod",
            got=type(scheduler).__name__,
            hint="flow-matching schedulers are not covered; "
            "DDPMScheduler.from_config(pipe.scheduler.config) is",
        )
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind not in TARGETS:
        raise MoleValueError(
            "denoising_loss: scheduler.config.prediction_type",
            expected=f"one of {', '.join(TARGETS)}",
            got=repr(kind),
        )
    return kind, alphas


def _coefficients(scheduler: Any, timesteps: Tensor, latents: Tensor) -> tuple[str, Tensor, Tensor]:
    """(target, √ᾱ_t, √(1−ᾱ_t)), the latter two [B,1,1,1] float32 on the latents' device."""
    kind, alphas = _scheduler_parts(scheduler)
    if latents.dim() != 4 or timesteps.shape != latents.shape[:1]:
        raise MoleShapeError(
            "denoising_loss: latents, timesteps",
            expected="[B,C,h,w] and [B]",
            got=f"{tuple(latents.shape)} and {tuple(timesteps.shape)}",
        )
    if timesteps.is_floating_point():
        raise MoleTypeError("denoising_loss: timesteps", expected="integers", got=timesteps.dtype)
    alpha_bar = alphas[timesteps.cpu()].to(latents.device, torch.float32)[:, None, None, None]
    return kind, alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


def unet_dtype(unet: nn.Module, batch: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that a UNet computes a batch in."""
    latents = batch.get("latents") if isinstance(batch, Mapping) else None
    return _dtype(unet, torch.float32 if latents is None else latents.dtype)


def _dtype(unet: nn.Module, default: torch.dtype) -> torch.dtype:
    """The UNet's own dtype: its first parameter's, since experts and gates beside it may be kept in
    float32.
    """
    return next((p.dtype for p in unet.parameters() if p.is_floating_point()), default)
