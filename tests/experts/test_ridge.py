"""Gradient fusion with a ridge: every solution against its dense form, and the choice on inputs not fitted."""

from __future__ import annotations

import math

import pytest
import torch

from mole_kernels.errors import MoleValueError
from mole_kernels.experts.fuse import Sums, fuse_layer, fused_by_weights, objective
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.experts.ridge import RIDGES, SLACK, RidgeChoice, RidgePath


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts(K=12, N=7):
    return {f"c{i}": LowRank(draw(2 + i, K, seed=i), draw(N, 2 + i, seed=9 + i), 0.5 + i) for i in range(2)}


def summed(factors, inputs):
    sums = Sums.of(next(iter(factors.values())).in_features)
    for name, x in inputs.items():
        sums.add(name, factors[name], x)
    return sums


@pytest.mark.parametrize("rows", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("towards", ["base", "weights"])
def test_a_solution_is_the_least_squares_solution_with_its_ridge(towards, ridge, rows):
    factors, alpha = experts(), {"c0": 0.7, "c1": 1.2}
    inputs = {name: draw(rows, 12, seed=20 + i) for i, name in enumerate(factors)}
    path = RidgePath(factors, summed(factors, inputs), alpha)
    X = torch.cat(list(inputs.values())).mT
    Y = torch.cat([alpha[n] * f.delta(torch.float64) @ inputs[n].mT for n, f in factors.items()], 1)
    P = fused_by_weights(factors, alpha).delta(torch.float64) * (towards == "weights")
    gram = X @ X.mT
    rho = ridge * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    # the derivative of F + ρ m ‖ΔW − P‖² is zero
    want = torch.linalg.solve(gram + rho, (Y @ X.mT + P @ rho).mT).mT
    torch.testing.assert_close(path.at(ridge, towards).delta(torch.float64), want, rtol=1e-8, atol=1e-9)


def test_the_ends_are_gradient_fusion_weight_fusion_and_the_base():
    factors = experts()
    inputs = {name: draw(40, 12, seed=20 + i) for i, name in enumerate(factors)}
    sums = summed(factors, inputs)
    path, averaged = RidgePath(factors, sums), fused_by_weights(factors, dict.fromkeys(factors, 1.0))
    least = fuse_layer(factors, sums).factor.delta(torch.float64)
    for towards in ("base", "weights"):
        torch.testing.assert_close(path.at(0.0, towards).delta(torch.float64), least)
    torch.testing.assert_close(
        path.at(math.inf, "weights").delta(torch.float64), averaged.delta(torch.float64)
    )
    torch.testing.assert_close(
        path.at(1e12, "weights").delta(torch.float64), averaged.delta(torch.float64), rtol=1e-6, atol=1e-6
    )
    assert path.at(1e12, "base").delta().abs().max() < 1e-6
    for bad, towards in ((-1.0, "base"), (math.nan, "weights"), (math.inf, "base")):
        with pytest.raises(MoleValueError, match="ridge"):
            path.at(bad, towards)


def crowded(concept, seed):
    """24 rows in 20 directions of the concept's own, with noise of each run."""
    return draw(24, 20, seed=seed) @ draw(20, 64, seed=concept) + 2 * draw(24, 64, seed=seed + 1)


def test_the_choice_is_good_on_inputs_that_neither_fitted_nor_chose():
    factors = experts(64, 20)
    lots = {
        lot: summed(factors, {name: crowded(i, 100 * k + 10 * i) for i, name in enumerate(factors)})
        for k, lot in enumerate(("fit", "choose", "held"), 1)
    }
    alpha = dict.fromkeys(factors, 1.0)
    path = RidgePath(factors, lots["fit"], alpha)
    choice = path.choose(lots["choose"])
    tried = [
        objective(factors, lots["choose"], alpha, path.at(ridge, to))
        for ridge in RIDGES
        for to in ("base", "weights")
    ]
    by_weights = objective(factors, lots["choose"], alpha, path.averaged)
    assert choice.value <= min(*tried, by_weights) + SLACK * by_weights
    solved = fuse_layer(factors, lots["fit"], choose=lots["choose"], held=lots["held"])
    assert (solved.ridge, solved.towards) == (choice.ridge, choice.towards)
    assert solved.held is not None
    assert 0 < solved.held.fused < 0.7 * min(solved.held.by_weights, solved.held.gradient)
    assert solved.held.fused == pytest.approx(objective(factors, lots["held"], alpha, solved.factor))
    # the fitted objective tells the other way round
    assert solved.gradient < solved.fused < solved.by_weights


def test_a_layer_whose_other_inputs_are_unlike_the_fitted_ones_is_weight_fusion():
    factors = experts()
    fit = summed(factors, {name: draw(3, 12, seed=20 + i) * 5 for i, name in enumerate(factors)})
    # each concept's choosing inputs are the other's: what was fitted is wrong there
    other = summed(factors, {name: draw(3, 12, seed=21 - i) * 5 for i, name in enumerate(factors)})
    solved = fuse_layer(factors, fit, choose=other)
    assert solved.ridge == math.inf and solved.towards == "weights"
    want = fused_by_weights(factors, dict.fromkeys(factors, 1.0)).delta(torch.float64)
    torch.testing.assert_close(solved.factor.delta(torch.float64), want)


def test_sums_add_up_in_any_split():
    factors = experts()
    whole = {name: draw(10, 12, seed=20 + i) for i, name in enumerate(factors)}
    for at in (1, 5):
        one = summed(factors, {name: x[:at] for name, x in whole.items()})
        both = one.plus(summed(factors, {name: x[at:] for name, x in whole.items()}))
        want = summed(factors, whole)
        torch.testing.assert_close(both.gram, want.gram)
        assert both.rows == want.rows
        for name, cross in want.cross.items():
            torch.testing.assert_close(both.cross[name], cross)


@pytest.mark.parametrize("rows", [2, 40], ids=["few", "many"])
def test_all_ridges_at_once_are_the_objectives_of_the_solutions(rows):
    factors, alpha = experts(), {"c0": 0.7, "c1": 1.2}
    lots = [
        summed(factors, {name: draw(rows, 12, seed=20 + 7 * k + i) for i, name in enumerate(factors)})
        for k in range(2)
    ]
    path = RidgePath(factors, lots[0], alpha)
    for towards in ("base", "weights"):
        got = path.objectives(lots[1], (0.0, *RIDGES), towards)
        for value, ridge in zip(got.tolist(), (0.0, *RIDGES)):
            want = objective(factors, lots[1], alpha, path.at(ridge, towards))
            assert value == pytest.approx(want, rel=1e-8)
            again = path.again(lots[1], RidgeChoice(ridge, towards, 0.0)).delta(torch.float64)
            torch.testing.assert_close(
                again,
                RidgePath(factors, lots[1], alpha).at(ridge, towards).delta(torch.float64),
                rtol=1e-6,
                atol=1e-8,
            )
