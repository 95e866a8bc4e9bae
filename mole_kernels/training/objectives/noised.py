"""A batch as one step sees it: what is drawn for it, and what follows before the denoiser runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noised:
    """A noised batch.

    Args:
        noisy: [B,C,…] in the denoiser's dtype.
        target: Of the prediction's shape, float32.
        timesteps: [B] as the denoiser's scheduler counts them.
        weight: [B] float32, of the squared error; None for 1.
        conditions: What else the denoiser is told, [B,…] each; dropped ones are replaced.
        mask: Of the target's shape, or None.
        prior: [B] bool, or None.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    weight: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    prior: Tensor | None = None

    def signature(self) -> tuple[object, ...]:
        """What two batches share that one forward can take together: sizes and dtypes of all it is told."""
        inputs = {"noisy": self.noisy, "timesteps": self.timesteps, **self.conditions}
        return tuple((name, tuple(t.shape[1:]), t.dtype) for name, t in sorted(inputs.items()))


def merged(batches: Sequence[Noised]) -> Noised:
    """Batches of one signature as one, for the denoiser alone: it holds no target and no weights."""
    first = batches[0]
    if len(batches) == 1:
        return first
    return Noised(
        torch.cat([b.noisy for b in batches]),
        first.target[:0],
        torch.cat([b.timesteps for b in batches]),
        conditions={name: torch.cat([b.conditions[name] for b in batches]) for name in first.conditions},
    )
