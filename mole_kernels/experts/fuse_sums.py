"""What gradient fusion knows of a layer's inputs: sums over them, and the objective F from the sums alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.lowrank import LowRank


@dataclass
class Sums:
    """What one layer's inputs come to: gram [K,K] float64 over all experts, cross {expert: A_i G_i [r_i,K]
    float64}, rows seen.

    few  the inputs themselves [n,K] while they are at most K/4, so a quarter of the Gram matrix: then G's
         directions are found from them,
         at once and without squaring their spread, where the K x K eigenvalues would take a second; None once
         there were more
    """

    gram: Tensor
    cross: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    few: Tensor | None = None

    @classmethod
    def of(cls, K: int, device: torch.device | str = "cpu") -> Sums:
        return cls(
            torch.zeros(K, K, dtype=torch.float64, device=device),
            few=torch.zeros(0, K, dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def add(self, name: str, factor: LowRank | None, x: Tensor) -> None:
        """Add inputs of one expert, in float64, so that any split into calls gives the same to rounding.

        Args:
            name: The expert.
            factor: Its factors here; None for an expert that lacks the layer: there it wants ΔW = 0.
            x: [...,K].

        Raises:
            MoleShapeError: Another width than K.
            MoleValueError: Inputs that are not finite; nothing is added.
        """
        K = self.gram.shape[0]
        if x.shape[-1] != K:
            raise MoleShapeError(f"fuse, expert {name!r}", expected=f"inputs [...,{K}]", got=tuple(x.shape))
        rows = x.detach().reshape(-1, K).to(self.gram.device, torch.float64)
        # a product per call is one pass; a sum of squares that is not finite says the same as looking at
        # every element
        square = rows.mT @ rows
        if not bool(square.diagonal().sum().isfinite()):
            raise MoleValueError(f"fuse, expert {name!r}", expected="finite inputs", got="NaN or Inf")
        self.gram += square
        if self.few is not None:
            self.few = torch.cat([self.few, rows]) if len(self.few) + len(rows) <= K // 4 else None
        if factor is not None:
            cross = (factor.down.detach().to(rows) @ rows.mT) @ rows
            self.cross[name] = self.cross[name] + cross if name in self.cross else cross
        self.rows[name] = self.rows.get(name, 0) + rows.shape[0]

    def plus(self, other: Sums) -> Sums:
        """The sums over both sets of inputs."""
        few, K = None, self.gram.shape[0]
        if self.few is not None and other.few is not None and len(self.few) + len(other.few) <= K // 4:
            few = torch.cat([self.few, other.few])
        both = Sums(self.gram + other.gram, dict(self.cross), dict(self.rows), few)
        for name, cross in other.cross.items():
            both.cross[name] = both.cross[name] + cross if name in both.cross else cross
        for name, rows in other.rows.items():
            both.rows[name] = both.rows.get(name, 0) + rows
        return both


def directions(sums: Sums) -> tuple[Tensor, Tensor]:
    """G's eigenvalues, rising, and eigenvectors [K,n]; without those that are zero where the inputs are
    few.
    """
    if sums.few is None:
        return torch.linalg.eigh(sums.gram)
    _, values, vectors = torch.linalg.svd(sums.few, full_matrices=False)
    return values.square().flip(0), vectors.mT.flip(1)


def fused_by_weights(factors: Mapping[str, LowRank], weights: Mapping[str, float]) -> LowRank:
    """Weight fusion, Σ_i (α_i/n) ΔW_i, as one expert of rank Σ r_i."""
    n, first = len(factors), next(iter(factors.values()))
    down = torch.cat(
        [f.down.detach().double() * (weights[name] * f.scale / n) for name, f in factors.items()]
    )
    up = torch.cat([f.up.detach() for f in factors.values()], 1)
    return LowRank(down.to(first.down.dtype), up, 1.0, first.conv)


def objective(
    factors: Mapping[str, LowRank], sums: Sums, weights: Mapping[str, float], delta: LowRank | None
) -> float:
    """F(ΔW) from the sums alone, in float64; delta None is ΔW = 0."""
    like, total = sums.gram, 0.0
    wide = None if delta is None else (delta.up.detach().to(like), delta.down.detach().to(like) * delta.scale)
    for name, factor in factors.items():
        if name not in sums.cross:
            continue
        alpha, up, cross = weights[name] * factor.scale, factor.up.detach().to(like), sums.cross[name]
        total += alpha**2 * ((up.mT @ up) * (cross @ factor.down.detach().to(like).mT)).sum().item()
        if wide is not None:
            total -= 2 * alpha * ((up.mT @ wide[0]) * (cross @ wide[1].mT)).sum().item()
    if wide is not None:
        seen = None if sums.few is None else wide[1] @ sums.few.mT
        inner = wide[1] @ sums.gram @ wide[1].mT if seen is None else seen @ seen.mT
        total += ((wide[0].mT @ wide[0]) * inner).sum().item()
    return max(total, 0.0)
