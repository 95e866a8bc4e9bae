"""Gradient fusion against LBFGS, a dense least-squares solution, and its own promises."""

from __future__ import annotations

import pytest
import torch

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.fuse import Sums, fuse_by_lbfgs, fuse_layer, fused_by_weights, objective
from mole_kernels.experts.lowrank import LowRank

CASES = {"fewer rows than K": (3, 24, 6), "more rows than K": (40, 16, 12), "one row": (1, 8, 8)}


def problem(rows: int, K: int, N: int, ranks=(2, 3), seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    factors = {f"c{i}": LowRank(draw(r, K), draw(N, r), 0.5 + i) for i, r in enumerate(ranks)}
    inputs = {name: draw(rows, K) for name in factors}
    sums = Sums.of(K)
    for name, x in inputs.items():
        sums.add(name, factors[name], x)
    return factors, inputs, sums, {name: 0.7 + 0.2 * i for i, name in enumerate(factors)}


def by_hand(factors, inputs, weights, delta) -> float:
    return sum(
        ((weights[n] * f.delta(torch.float64) - delta) @ inputs[n].mT).square().sum().item()
        for n, f in factors.items()
    )


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_the_least_squares_solution_of_least_change(case):
    factors, inputs, sums, weights = problem(*CASES[case])
    solved = fuse_layer(factors, sums, weights)
    X = torch.cat(list(inputs.values())).mT
    Y = torch.cat([weights[n] * f.delta(torch.float64) @ inputs[n].mT for n, f in factors.items()], 1)
    want = Y @ torch.linalg.pinv(X, rcond=1e-9)
    torch.testing.assert_close(solved.factor.delta(torch.float64), want, rtol=1e-6, atol=1e-8)
    assert solved.factor.rank == 5
    # what no input touches stays zero
    outside = torch.linalg.svd(X, full_matrices=True).U[:, torch.linalg.matrix_rank(X) :]
    assert (solved.factor.delta(torch.float64) @ outside).norm() <= 1e-7 * want.norm()


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_five_hundred_steps_of_lbfgs_nor_weight_fusion(case):
    factors, inputs, sums, weights = problem(*CASES[case])
    solved = fuse_layer(factors, sums, weights)
    for dtype in (torch.float32, torch.float64):
        slow = by_hand(factors, inputs, weights, fuse_by_lbfgs(factors, sums, weights, 500, dtype).double())
        assert solved.fused <= slow * (1 + 1e-9) + 1e-9 * solved.base
    assert solved.fused <= solved.by_weights <= solved.base * 4 and solved.by_weights > 1e-3 * solved.base


@pytest.mark.parametrize("case", CASES)
def test_the_objective_from_the_sums_is_that_from_the_inputs(case):
    factors, inputs, sums, weights = problem(*CASES[case])
    solved = fuse_layer(factors, sums, weights)
    averaged = fused_by_weights(factors, weights)
    wanted = sum(weights[n] * f.delta(torch.float64) for n, f in factors.items()) / len(factors)
    torch.testing.assert_close(averaged.delta(torch.float64), wanted)
    for got, delta in (
        (solved.base, 0.0),
        (solved.by_weights, averaged.delta(torch.float64)),
        (solved.fused, solved.factor.delta(torch.float64)),
    ):
        want = by_hand(factors, inputs, weights, delta)
        assert got == pytest.approx(want, rel=1e-8, abs=1e-9 * solved.base)
    assert objective(factors, sums, weights, solved.factor) == pytest.approx(
        solved.fused, abs=1e-9 * solved.base
    )


def test_one_concept_keeps_its_delta_on_its_inputs_and_the_base_elsewhere():
    factors, inputs, sums, _ = problem(3, 10, 6, ranks=(4,))
    delta = fuse_layer(factors, sums).factor.delta(torch.float64)
    x = inputs["c0"].mT
    torch.testing.assert_close(delta @ x, factors["c0"].delta(torch.float64) @ x, rtol=1e-7, atol=1e-8)
    v = torch.linalg.svd(x, full_matrices=True).U[:, 3:]
    assert (delta @ v).abs().max() < 1e-8


def test_concepts_with_orthogonal_inputs_lose_nothing():
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    factors = {
        f"c{i}": LowRank(torch.randn(2, 12, generator=g).double(), torch.randn(5, 2, generator=g).double())
        for i in range(3)
    }
    sums = Sums.of(12)
    for i, (name, factor) in enumerate(factors.items()):
        sums.add(name, factor, torch.randn(20, 4, generator=g).double() @ Q[:, 4 * i : 4 * i + 4].mT)
    solved = fuse_layer(factors, sums)
    assert solved.fused <= 1e-12 * solved.base and solved.by_weights > 0.1 * solved.base


def test_any_split_of_the_inputs_gives_the_same():
    factors, inputs, whole, weights = problem(40, 16, 12)
    pieces = Sums.of(16)
    for start in (0, 1, 8, 9, 33):
        for name, x in inputs.items():
            end = {0: 1, 1: 8, 8: 9, 9: 33, 33: 40}[start]
            pieces.add(name, factors[name], x[start:end].reshape(1, -1, 16))
    assert pieces.rows == whole.rows == {"c0": 40, "c1": 40}
    torch.testing.assert_close(pieces.gram, whole.gram, rtol=1e-13, atol=1e-12)
    a, b = (fuse_layer(factors, s, weights).factor.delta(torch.float64) for s in (pieces, whole))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_singular_inputs_are_cut_off_and_counted():
    factors, _, _, weights = problem(4, 8, 6)
    x = torch.zeros(5, 8, dtype=torch.float64)
    x[:, 0], x[:, 1] = 1, torch.arange(5)
    sums = Sums.of(8)
    for name, factor in factors.items():
        sums.add(name, factor, x)
    solved = fuse_layer(factors, sums, weights)
    assert solved.directions == 2 and solved.condition > 1 and torch.isfinite(solved.factor.down).all()
    soft = fuse_layer(factors, sums, weights, ridge=1e-3)
    # both experts have the same inputs here, so that their mean is the best there is
    assert (
        solved.fused == pytest.approx(solved.by_weights) and solved.fused < soft.fused < 1.001 * solved.fused
    )


def test_an_expert_without_inputs_adds_nothing_and_no_inputs_at_all_is_weight_fusion():
    factors, inputs, _, weights = problem(40, 16, 12)
    sums = Sums.of(16)
    none = fuse_layer(factors, sums, weights)
    assert torch.equal(
        none.factor.delta(torch.float64), fused_by_weights(factors, weights).delta(torch.float64)
    )
    sums.add("c0", factors["c0"], inputs["c0"])
    one = fuse_layer(factors, sums, weights)
    torch.testing.assert_close(
        one.factor.delta(torch.float64),
        weights["c0"] * factors["c0"].delta(torch.float64),
        rtol=1e-7,
        atol=1e-8,
    )


def test_bad_inputs_are_named_and_add_nothing():
    factors, inputs, sums, _ = problem(4, 8, 6)
    before = sums.gram.clone()
    bad = inputs["c0"].clone()
    bad[2, 3] = torch.inf
    with pytest.raises(MoleValueError, match="expert 'c0': expected finite inputs"):
        sums.add("c0", factors["c0"], bad)
    with pytest.raises(MoleShapeError, match=r"inputs \[\.\.\.,8\]"):
        sums.add("c0", factors["c0"], bad[:, 1:])
    with pytest.raises(MoleValueError, match="0 <= cutoff < 1"):
        fuse_layer(factors, sums, cutoff=1.0)
    assert torch.equal(sums.gram, before)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_few_inputs_are_solved_from_themselves_to_the_same_end(ridge):
    factors, _, sums, weights = problem(3, 24, 6)
    assert sums.few is not None and sums.few.shape == (6, 24)
    got = fuse_layer(factors, sums, weights, ridge=ridge)
    sums.few = None
    want = fuse_layer(factors, sums, weights, ridge=ridge)
    torch.testing.assert_close(
        got.factor.delta(torch.float64), want.factor.delta(torch.float64), rtol=1e-7, atol=1e-9
    )
    assert (got.directions, got.base) == (want.directions, want.base) and got.condition == pytest.approx(
        want.condition, rel=1e-6
    )


def test_few_inputs_are_kept_up_to_a_quarter_of_k():
    sums = Sums.of(24)
    factor = LowRank(torch.ones(1, 24), torch.ones(2, 1))
    sums.add("a", factor, torch.randn(6, 24))
    assert sums.few is not None and len(sums.few) == 6
    sums.add("a", factor, torch.randn(1, 24))
    assert sums.few is None
    sums.add("a", factor, torch.randn(1, 24))
    assert sums.few is None and sums.rows == {"a": 8}
