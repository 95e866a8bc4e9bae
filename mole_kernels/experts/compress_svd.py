"""The singular values of B·A from the factors alone: QR of each, then the SVD of an R×R core. ΔW [N,K] is
never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mole_kernels.experts.lowrank import LowRank


class Svd(NamedTuple):
    """up · down = left · diag(values) · rightᵀ, the layer's scale left out.  left [N,P]   values [P], falling
    right [K,P]
    """

    left: Tensor
    values: Tensor
    right: Tensor


def svd(layer: LowRank) -> Svd:
    """The SVD of up · down, P = min(N, K, R); in the factors' dtype, float32 at least."""
    up, down = _wide(layer.up), _wide(layer.down)
    basis_up, core_up = torch.linalg.qr(up)
    basis_down, core_down = torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(core_up @ core_down.mT, full_matrices=False)
    return Svd(basis_up @ left, values, basis_down @ right.mT)


def singular_values(layer: LowRank, dtype: torch.dtype = torch.float64) -> Tensor:
    """[P], falling: the singular values of ΔW, scale included. ‖ΔW‖₂ is the first, ‖ΔW‖_F the root of the sum
    of their squares.
    """
    core_up = torch.linalg.qr(layer.up.detach().to(dtype), mode="r").R
    core_down = torch.linalg.qr(layer.down.detach().to(dtype).mT, mode="r").R
    return abs(layer.scale) * torch.linalg.svdvals(core_up @ core_down.mT)


def truncate(layer: LowRank, rank: int, parts: Svd | None = None) -> LowRank:
    """The best approximation of rank at most `rank` (Eckart and Young); √σ goes to both factors, the scale
    stays.
    """
    left, values, right = parts or svd(layer)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return LowRank((right[:, :rank] * root).mT.contiguous(), left[:, :rank] * root, layer.scale, layer.conv)


def difference(first: LowRank, second: LowRank, dtype: torch.dtype = torch.float64) -> LowRank:
    """ΔW_one − ΔW_other as factors of rank R + R'."""
    down = torch.cat(
        [first.down.detach().to(dtype) * first.scale, second.down.detach().to(dtype) * -second.scale]
    )
    return LowRank(down, torch.cat([first.up.detach().to(dtype), second.up.detach().to(dtype)], 1))


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
