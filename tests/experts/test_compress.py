"""Compression: the best of its rank, bounds that hold, ranks that the targets ask for, and what is
refused.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.compress import CompressionTarget, compress, compress_layer
from mole_kernels.experts.compress_report import Predicted, predicted_us
from mole_kernels.experts.compress_spectrum import layer_spectra, layer_spectrum, to_json
from mole_kernels.experts.compress_svd import difference, singular_values, svd, truncate
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.merge import merge
from tests.experts.conftest import LAYERS, small_expert

sizes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 30))


def decaying(
    N: int = 40,
    K: int = 30,
    R: int = 16,
    seed: int = 0,
    scale: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    root = 0.6 ** torch.arange(R)
    down, up = torch.randn(R, K, generator=draw) * root[:, None], torch.randn(N, R, generator=draw)
    return LowRank(down.to(dtype), up.to(dtype), scale)


def dense_values(layer: LowRank) -> torch.Tensor:
    return torch.linalg.svdvals(layer.delta(torch.float64))


@settings(deadline=None, max_examples=40)
@given(size=sizes, scale=st.floats(-4, 4), seed=st.integers(0, 99))
def test_singular_values_without_delta(size: tuple[int, int, int], scale: float, seed: int):
    N, K, R = size
    layer = decaying(N, K, R, seed, scale)
    truth = dense_values(layer)[: min(N, K, R)]
    assert torch.allclose(singular_values(layer), truth, atol=1e-12 * max(truth[0].item(), 1e-300), rtol=1e-9)


@settings(deadline=None, max_examples=40)
@given(size=sizes, keep=st.integers(1, 30), seed=st.integers(0, 99))
def test_truncation_is_the_best_of_its_rank(size: tuple[int, int, int], keep: int, seed: int):
    N, K, R = size
    layer = decaying(N, K, R, seed)
    layer = LowRank(layer.down.double(), layer.up.double(), layer.scale)
    made, values = truncate(layer, keep), dense_values(layer)
    error = made.delta(torch.float64) - layer.delta(torch.float64)
    assert made.rank == min(keep, N, K, R)
    assert error.norm() == pytest.approx(
        values[made.rank :].norm().item(), rel=1e-6, abs=1e-12 * values[0].item()
    )
    assert torch.equal(
        difference(layer, made).delta(torch.float64).isfinite(), torch.ones(N, K, dtype=torch.bool)
    )
    apart = singular_values(difference(layer, made))
    assert apart.norm() == pytest.approx(error.norm().item(), rel=1e-6, abs=1e-12 * values[0].item())


def test_svd_parts_are_orthonormal():
    left, values, right = svd(decaying())
    eye = torch.eye(len(values))
    assert torch.allclose(left.mT @ left, eye, atol=1e-5) and torch.allclose(right.mT @ right, eye, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "how", [{"rank": 5}, {"rank": 15}, {"energy": 0.9}, {"energy": 0.9999}, {"max_error": 0.1}], ids=str
)
def test_measured_errors_are_true_and_within_the_bounds(how: dict, dtype: torch.dtype):
    layers = {
        "a": decaying(dtype=dtype),
        "b": decaying(12, 60, 16, 1, -2.0, dtype),
        "c": decaying(20, 6, 16, 2, dtype=dtype),
    }
    (made, report) = compress(Expert(layers), **how)
    for found in report.layers:
        before, after = layers[found.path], made.layers[found.path]
        error = torch.linalg.svdvals(before.delta(torch.float64) - after.delta(torch.float64))
        values = dense_values(before)
        assert after.up.dtype == dtype and after.rank == found.rank_after <= min(
            before.rank, *before.delta().shape
        )
        assert found.error_frobenius == pytest.approx(
            error.norm().item(), rel=1e-6, abs=1e-13 * values[0].item()
        )
        assert found.error_spectral == pytest.approx(error[0].item(), rel=1e-6, abs=1e-13 * values[0].item())
        assert found.error_frobenius <= found.bound_frobenius and found.error_spectral <= found.bound_spectral
        # not a bound that holds whatever happens: the singular values left out, and 16 bits' rounding
        slack = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(dtype, 1e-4) * values[0].item()
        assert found.bound_spectral <= values[after.rank :].norm().item() + slack
        assert found.frobenius == pytest.approx(values.norm().item(), rel=1e-3)
        assert found.spectral == pytest.approx(values[0].item(), rel=1e-3)


@settings(deadline=None, max_examples=40)
@given(energy=st.floats(0.01, 0.99999), seed=st.integers(0, 99))
def test_energy_is_kept_by_the_smallest_rank(energy: float, seed: int):
    layer = decaying(seed=seed)
    made, _ = compress_layer("a", layer, CompressionTarget(energy=energy))
    squares = dense_values(layer).square()
    part = squares.cumsum(0) / squares.sum()
    assert part[made.rank - 1] >= energy - 1e-6
    assert made.rank == 1 or part[made.rank - 2] < energy + 1e-6


@settings(deadline=None, max_examples=40)
@given(
    limit=st.floats(0.01, 0.9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_max_error_holds_as_stored(limit: float, seed: int, dtype: torch.dtype):
    layer = decaying(seed=seed, dtype=dtype)
    try:
        made, _ = compress_layer("a", layer, CompressionTarget(max_error=limit))
    except MoleValueError as error:
        # eight bits of bfloat16 cannot hold one percent at every rank: then it says so
        assert dtype == torch.bfloat16 and limit < 0.03 and "give a wider dtype" in str(error)
        return
    values = dense_values(layer)
    measured = torch.linalg.matrix_norm(made.delta(torch.float64) - layer.delta(torch.float64), 2).item()
    assert measured <= limit * values[0].item() * (1 + 1e-9)
    if dtype == torch.float32 and made.rank > 1:
        assert values[made.rank - 1] > limit * values[0] * (1 - 1e-4)


def test_what_needs_no_truncation_keeps_its_bits():
    layer = decaying(dtype=torch.float16)
    for how in (CompressionTarget(rank=16), CompressionTarget(rank=100), CompressionTarget(max_error=0.0)):
        made, report = compress_layer("a", layer, how)
        assert torch.equal(made.down, layer.down) and torch.equal(made.up, layer.up)
        assert (
            report.error_frobenius
            == report.bound_frobenius
            == report.error_spectral
            == report.bound_spectral
            == 0.0
        )


def test_merged_twins_come_back_to_one():
    """cat of T identical experts has T times the rank and the spectrum of one: energy finds that."""
    one = small_expert(0)
    merged = merge(dict.fromkeys("abc", one), mode="cat")
    made, _ = compress(merged, energy=1 - 1e-9)
    for path, (n, k, conv) in LAYERS.items():
        assert made.layers[path].rank == min(3, n, k) and made.layers[path].conv == conv
        assert torch.allclose(made.layers[path].delta(), one.layers[path].delta(), atol=1e-6)


def test_dtype_and_zero_expert():
    layer = decaying(dtype=torch.float16)
    assert compress_layer("a", layer, CompressionTarget(rank=4), torch.float32)[0].up.dtype == torch.float32
    nothing = LowRank(torch.randn(4, 6), torch.zeros(5, 4))
    for how in (CompressionTarget(energy=0.9), CompressionTarget(max_error=0.1), CompressionTarget(rank=2)):
        made, report = compress_layer("a", nothing, how)
        assert made.rank == (2 if how.rank else 1) and not made.delta().any() and report.error_spectral == 0.0
    off = LowRank(layer.down, layer.up, 0.0)
    assert compress_layer("a", off, CompressionTarget(energy=0.9))[0].scale == 0.0


def test_a_bank_and_its_reports():
    bank = ExpertBank({"a": Expert({"x": decaying()}), "b": Expert({"x": decaying(seed=1)})})
    made, reports = compress(bank, rank=3)
    assert made.names == ("a", "b") and list(reports) == ["a", "b"]
    assert all(expert.layers["x"].rank == 3 for expert in made.experts.values())
    said = json.loads(reports["a"].to_json())
    assert said["layers"][0]["path"] == "x" and said["predicted_for"] == {
        "device": "h200",
        "tokens": 4096,
        "dtype": "bfloat16",
    }
    assert said["total"]["parameters_before"] == 16 * 70 and said["total"]["parameters_after"] == 3 * 70
    one = reports["a"].layers[0]
    assert said["total"]["relative_error_frobenius"] == pytest.approx(one.error_frobenius / one.frobenius)
    assert (one.flops_before, one.flops_after) == (2 * 16 * 70, 2 * 3 * 70)


def test_predictions_are_the_dispatchers():
    wide, narrow = (predicted_us(1280, 1280, rank, Predicted()) for rank in (512, 16))
    assert narrow < wide
    assert predicted_us(1280, 1280, 64, Predicted("a100")) > predicted_us(1280, 1280, 64, Predicted("h200"))
    assert predicted_us(1280, 1280, 64, Predicted(tokens=1024)) < predicted_us(1280, 1280, 64, Predicted())


def test_spectrum_is_what_a_plot_needs():
    layer = decaying()
    found = layer_spectrum("a", layer)
    values = dense_values(layer)[:16]
    assert found.values == pytest.approx(values.tolist(), rel=1e-6)
    squares = values.square()
    for rank, energy in zip(found.ranks, (0.9, 0.99, 0.999)):
        assert squares[:rank].sum() >= energy * squares.sum() > squares[: rank - 1].sum()
    share = (squares / squares.sum()).tolist()
    assert found.effective == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-6)
    flat = LowRank(torch.eye(8, 20), torch.eye(30, 8))
    assert layer_spectrum("flat", flat).effective == pytest.approx(8) and layer_spectrum(
        "flat", flat
    ).ranks == (8, 8, 8)
    assert layer_spectrum("zero", LowRank(torch.zeros(2, 3), torch.zeros(3, 2))).effective == 0.0
    said = json.loads(to_json(layer_spectra({"a": layer, "flat": flat})))
    assert [one["path"] for one in said["layers"]] == ["a", "flat"] and said["layers"][1]["values"] == [
        1.0
    ] * 8


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "exactly one of rank, energy and max_error, got none"),
        ({"rank": 4, "energy": 0.9}, "exactly one of rank, energy and max_error, got rank, energy"),
        ({"rank": 0}, "whole number >= 1, got 0"),
        ({"rank": 2.5}, "whole number >= 1"),
        ({"energy": 0.0}, r"\(0, 1\], got 0.0"),
        ({"energy": 1.1}, r"\(0, 1\], got 1.1"),
        ({"energy": float("nan")}, r"\(0, 1\], got nan"),
        ({"max_error": 1.0}, r"\[0, 1\), got 1.0"),
        ({"max_error": -0.1}, r"\[0, 1\), got -0.1"),
        ({"max_error": "0.1"}, r"\[0, 1\), got 0.1"),
    ],
    ids=str,
)
def test_arguments_refused(how: dict, words: str):
    with pytest.raises(MoleValueError, match=words):
        compress(small_expert(0), **how)


def test_other_refusals():
    with pytest.raises(MoleTypeError, match="an Expert or an ExpertBank, got dict"):
        compress({}, rank=1)  # type: ignore[arg-type]
    with pytest.raises(MoleValueError, match=r"one of h200, h100"):
        Predicted("abacus")
    with pytest.raises(MoleValueError, match="tokens"):
        Predicted(tokens=0)
    with pytest.raises(
        MoleValueError,
        match=r"layer a: expected a relative spectral error of at most 1e-06, got .* stored in bfloat16",
    ):
        compress_layer("a", decaying(12, 9, 16), CompressionTarget(max_error=1e-6), torch.bfloat16)
