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

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError
from mole_kernels.experts.fuse_sums import Sums, fused_by_weights, objective
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.experts.ridge import RidgePath, Towards

__all__ = ["Objectives", "Solved", "Sums", "fuse_by_lbfgs", "fuse_layer", "fused_by_weights", "objective"]


@dataclass(frozen=True)
class Objectives:
    """F of four solutions on one set of inputs.

    Attributes:
        base: F(0).
        by_weights: Of weight fusion, Σ α_i/n ΔW_i.
        gradient: Of the closed form without a ridge, the paper's optimum on the fitted inputs.
        fused: Of the result.
    """

    base: float
    by_weights: float
    gradient: float
    fused: float


@dataclass(frozen=True)
class Solved:
    """One layer fused.

    Attributes:
        factor: The fused expert.
        base: F(0) on the fitted inputs.
        by_weights: F of weight fusion there.
        fused: F of the result there.
        gradient: F of the closed form without a ridge there: the least that there is.
        directions: How many of K directions the inputs reach beyond the cut-off.
        condition: Largest ÷ smallest eigenvalue among them.
        ridge: ρ of the result; inf for weight fusion itself.
        towards: Where directions go of which the inputs say little.
        held: The four objectives on inputs that neither fitted nor chose; None without any.
        seconds: From the sums to the factor; the objectives are not in it.
    """

    factor: LowRank
    base: float
    by_weights: float
    fused: float
    directions: int
    condition: float
    ridge: float = 0.0
    towards: Towards = "base"
    held: Objectives | None = None
    gradient: float = 0.0
    seconds: float = 0.0


def fuse_layer(
    factors: Mapping[str, LowRank],
    sums: Sums,
    weights: Mapping[str, float] | None = None,
    *,
    cutoff: float = 1e-12,
    ridge: float = 0.0,
    towards: Towards = "base",
    choose: Sums | None = None,
    held: Sums | None = None,
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
        towards: "base" or "weights": see `experts.ridge`.
        choose: Sums over other inputs; given, they choose ridge and towards, then both are fitted.
        held: Sums over inputs that the result is judged on.

    Raises:
        MoleValueError: A cutoff or ridge out of its range.
    """
    if not (0 <= cutoff < 1) or not (0 <= ridge < math.inf):
        raise MoleValueError("fuse", expected="0 <= cutoff < 1 and ridge >= 0", got=f"{cutoff} and {ridge}")
    alpha = {name: float((weights or {}).get(name, 1.0)) for name in factors}
    if not any(sums.rows.values()):
        return Solved(fused_by_weights(factors, alpha), 0.0, 0.0, 0.0, 0, 1.0, math.inf, "weights")
    begun = time.perf_counter()
    path = RidgePath(factors, sums, alpha, cutoff)
    if choose is not None and any(choose.rows.values()):
        choice = path.choose(choose)
        ridge, towards = choice.ridge, choice.towards
        # what has chosen is fitted too: more inputs are worth more than a second solution costs
        result = path.again(sums.plus(choose), choice)
    else:
        result = path.at(ridge, towards)
    dtype = next(iter(factors.values())).down.dtype
    factor_out = LowRank(result.down.to(dtype), result.up.to(dtype), 1.0, result.conv)
    seconds = time.perf_counter() - begun

    plain = path.at(0.0) if ridge or choose is not None else result

    def values(on: Sums) -> Objectives:
        deltas = (None, path.averaged, plain, result)
        return Objectives(*(objective(factors, on, alpha, delta) for delta in deltas))

    here = values(sums)
    reached = path.values[path.counted]
    return Solved(
        factor_out,
        here.base,
        here.by_weights,
        here.fused,
        len(reached),
        (reached[-1] / reached[0]).item() if len(reached) else 1.0,
        ridge,
        towards,
        values(held) if held is not None and any(held.rows.values()) else None,
        here.gradient,
        seconds,
    )


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
