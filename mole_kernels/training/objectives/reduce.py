"""From squared errors to one number: masks, weights of samples, prior preservation; and offset noise."""

from __future__ import annotations

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError
from mole_kernels.training.objectives.objective import over


def reduced(
    error: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    prior: Tensor | None = None,
    prior_weight: float = 1.0,
) -> Tensor:
    """mean of w·error;  with a mask Σ mask·w·error / Σ mask;  with a prior mean(own) + λ·mean(prior).

    Args:
        error: [B,…] float32.
        weight: w [B], 1 where not given.
        mask: Broadcastable to `error`; where it is 0 nothing is learnt.
        prior: [B] bool, which samples are pictures of the class and not of the subject.
        prior_weight: λ of prior preservation.

    Returns:
        A float32 scalar; a batch of one kind alone has that kind's term.

    Raises:
        MoleShapeError: A mask that does not fit.

    Source: Ruiz et al. 2023, "DreamBooth", section 3.3 (prior preservation).
    """
    if weight is not None:
        error = error * over(weight, error)
    counts = torch.ones_like(error) if mask is None else _fitting(mask, error)
    if prior is None:
        return _mean(error, counts) if mask is not None else error.mean()
    own = over((~prior.bool()).float(), error)
    return _mean(error, counts * own) + prior_weight * _mean(error, counts * (1.0 - own))


def offset_noise(noise: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """ε + σ·n, with one n ~ N(0, 1) for each sample and channel: noise [B,C,…] whose mean varies too.

    Source: Guttenberg 2023, "Diffusion with Offset Noise"; σ = 0.1 there.
    """
    if sigma == 0.0:
        return noise
    shape = (*noise.shape[:2], *(1,) * (noise.dim() - 2))
    return noise + sigma * torch.randn(shape, generator=generator).to(noise)


def _mean(error: Tensor, counts: Tensor) -> Tensor:
    # nothing to count asks for nothing: 0, not 0/0
    return (error * counts).sum() / counts.sum().clamp_min(torch.finfo(torch.float32).tiny)


def _fitting(mask: Tensor, error: Tensor) -> Tensor:
    fits = mask.dim() == error.dim() and all(m in (1, e) for m, e in zip(mask.shape, error.shape))
    if not fits or mask.shape[0] != error.shape[0]:
        raise MoleShapeError(
            "loss: mask",
            expected=f"broadcastable to {tuple(error.shape)}, one a sample",
            got=tuple(mask.shape),
        )
    return mask.to(error).expand_as(error)
