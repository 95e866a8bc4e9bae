"""NaN, infinity, overflow and subnormal numbers: they go where the formula takes them, and nowhere else. See
docs/numerics.md.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.backends.select import BACKENDS
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts, Gates
from tests.truth import Case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ON_A_CPU = ("reference", "stacked", "cpu")
every = [pytest.mark.parametrize("dtype", DTYPES, ids=str), pytest.mark.parametrize("backend", ON_A_CPU)]


def run(call, backend):
    reason = BACKENDS[backend].reason_against(call.case.problem(call.x.dtype))
    if reason is not None:
        pytest.skip(reason)
    return gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend=backend)


def everywhere(test):
    for mark in every:
        test = mark(test)
    return test


def with_token(case, dtype, value):
    call = case.make(dtype)
    x = call.x.clone()
    x[0, 3, 5] = value
    return replace(call, x=x)


@everywhere
def test_a_nan_in_x_stays_in_its_row_or_with_pooled_gates_in_its_sample(backend, dtype):
    for gate in ("none", "local", "mask", "pooled", "softmax"):
        y = run(with_token(Case(T=20, ranks=(3, 20), gate=gate), dtype, float("nan")), backend)
        rows = torch.zeros(2, 20, dtype=torch.bool)
        rows[0] = gate == "pooled"
        rows[0, 3] = True
        assert torch.equal(y.isnan(), rows[..., None].expand(y.shape)), gate


@everywhere
def test_a_nan_in_the_low_rank_part_alone_reaches_y(backend, dtype):
    """In up, in down, in a given gate, in a scale: the base is finite everywhere."""
    case = Case(T=20, ranks=(3, 5), gate="mask")
    call = case.make(dtype)
    e, nan = call.experts, float("nan")
    up, down, gate, scale = e.up.clone(), e.down.clone(), call.gates.gate.clone(), e.scale.clone()
    up[0, 7, 4], down[0, 6, 2], gate[0, 9, 1], scale[1] = nan, nan, nan, nan
    every = torch.ones(2, 20, case.N, dtype=torch.bool)
    column, row = torch.zeros_like(every), torch.zeros_like(every)
    column[..., 7], row[:, 9] = True, True
    for changed, where in (
        (replace(call, experts=e._replace(up=up)), column),
        (replace(call, experts=e._replace(down=down)), every),
        (replace(call, gates=call.gates._replace(gate=gate)), row),
        (replace(call, experts=e._replace(scale=scale)), every),
    ):
        assert torch.equal(run(changed, backend).isnan(), where)


@everywhere
def test_an_infinity_in_x_makes_what_float64_makes_of_it(backend, dtype):
    for gate in ("none", "mask", "constant"):
        call = with_token(Case(T=20, ranks=(3, 20), gate=gate), dtype, float("inf"))
        y, truth = run(call, backend), call.truth()
        assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf()), gate
        assert not y[0, 3].isfinite().any() and y[0, :3].isfinite().all()
    for gate in ("local", "softmax"):
        # 0 · ∞ or a sigmoid just above 0: not finite, whichever it is
        y = run(with_token(Case(T=20, ranks=(3, 20), gate=gate), dtype, float("inf")), backend)
        assert not y[0, 3].isfinite().any() and y[0, :3].isfinite().all() and y[1].isfinite().all(), gate


def one(dtype, x, weight, down, up, scale=1.0, K=8):
    """y of one token whose numbers are all the same: base K·x·weight, low-rank scale·up·K·x·down."""

    def full(value, *shape):
        return torch.full(shape, value, dtype=dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    experts = Experts(full(down, 1, 1, K), full(up, 1, 3, 1), torch.tensor([scale], dtype=wide), (1,))
    return full(x, 1, 2, K), full(weight, 3, K), None, experts, Gates()


def usable(backend, dtype):
    reason = BACKENDS[backend].reason_against(
        Case(B=1, T=2, K=8, N=3, ranks=(1,), gate="none").problem(dtype)
    )
    if reason is not None:
        pytest.skip(reason)


@everywhere
def test_what_exceeds_the_dtype_becomes_infinite(backend, dtype):
    usable(backend, dtype)
    big = torch.finfo(dtype).max ** 0.5
    for sign in (1, -1):
        for weight, up in ((sign * big, 0.0), (0.0, sign * big)):
            y = gated_lora_linear(*one(dtype, big, weight, 1.0, up), backend=backend)
            assert torch.equal(y, torch.full_like(y, sign * float("inf"))), (sign, weight, up)


@everywhere
def test_an_h_beyond_the_dtype_is_never_a_wrong_finite_number(backend, dtype):
    """h = 4 · max, but scale·h·up is 1: right where h is kept wide (reference and cpu in 16 bits), infinite
    where it is rounded.
    """
    usable(backend, dtype)
    big = torch.finfo(dtype).max
    y = gated_lora_linear(*one(dtype, 0.5, 0.0, big, 2.0, scale=1 / big / 8), backend=backend)
    wide = backend != "stacked" and dtype == torch.float16
    assert torch.equal(y, torch.full_like(y, 1.0 if wide else float("inf"))), y


@everywhere
def test_subnormal_numbers_are_kept(backend, dtype):
    """y is half the smallest normal number, whichever part it comes from; only a CPU's own bfloat16 products
    make it zero.
    """
    usable(backend, dtype)
    tiny = torch.finfo(dtype).tiny
    for weight, up in ((1 / 16, 0.0), (0.0, 1 / 16)):
        y = gated_lora_linear(*one(dtype, tiny, weight, 1 / 8, up * 8), backend=backend)
        # the instruction vdpbf16ps takes subnormal numbers for zero
        flushed = backend == "cpu" and dtype == torch.bfloat16 and not y.any()
        assert flushed or torch.equal(y, torch.full_like(y, tiny / 2)), (weight, up, y / tiny)
