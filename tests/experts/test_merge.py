"""Merging: PEFT's results on the same files, SELMA's criteria, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.merge import MODES, merge
from mole_kernels.experts.merge_modes import DENSITY_MODES, FACTOR_MODES
from mole_kernels.io.experts import load_expert
from mole_kernels.io.merge import merge_files
from mole_kernels.io.save import save_expert
from tests.experts.conftest import LAYERS, deltas, peft_merge, small_expert

OURS = ("delta_mean", "factor_mean")


def close(found: dict, truth: dict, rtol: float = 1e-5) -> None:
    assert list(found) == list(truth)
    for path, value in truth.items():
        assert (found[path] - value).norm() <= rtol * value.norm(), path


def arguments(mode: str) -> dict:
    return {"density": 0.4} if mode in DENSITY_MODES else {}


@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (0.9, -0.4, 0.2)], ids=["positive", "negative"])
@pytest.mark.parametrize("without", [(), ("inner.second",)], ids=["all", "missing"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in OURS])
def test_as_peft_merges_the_same_files(mode: str, without: tuple, weights: tuple, tmp_path: Path):
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    # PEFT's svd modes squeeze a convolution's ΔW, so N and K must not be 1; its factor modes ask for one rank
    ranks = (3, 3, 3) if mode in FACTOR_MODES else (2, 4, 3)
    for i, file in enumerate(files):
        save_expert(small_expert(i, ranks[i], (0.5, 0.25, -0.5)[i], without=without if i == 1 else ()), file)
    peft = {"density": 0.4} if mode in DENSITY_MODES else {}
    truth = peft_merge(files, weights, mode, seed=7, **peft)
    merge_files(files, tmp_path / "out.safetensors", weights, mode, seed=7, **peft)
    close(deltas(load_expert(tmp_path / "out.safetensors")), truth)


@pytest.mark.parametrize("mode", ["ties", "dare_ties", "ties_svd"])
def test_sign_elected_by_frequency_as_peft(mode: str, tmp_path: Path):
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for i, file in enumerate(files):
        save_expert(small_expert(i), file)
    how = {"density": 0.6, "majority_sign_method": "frequency"}
    truth = peft_merge(files, (1.0, 0.5, 0.7), mode, seed=3, **how)
    merge_files(files, tmp_path / "out.safetensors", (1.0, 0.5, 0.7), mode, seed=3, **how)
    found = deltas(load_expert(tmp_path / "out.safetensors"))
    close(found, truth)
    other = deltas(
        merge(
            {str(i): load_expert(file) for i, file in enumerate(files)},
            (1.0, 0.5, 0.7),
            mode,
            density=0.6,
            seed=3,
        )
    )
    assert any(not torch.allclose(other[path], found[path]) for path in LAYERS)


@settings(deadline=None, max_examples=25)
@given(
    T=st.integers(1, 7),
    mode=st.sampled_from(["delta_mean", "cat"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_weights_are_exactly_one_over_T(T: int, mode: str, dtype: torch.dtype):
    """SELMA's criteria 1 and 3: the sum of deltas with 1/T, whatever the experts are called."""
    experts = {f"stabilityai/stable-diffusion-{'x' * i}": small_expert(i, 1, dtype=dtype) for i in range(T)}
    merged = merge({name.replace(".", "_"): expert for name, expert in experts.items()}, mode=mode)
    for path, layer in merged.layers.items():
        truth = sum(expert.layers[path].delta(torch.float64) for expert in experts.values()) / T
        # equal weights leave every factor's bits alone, unless the rank has to come down
        rtol = (
            1e-15 if min(LAYERS[path][:2]) >= T or mode == "cat" else 1e-6 if dtype == torch.float32 else 1e-3
        )
        assert (layer.delta(torch.float64) - truth).norm() <= rtol * truth.norm()
        assert layer.conv == LAYERS[path][2] and layer.up.dtype == dtype
        assert layer.rank == (T if mode == "cat" else min(T, *LAYERS[path][:2]))


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("dare")])
def test_identical_experts_give_that_expert(mode: str):
    one = small_expert(0)
    merged = merge(
        dict.fromkeys("abcd", one), mode=mode, **({"density": 1.0} if mode in DENSITY_MODES else {})
    )
    truth = deltas(one)
    # PEFT's rules on A and B add √(1/4) four times in each; its ties is a mean, of values that already carry
    # their weight
    times = {"linear": 4, "magnitude_prune": 4, "ties": 1 / 4, "ties_svd": 1 / 4}.get(mode, 1)
    close(deltas(merged), {path: times * value for path, value in truth.items()})


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("dare")])
def test_order_of_experts_is_of_no_account(mode: str):
    experts = {name: small_expert(i, scale=0.5 - i / 4) for i, name in enumerate("abc")}
    weights = {"a": 0.7, "b": -0.2, "c": 0.4}
    there = merge(experts, weights, mode, **arguments(mode))
    back = merge(dict(reversed(experts.items())), weights, mode, **arguments(mode))
    close(deltas(there), {path: deltas(back)[path] for path in LAYERS})


@pytest.mark.parametrize("mode", ["delta_mean", "cat", "svd"])
def test_missing_layer_counts_as_zero(mode: str):
    experts = {"a": small_expert(0), "b": small_expert(1, without=["mix"])}
    found = deltas(merge(experts, mode=mode))
    truth = experts["a"].layers["mix"].delta(torch.float64) / 2
    assert torch.allclose(found["mix"], truth, rtol=1e-5, atol=1e-7)


def test_unequal_ranks_where_the_mode_allows():
    experts = {"a": small_expert(0, 2), "b": small_expert(1, 4)}
    for mode in MODES:
        if mode in FACTOR_MODES:
            with pytest.raises(
                MoleShapeError, match=r"layer first: expected experts of one rank, got a 2, b 4"
            ):
                merge(experts, mode=mode, **arguments(mode))
        else:
            rank = {"cat": 6, "delta_mean": 6}.get(mode, 4)
            assert merge(experts, mode=mode, **arguments(mode)).layers["first"].rank == rank


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_zero_give_zero(mode: str):
    merged = merge({"a": small_expert(0), "b": small_expert(1)}, [0.0, -0.0], mode, **arguments(mode))
    assert list(merged.layers) == list(LAYERS) and not any(value.any() for value in deltas(merged).values())


def test_factor_mean_has_cross_terms():
    experts = {"a": small_expert(0), "b": small_expert(1, scale=-0.25)}
    a, b = (expert.layers["first"] for expert in experts.values())
    up = (a.up.double() * 0.5**0.5 - b.up.double() * 0.5) / 2
    down = (a.down.double() * 0.5**0.5 + b.down.double() * 0.5) / 2
    close(
        {"first": merge(experts, mode="factor_mean").layers["first"].delta(torch.float64)},
        {"first": up @ down},
    )


def test_svd_is_the_best_of_its_rank():
    experts = {"a": small_expert(0), "b": small_expert(1)}
    whole = deltas(merge(experts))["first"]
    found = merge(experts, mode="svd", rank=2).layers["first"]
    left_out = torch.linalg.svdvals(whole)[2:].norm()
    assert found.rank == 2
    assert (found.delta(torch.float64) - whole).norm() == pytest.approx(left_out.item(), rel=1e-4)


def test_spellings_of_a_layer_meet():
    layer = small_expert(0).layers["inner.second"]
    merged = merge({"kohya": Expert({"inner_second": layer}), "dotted": Expert({"inner.second": layer})})
    assert list(merged.layers) == ["inner.second"]
    close(deltas(merged), {"inner.second": layer.delta(torch.float64)})


def test_bank_and_dtype():
    bank = ExpertBank({"a": small_expert(0, dtype=torch.float16), "b": small_expert(1, dtype=torch.bfloat16)})
    assert merge(bank).layers["mix"].up.dtype == torch.float32
    assert merge(bank, dtype=torch.bfloat16).layers["mix"].up.dtype == torch.bfloat16
    big = Expert({"first": LowRank(torch.full((1, 2), 300.0), torch.full((2, 1), 300.0), 1e6)})
    with pytest.raises(MoleValueError, match=r"overflows in torch\.float16"):
        merge({"a": big}, mode="linear", dtype=torch.float16)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        (
            {"mode": "average"},
            MoleValueError,
            "expected one of delta_mean, factor_mean, cat, svd, linear, ties, dare_linear",
        ),
        ({"mode": "ties"}, MoleValueError, r"density in \(0, 1\], got none"),
        ({"mode": "ties", "density": 0.0}, MoleValueError, r"\(0, 1\], got 0.0"),
        ({"mode": "ties", "density": 1.5}, MoleValueError, r"\(0, 1\], got 1.5"),
        ({"mode": "ties", "density": -0.5}, MoleValueError, r"\(0, 1\]"),
        ({"mode": "dare_ties", "density": float("nan")}, MoleValueError, r"\(0, 1\], got nan"),
        ({"mode": "cat", "density": 0.5}, MoleValueError, "cat does not prune"),
        (
            {"mode": "ties", "density": 0.5, "majority_sign_method": "median"},
            MoleValueError,
            "'total' or 'frequency'",
        ),
        ({"mode": "svd", "rank": 0}, MoleValueError, "whole number >= 1"),
        ({"mode": "cat", "rank": 4}, MoleValueError, "cat sets its rank itself"),
        ({"weights": [0.5]}, MoleValueError, "expected 2 numbers, in the order a, b, got 1"),
        ({"weights": {"a": 0.5, "c": 0.5}}, MoleValueError, "one for each of a, b"),
        ({"weights": [0.5, float("inf")]}, MoleValueError, "weight of b: expected a finite number"),
        ({"weights": [0.5, "1"]}, MoleTypeError, "weight of b: expected a number, got str"),
    ],
    ids=str,
)
def test_arguments_refused(how: dict, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        merge({"a": small_expert(0), "b": small_expert(1)}, **how)


def test_no_expert_and_no_layer():
    with pytest.raises(MoleValueError, match="at least one expert"):
        merge({})
    with pytest.raises(MoleValueError, match="at least one layer"):
        merge({"a": Expert({})})


def test_experts_of_different_bases_name_the_layers():
    other = Expert(
        {path: LowRank(layer.down, layer.up[:-1]) for path, layer in small_expert(1).layers.items()}
    )
    with pytest.raises(
        MoleShapeError, match=r"3 of 3 layers .* first \(a 10x6, b 9x6\), inner.second \(a 5x10, b 4x10\)"
    ) as caught:
        merge({"a": small_expert(0), "b": other})
    assert "one base model" in str(caught.value)
