"""Every solution of a layer's gradient fusion along a ridge, from one decomposition, and the one that other
inputs choose.

    ΔW(ρ) = argmin Σ_i ‖(α_i ΔW_i − ΔW) X_i‖² + ρ m ‖ΔW − P‖²,   m = trace(G)/K
          = P + Σ_i (α_i ΔW_i − P) G_i R,   R = (G + ρ m)⁻¹

P is where a direction goes that the inputs say little about: 0, the base, as in the paper, or weight fusion.
Towards weight fusion ρ = 0 is gradient fusion, ρ = ∞ weight fusion itself, so that the worst that a choice on
other inputs comes to is what one had without inputs. Every ΔW(ρ) has rank at most Σ r_i, with the old B_i.

Source: the objective is Mix-of-Show's (Gu et al., NeurIPS 2023); ridge and choice are this package's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError
from mole_kernels.experts.fuse_sums import Sums, directions, fused_by_weights, objective
from mole_kernels.experts.lowrank import LowRank

Towards = Literal["base", "weights"]
# parts of weight fusion's objective. Where a few texts choose, a weak ridge may do well by chance: on the
# digits' K and V it left one of 14 layers at 2.0 x weight fusion on other texts, 0.8 x with this slack
SLACK, SLACK_FEW = 0.005, 0.1
# half decades around what 12 to 20 sampling steps want (1e-3 to 1), the ends for layers unlike those
RIDGES = tuple(10.0 ** (k / 2) for k in range(-12, 7))


@dataclass(frozen=True)
class RidgeChoice:
    """Which solution a layer takes.

    Args:
        ridge: ρ; 0 for the closed form with its cut-off, inf towards "weights" for weight fusion.
        towards: P.
        value: Objective on the inputs that chose.
    """

    ridge: float
    towards: Towards
    value: float


class RidgePath:
    """Solutions of one layer.

    Args:
        factors: Expert -> its factors here.
        sums: Inputs' sums.
        weights: Expert -> α_i.
        cutoff: As in `fuse_layer`; counts where ρ = 0.
    """

    def __init__(
        self,
        factors: Mapping[str, LowRank],
        sums: Sums,
        weights: Mapping[str, float] | None = None,
        cutoff: float = 1e-12,
    ) -> None:
        self.factors, self.sums, self.cutoff = factors, sums, cutoff
        self.alpha = {name: float((weights or {}).get(name, 1.0)) for name in factors}
        self.averaged = fused_by_weights(factors, self.alpha)
        self.values, self.vectors = directions(sums)
        self._up = torch.cat([f.up.detach().to(sums.gram) for f in factors.values()], 1)
        self._gradient = [self._projected(name) for name in factors]
        self._weights = [
            f.down.detach().to(sums.gram) * (self.alpha[name] * f.scale / len(factors))
            for name, f in factors.items()
        ]

    def at(self, ridge: float, towards: Towards = "base") -> LowRank:
        """ΔW(ρ), float64.

        Raises:
            MoleValueError: A ridge below 0, or inf towards the base, which is the base alone.
        """
        if not ridge >= 0 or (ridge == math.inf and towards == "base"):
            raise MoleValueError("fuse: ridge", expected="a number >= 0", got=ridge)
        first = next(iter(self.factors.values()))
        if ridge == math.inf:
            return LowRank(torch.cat(self._weights), self._up, 1.0, first.conv)
        inverse = self._inverse(ridge)
        down = torch.cat([part * inverse for part in self._gradient]) @ self.vectors.mT
        if towards == "weights":
            own = torch.cat(self._weights)
            down = down + own - (own @ self.vectors) * (self.values * inverse) @ self.vectors.mT
        return LowRank(down, self._up, 1.0, first.conv)

    def objectives(self, others: Sums, ridges: Sequence[float], towards: Towards) -> Tensor:
        """F of ΔW(ρ) on other inputs, for all ridges at once.

        In the eigenbasis only the factor in front of each direction depends on ρ, so that F is a quadratic
        function of these factors, with one matrix [n,n] for all ridges.

        Args:
            others: Sums over other inputs of the same experts.
            ridges: ρ > 0, or 0 for the closed form with its cut-off.
            towards: P.

        Returns:
            [ridges] float64.
        """
        own = torch.cat(self._weights)
        parts = torch.cat(self._gradient)
        if towards == "weights":
            parts = parts - (own @ self.vectors) * self.values
        ups = self._up.mT @ self._up
        target, least = self._target(others)
        seen = self.vectors if others.few is None else others.few @ self.vectors
        gram = self.vectors.mT @ others.gram @ self.vectors if others.few is None else seen.mT @ seen
        linear = -2 * (parts * (target @ self.vectors)).sum(0)
        if towards == "weights":
            crossed = ups @ (own @ others.gram)
            linear = linear + 2 * (parts * (crossed @ self.vectors)).sum(0)
            least = least + ((crossed - 2 * target) * own).sum()
        strengths = torch.tensor(list(ridges)) * self.sums.gram.diagonal().mean()
        inverse = 1 / (self.values + strengths.to(self.values)[:, None])
        if 0 in ridges:
            inverse[list(ridges).index(0)] = self._inverse(0.0)
        square = gram * (parts.mT @ ups @ parts)
        return (inverse @ linear + ((inverse @ square) * inverse).sum(1) + least).clamp_min(0)

    def _target(self, others: Sums) -> tuple[Tensor, Tensor]:
        """(Bᵀ Σ α_i s_i B_i A_i G_i [R,K], F(0))."""
        target = self._up.new_zeros(self._up.shape[1], others.gram.shape[0])
        least = self._up.new_zeros(())
        for name, factor in self.factors.items():
            if (cross := others.cross.get(name)) is None:
                continue
            alpha, up = self.alpha[name] * factor.scale, factor.up.detach().to(self._up)
            target += alpha * (self._up.mT @ up) @ cross
            down = factor.down.detach().to(cross)
            least = least + alpha**2 * ((up.mT @ up) * (cross @ down.mT)).sum()
        return target, least

    def choose(self, others: Sums, ridges: Sequence[float] = RIDGES) -> RidgeChoice:
        """The solution for other inputs: of those whose objective there is near the least, the one that stays
        closest to weight fusion.

        Near is within `SLACK` of weight fusion's objective, `SLACK_FEW` where the inputs are at most K/4.

        Args:
            others: Sums over inputs that were not fitted.
            ridges: ρ to try, towards both; 0 and weight fusion are always among them.
        """
        falling = [*sorted((ridge for ridge in ridges if ridge), reverse=True), 0.0]
        tried: list[tuple[float, Towards]] = [(math.inf, "weights")]
        tried += [(ridge, "weights") for ridge in falling] + [(ridge, "base") for ridge in falling]
        by_weights = objective(self.factors, others, self.alpha, self.averaged)
        values = [by_weights]
        for towards in ("weights", "base"):
            values += self.objectives(others, falling, towards).tolist()
        slack = SLACK if others.few is None else SLACK_FEW
        enough = min(values) + slack * by_weights
        return next(RidgeChoice(*way, value) for way, value in zip(tried, values) if value <= enough)

    @property
    def counted(self) -> Tensor:
        """[n] bool: directions beyond the cut-off."""
        least = max(self.cutoff, torch.finfo(torch.float64).eps * self.sums.gram.shape[0])
        return self.values > least * self.values[-1].clamp_min(0)

    def again(self, sums: Sums, choice: RidgeChoice) -> LowRank:
        """The chosen solution for more inputs, float64, without their eigenvectors."""
        if choice.ridge in (0.0, math.inf) or sums.few is not None:
            return RidgePath(self.factors, sums, self.alpha, self.cutoff).at(choice.ridge, choice.towards)
        first, ridge = next(iter(self.factors.values())), choice.ridge * sums.gram.diagonal().mean()
        parts = []
        for own, (name, factor) in zip(self._weights, self.factors.items()):
            cross = sums.cross.get(name, torch.zeros_like(own))
            parts.append(
                cross * (self.alpha[name] * factor.scale) + own * ridge * (choice.towards == "weights")
            )
        gram = sums.gram.clone()
        gram.diagonal().add_(ridge)
        triangular, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            return RidgePath(self.factors, sums, self.alpha, self.cutoff).at(choice.ridge, choice.towards)
        down = torch.cholesky_solve(torch.cat(parts).mT, triangular).mT
        return LowRank(down.contiguous(), self._up, 1.0, first.conv)

    def _projected(self, name: str) -> Tensor:
        """α_i s_i A_i G_i V [r_i,n]; zero for an expert without inputs."""
        factor, cross = self.factors[name], self.sums.cross.get(name)
        if cross is None:
            return self.vectors.new_zeros(factor.rank, self.vectors.shape[1])
        return (cross @ self.vectors) * (self.alpha[name] * factor.scale)

    def _inverse(self, ridge: float) -> Tensor:
        if ridge:
            return 1 / (self.values + ridge * self.sums.gram.diagonal().mean())
        counted = self.counted
        return torch.where(counted, 1 / self.values.where(counted, self.values.new_ones(())), 0)
