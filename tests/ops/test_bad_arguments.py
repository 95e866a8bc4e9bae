"""Arguments that make no sense meet an error that names them (numbers as in docs: 51 to 61)."""

import math
import warnings

import pytest
import torch

from mole_kernels.backends import select as selection
from mole_kernels.errors import (
    MoleBackendError,
    MoleError,
    MoleShapeError,
    MoleStateError,
    MoleTypeError,
    MoleValueError,
    MoleWarning,
)
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts, Gates
from tests.truth import ON_CPU, Case

CASE = Case(B=2, T=5, K=6, N=4, ranks=(2, 3))


def call(x=None, weight=None, bias=None, gates=None, backend="auto", **experts):
    good = CASE.make(torch.float32)
    x = good.x if x is None else x
    weight = good.weight if weight is None else weight
    return gated_lora_linear(
        x,
        weight,
        good.bias if bias is None else bias,
        good.experts._replace(**experts),
        gates or Gates(),
        backend=backend,
    )


BAD = {
    "51-no-experts": (dict(ranks=()), MoleValueError, "at least one expert"),
    "51-rank-zero": (dict(ranks=(0, 5)), MoleValueError, "one number ≥ 1"),
    "52-gate-shape": (
        dict(gates=Gates(gate=torch.ones(2, 5, 3))),
        MoleShapeError,
        r"gate broadcastable to \[B,T,E\] = \[2, 5, 2\].*got \(2, 5, 3\)",
    ),
    "52-gate-dims": (dict(gates=Gates(gate=torch.ones(2))), MoleShapeError, "three dimensions"),
    "52-gate-dtype": (
        dict(gates=Gates(gate=torch.ones(1, 1, 2, dtype=torch.int64))),
        MoleTypeError,
        "gate of a floating dtype",
    ),
    "52-gate-device": (
        dict(gates=Gates(gate=torch.ones(1, 1, 2, device="meta"))),
        MoleTypeError,
        "gate on x's device cpu",
    ),
    "52-token-weight-shape": (
        dict(gates=Gates(token_weight=torch.ones(2, 7))),
        MoleShapeError,
        r"token_weight \[E,K\] = \[2, 6\]",
    ),
    "52-sample-weight-shape": (
        dict(gates=Gates(sample_weight=torch.ones(1, 4))),
        MoleShapeError,
        r"sample_weight \[S,R\] = \[1, 5\]",
    ),
    "top-k-negative": (
        dict(gates=Gates(token_weight=torch.ones(2, 6), top_k=-1)),
        MoleValueError,
        "top_k = 0, or k ≥ 1 with token_weight",
    ),
    "top-k-without-token-gate": (dict(gates=Gates(top_k=1)), MoleValueError, "with token_weight"),
    "assignment-shape": (
        dict(assignment=torch.zeros(3, dtype=torch.int64)),
        MoleShapeError,
        r"assignment \[B\] = \[2\]",
    ),
    "assignment-dtype": (
        dict(assignment=torch.zeros(2, dtype=torch.int32)),
        MoleTypeError,
        "assignment int64",
    ),
    "assignment-outside": (dict(assignment=torch.tensor([0, 1])), MoleValueError, "1 for sample 1"),
    "assignment-below": (dict(assignment=torch.tensor([-2, 0])), MoleValueError, "-2 for sample 0"),
    "52-bias-alone": (
        dict(gates=Gates(sample_bias=torch.ones(2))),
        MoleValueError,
        "sample_bias without sample_weight",
    ),
    "55-integer-x": (
        dict(x=torch.ones(2, 5, 6, dtype=torch.int64)),
        MoleTypeError,
        "floating dtype, got torch.int64",
    ),
    "55-complex-x": (
        dict(x=torch.ones(2, 5, 6, dtype=torch.complex64)),
        MoleTypeError,
        "floating dtype, got torch.complex64",
    ),
    "56-last-dimension": (
        dict(x=torch.ones(2, 5, 7)),
        MoleShapeError,
        r"weight \[N,K\] with K = 7 .*got \(4, 6\)",
    ),
    "60-other-device": (
        dict(x=torch.ones(2, 5, 6, device="meta")),
        MoleTypeError,
        "weight on x's device meta",
    ),
    "61-two-dtypes": (
        dict(x=torch.ones(2, 5, 6, dtype=torch.float16)),
        MoleTypeError,
        "one dtype, x has torch.float16, got torch.float32",
    ),
    "bias-shape": (dict(bias=torch.ones(5)), MoleShapeError, r"bias \[N\] = \[4\]"),
    "down-transposed": (dict(down=torch.ones(1, 6, 5)), MoleShapeError, "stored \\[R,K\\]"),
    "up-transposed": (dict(up=torch.ones(1, 5, 4)), MoleShapeError, "up-projections are stored \\[N,R\\]"),
    "sets": (dict(down=torch.ones(3, 5, 6)), MoleShapeError, "S = 1 or the number of samples B = 2"),
    "scale-shape": (dict(scale=torch.ones(3)), MoleShapeError, r"scale \[E\] = \[2\]"),
    "backend-name": (dict(backend="warp"), MoleValueError, "'auto' or one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    arguments, error, words = BAD[name]
    with pytest.raises(error, match=words) as caught:
        call(**arguments)
    assert isinstance(caught.value, MoleError) and str(caught.value).startswith(
        ("gated_lora_linear", "backend")
    )


def test_53_nan_gates_touch_only_their_tokens():
    gate = torch.ones(2, 5, 2)
    gate[1, 3, 0] = math.nan
    y = call(gates=Gates(gate=gate))
    assert y[1, 3].isnan().all() and not y[0].isnan().any() and not y[1, :3].isnan().any()


def test_53_gates_need_not_sum_to_one():
    assert torch.isfinite(call(gates=Gates(gate=torch.full((1, 1, 2), 7.0)))).all()


def test_57_non_contiguous_x():
    x = torch.randn(6, 5, 2).permute(2, 1, 0)
    torch.testing.assert_close(call(x=x), call(x=x.contiguous()))


def test_58_zero_tokens_forward_and_backward():
    x = torch.ones(2, 0, 6, requires_grad=True)
    y = call(x=x)
    assert y.shape == (2, 0, 4)
    y.sum().backward()
    assert x.grad.shape == (2, 0, 6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_59_offsets_past_two_to_the_31(backend):
    # a row stride that puts the last token beyond 2³¹ elements; only the touched pages exist
    step = 2**30 + 7
    try:
        storage = torch.empty(2 * step + 8, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x = storage.as_strided((1, 3, 6), (1, step, 1))
    x.copy_(torch.randn(1, 3, 6))
    case = Case(B=1, T=3, K=6, N=4, ranks=(2, 3))
    good = case.make(torch.bfloat16)
    y = gated_lora_linear(x, good.weight, good.bias, good.experts, good.gates, backend=backend)
    near = gated_lora_linear(
        x.contiguous(), good.weight, good.bias, good.experts, good.gates, backend=backend
    )
    torch.testing.assert_close(y, near, rtol=2**-7, atol=2**-7)


def test_a_base_that_wants_a_gradient_is_refused_not_ignored():
    good = CASE.make(torch.float32)
    with pytest.raises(MoleStateError, match="base layer is frozen"):
        gated_lora_linear(good.x.requires_grad_(), good.weight.requires_grad_(), good.bias, good.experts)


class Refusing:
    name = "cpu"

    def reason_against(self, problem):
        return "it is only a test"


def test_refusals_are_kept_warned_once_and_listed(monkeypatch):
    monkeypatch.setattr(selection, "BACKENDS", {"cpu": Refusing(), "stacked": selection.BACKENDS["stacked"]})
    monkeypatch.setattr(selection, "refusals", type(selection.refusals)())
    problem = CASE.problem(torch.float32)
    with pytest.warns(MoleWarning, match="'cpu' is passed over: it is only a test"):
        assert selection.select(problem).name == "stacked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selection.select(problem).name == "stacked"
    assert selection.refusals == {("cpu", "it is only a test"): 2}
    with pytest.raises(MoleBackendError, match=r"refuses x \[2,5,6\] → 4, ranks 2,3.*only a test"):
        selection.select(problem, "cpu")
    monkeypatch.setattr(selection, "BACKENDS", {"cpu": Refusing()})
    with pytest.raises(MoleBackendError, match="cpu: it is only a test"):
        selection.select(problem)


def test_experts_are_named_tuples_that_print():
    good = CASE.make(torch.float32)
    assert isinstance(good.experts, Experts) and "T" in str(CASE)
    assert (
        str(CASE.problem(torch.float32)) == "x [2,5,6] → 4, ranks 2,3, S=1, gates token+sample, float32, cpu"
    )
    problem = CASE.problem(torch.float32)
    assert problem.flops() == 2 * 10 * (6 * 4 + 7 * 6 + 5 * 4) and problem.bytes() == 4 * (
        10 * 10 + 24 + 5 * 10 + 12
    )
