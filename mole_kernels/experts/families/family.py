"""Families whose ΔW depends on the base: what each makes of W, at any strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError


@dataclass(frozen=True, eq=False)
class AdapterFamily:
    """One expert of one layer that is no LoRA alone.

    A gate multiplies what it adds: ΔW x and β, so that y = W x + b + Σ_e g_e (ΔW_e x + β_e).
    """

    kind: ClassVar[str] = ""
    # whether ΔW at strength w is w times ΔW at strength 1
    linear: ClassVar[bool] = True

    def weight_delta(self, weight: Tensor, strength: float = 1.0) -> Tensor | None:
        """ΔW at a strength, in W's dtype; None where the weight stays.

        Args:
            weight: W [N,K], or [N,C,kh,kw] of a convolution.
            strength: The adapter's scale; at 0 nothing is added.

        Raises:
            MoleShapeError: The parts are another layer's.
        """
        return None

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        """β [N] at strength 1, which a strength multiplies; None where the bias stays.

        Args:
            bias: The layer's own, or None.
        """
        return None


def check_shape(kind: str, name: str, tensor: Tensor, *sizes: int | None, hint: str = "") -> None:
    """Refuse a tensor of another shape.

    Args:
        kind: The family.
        name: The tensor's name.
        tensor: The tensor.
        *sizes: Each dimension's size; None where it is free.
        hint: What may be wrong.

    Raises:
        MoleShapeError: Another number of dimensions, another size, or none at all in one of them.
    """
    if (
        tensor.dim() != len(sizes)
        or 0 in tensor.shape
        or any(size is not None and size != got for size, got in zip(sizes, tensor.shape))
    ):
        raise MoleShapeError(
            kind,
            expected=f"{name} [{', '.join('·' if s is None else str(s) for s in sizes)}]",
            got=list(tensor.shape),
            hint=hint,
        )


def wide(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor in float32, or in float64 where it or `like` is; on the device of `like`."""
    double = tensor.dtype == torch.float64 or (like is not None and like.dtype == torch.float64)
    out = tensor.detach().to(torch.float64 if double else torch.float32)
    return out if like is None else out.to(like.device)
