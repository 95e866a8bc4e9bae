"""Gradient fusion in closed form: several experts into one that does to each expert's own inputs what that
expert did alone.

For one layer, experts ΔW_i = s_i B_i A_i with weights α_i and inputs X_i [K, rows]:

    ΔW = argmin F,   F(ΔW) = Σ_i ‖(α_i ΔW_i − ΔW) X_i‖²,   ΔW = Σ_i α_i ΔW_i G_i G⁺,   G_i = X_i X_iᵀ,  G =
    Σ_i G_i

whose rank is at most Σ r_i: the old B_i, and A_i G_i G⁺ in the place of A_i. Only G [K,K] and A_i G_i [r_i,K]
are summed up as the
inputs stream by; no activation is kept. The pseudo-inverse leaves what no input touches at zero, which is
where an optimiser that
starts from the base weights leaves it.

Source: Mix-of-Show (Gu et al., NeurIPS 2023), section on gradient fusion, which minimises F by LBFGS; the
closed form is ours.
"""

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


@dataclass(frozen=True)
class Solved:
    """One layer fused.

    Attributes:
        factor: The fused expert.
        base: F(0).
        by_weights: F of weight fusion, Σ α_i/n ΔW_i.
        fused: F of the result.
        directions: How many of K directions the inputs reach beyond the cut-off.
        condition: Largest ÷ smallest eigenvalue among them.
    """

    factor: LowRank
    base: float
    by_weights: float
    fused: float
    directions: int
    condition: float


def fuse_layer(
    factors: Mapping[str, LowRank],
    sums: Sums,
    weights: Mapping[str, float] | None = None,
    *,
    cutoff: float = 1e-12,
    ridge: float = 0.0,
) -> Solved:
    """The closed form of gradient fusion for one layer.

    An expert without inputs here adds nothing to F, so none of it remains. A layer without any inputs comes
    out as weight fusion.

    Args:
        factors: Expert -> its factors here.
        sums: The inputs' sums.
        weights: Expert -> α_i, 1 where there is none.
        cutoff: Eigenvalues of G below cutoff · the largest count as zero, in [0, 1); 1e-12 keeps float64's
            digits and drops its rounding.
        ridge: Instead of a sharp cut: (G + ridge · mean eigenvalue · I)⁻¹.

    Raises:
        MoleValueError: A cutoff or ridge out of its range.
    """
    if not (0 <= cutoff < 1) or ridge < 0:
        raise MoleValueError("fuse", expected="0 <= cutoff < 1 and ridge >= 0", got=f"{cutoff} and {ridge}")
    alpha = {name: float((weights or {}).get(name, 1.0)) for name in factors}
    averaged = fused_by_weights(factors, alpha)
    K = sums.gram.shape[0]
    if not any(sums.rows.values()):
        return Solved(averaged, 0.0, 0.0, 0.0, 0, 1.0)
    values, vectors = _directions(sums)
    counted = values > max(cutoff, torch.finfo(torch.float64).eps * K) * values[-1].clamp_min(0)
    inverse = (
        1 / (values + ridge * sums.gram.diagonal().mean())
        if ridge
        else torch.where(counted, 1 / values.where(counted, values.new_ones(())), 0)
    )
    downs, ups = [], []
    for name, factor in factors.items():
        cross = sums.cross.get(name)
        if cross is None:
            continue
        downs.append(((cross @ vectors) * inverse @ vectors.mT) * (alpha[name] * factor.scale))
        ups.append(factor.up.detach().to(sums.gram))
    dtype = next(iter(factors.values())).down.dtype
    down, up = torch.cat(downs), torch.cat(ups, 1)
    factor_out = LowRank(down.to(dtype), up.to(dtype), 1.0, next(iter(factors.values())).conv)
    base, by_weights, fused = (
        objective(factors, sums, alpha, delta) for delta in (None, averaged, LowRank(down, up))
    )
    reached = values[counted]
    spread = (reached[-1] / reached[0]).item() if len(reached) else 1.0
    return Solved(factor_out, base, by_weights, fused, int(counted.sum()), spread)


def _directions(sums: Sums) -> tuple[Tensor, Tensor]:
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


def fuse_by_lbfgs(
    factors: Mapping[str, LowRank],
    sums: Sums,
    weights: Mapping[str, float],
    steps: int = 500,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """ΔW [N,K] by LBFGS from 0 with the paper's settings (rate 1, history 25, strong Wolfe, tolerances
    1e-16): the slow way, to compare.

    In float32 as the paper's code; its data are the sums here, which is the same objective at a fraction of
    its cost.
    """
    like = sums.gram
    target = sum(
        (weights[name] * f.scale) * (f.up.detach().to(like) @ sums.cross[name])
        for name, f in factors.items()
        if name in sums.cross
    )
    assert isinstance(target, Tensor)
    gram, target = like.to(dtype), target.to(dtype)
    delta = torch.zeros_like(target, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [delta],
        lr=1,
        max_iter=steps,
        max_eval=10 * steps,
        tolerance_grad=1e-16,
        tolerance_change=1e-16,
        history_size=25,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        product = delta.detach() @ gram
        delta.grad = 2 * (product - target)
        return ((product - 2 * target) * delta.detach()).sum()

    optimiser.step(closure)  # type: ignore[arg-type]
    return delta.detach()
