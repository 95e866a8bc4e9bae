"""Cases 51 to 63: arguments of `patch`, of a patched layer's forward and of the operator."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from mole_kernels.backends import select as selection
from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError, MoleWarning
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.functional import gated_lora_linear
from mole_kernels.gates.gate import ConstantGate
from mole_kernels.gates.softmax import SoftmaxGate
from mole_kernels.io.gates import GateFile
from mole_kernels.operands import Gates
from mole_kernels.patching.apply import patch
from tests.ops import test_bad_arguments as there
from tests.patching.test_plan import gate_file
from tests.robustness.cases import Case, Ground, patched
from tests.truth import Case as Problem

OPS, PLAN = "tests/ops/test_bad_arguments.py::", "tests/patching/test_plan.py::"
SAYS = {
    51: "no experts",
    52: "gate of wrong shape, dtype or device",
    53: "gates NaN, or not summing to one",
    54: "duplicate or dotted adapter name",
    55: "integer or complex x",
    56: "last dimension ≠ K",
    57: "non-contiguous x",
    58: "zero tokens",
    59: "offsets past 2³¹",
    60: "x on another device",
    61: "fp16 x with bf16 W",
    62: "unsupported GPU",
    63: "top-k above the number of experts",
}

OPERATOR = [
    Case(
        f"{id[:2]}-operator{id[2:]}",
        SAYS[int(id[:2])],
        act=lambda g, arguments=arguments: there.call(**arguments),
        error=error,
        deeper=(OPS + "test_bad_argument",),
    )
    for id, (arguments, error, _) in there.BAD.items()
    if id[:2].isdigit()
]


def refused(
    id: str, act, error: type[BaseException], *words: str, deeper: str = "", prepare=lambda g: None
) -> Case:
    return Case(
        id,
        SAYS[int(id[:2])],
        act=act,
        error=error,
        words=words,
        deeper=(deeper,) if deeper else (),
        prepare=prepare,
    )


def allowed(id: str, act, outcome: str, *deeper: str, prepare=lambda g: None) -> Case:
    return Case(id, SAYS[int(id[:2])], act=act, outcome=outcome, deeper=deeper, prepare=prepare)


def wrong_gates(g: Ground) -> None:
    file = gate_file(g.model)
    layers = {**file.layers, "first": replace(file.layers["first"], phi=torch.zeros(2, 7))}
    patch(g.model, {"a": g.expert(), "b": g.expert(1)}, GateFile(layers, file.expert_names))


def constant(value: float):
    return lambda path, module, layer: ConstantGate(len(layer.names), value)


def nan_gates(g: Ground) -> None:
    handle = patch(
        g.model, {"a": g.expert()}, lambda path, *_: ConstantGate(1, math.nan) if path == "mix" else None
    )
    assert g.forward().isnan().all()
    handle.remove()
    gate = torch.ones(2, 5, 2)
    gate[1, 3, 0] = math.nan
    y = there.call(gates=Gates(gate=gate))
    assert y[1, 3].isnan().all() and not y[0].isnan().any() and not y[1, :3].isnan().any()


def gates_of_seven(g: Ground) -> None:
    handle = patch(g.model, {"a": g.expert(), "b": g.expert(1)}, constant(7.0))
    with_gates = g.forward()
    handle.remove()
    handle = patch(g.model, {"a": g.expert(), "b": g.expert(1)}, scales={"a": 7.0, "b": 7.0})
    torch.testing.assert_close(with_gates, g.forward(), rtol=1e-4, atol=1e-4)
    handle.remove()


def names_twice(g: Ground) -> None:
    patch(g.model, [("a", g.expert()), ("a", g.expert(1))])


def non_contiguous(g: Ground) -> None:
    strided = torch.randn(6, 6, 2).permute(2, 1, 0)
    assert not strided.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(g.model(strided), g.model(strided.contiguous()))


def zero_tokens(g: Ground) -> None:
    first = g.model.first
    x = torch.ones(2, 0, 6, requires_grad=True)
    y = first(x)
    assert y.shape == (2, 0, 10)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert first(torch.ones(0, 4, 6)).shape == (0, 4, 10)


def far_apart(g: Ground) -> None:
    """Tokens a row stride of more than 2³⁰ elements apart; only the touched pages exist."""
    step = 2**30 + 7
    try:
        storage = torch.empty(2 * step + 8, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x = storage.as_strided((1, 3, 6), (1, step, 1))
    x.copy_(torch.randn(1, 3, 6))
    good = Problem(B=1, T=3, K=6, N=4, ranks=(2, 3)).make(torch.bfloat16)
    far, near = (
        gated_lora_linear(t, good.weight, good.bias, good.experts, good.gates) for t in (x, x.contiguous())
    )
    torch.testing.assert_close(far, near, rtol=2**-7, atol=2**-7)


def bf16(g: Ground) -> None:
    g.model.bfloat16()
    patched(g)


def passed_over(g: Ground) -> None:
    g.monkeypatch.setattr(
        selection, "BACKENDS", {"cpu": there.Refusing(), "stacked": selection.BACKENDS["stacked"]}
    )
    g.monkeypatch.setattr(selection, "refusals", type(selection.refusals)())
    g.monkeypatch.setattr(selection, "_warned", set(), raising=False)
    problem = there.CASE.problem(torch.float32)
    with pytest.warns(MoleWarning, match="'cpu' is passed over: it is only a test") as caught:
        assert selection.select(problem).name == "stacked"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selection.select(problem).name == "stacked"


def top_2_of_one(g: Ground) -> None:
    """Layers may hold fewer experts than others, so the word means at most two."""
    handle = patch(g.model, {"a": g.expert()}, "top-2")
    softmax = g.forward()
    handle.remove()
    handle = patch(g.model, {"a": g.expert()})
    torch.testing.assert_close(softmax, g.forward())
    handle.remove()


def top_k_of_all(g: Ground) -> None:
    good = there.CASE.make(torch.float32)
    y = [
        gated_lora_linear(
            good.x, good.weight, good.bias, good.experts, Gates(token_weight=good.gates.token_weight, top_k=k)
        )
        for k in (2, 9)
    ]
    assert torch.equal(*y)


CASES = [
    refused(
        "51-none",
        lambda g: patch(g.model, {}),
        MoleValueError,
        "at least one expert",
        deeper=PLAN + "test_51_no_experts",
    ),
    refused("51-empty-list", lambda g: patch(g.model, []), MoleValueError, "at least one expert"),
    refused(
        "52-gate-file",
        wrong_gates,
        MoleShapeError,
        "first",
        "phi [E,K]",
        deeper=PLAN + "test_52_gates_of_other_sizes",
    ),
    refused(
        "52-gate-type",
        lambda g: patch(g.model, {"a": g.expert()}, 3),
        MoleTypeError,
        "gates",
        "a path, a GateFile",
        deeper=PLAN + "test_52_gates_of_the_wrong_type",
    ),
    allowed(
        "53-nan",
        nan_gates,
        "allowed: NaN reaches the tokens of that gate and no others",
        OPS + "test_53_nan_gates_touch_only_their_tokens",
    ),
    allowed(
        "53-sum",
        gates_of_seven,
        "allowed: gates are factors, not shares",
        OPS + "test_53_gates_need_not_sum_to_one",
    ),
    refused(
        "54-dotted",
        lambda g: patch(g.model, {"a.b": g.expert()}),
        MoleValueError,
        "expert name",
        deeper=PLAN + "test_54_names",
    ),
    refused("54-twice", names_twice, MoleValueError, "names that differ, got a twice"),
    refused("54-bank", lambda g: ExpertBank({"": g.expert()}), MoleValueError, "expert name"),
    refused(
        "55-integer",
        lambda g: g.model(g.x.long()),
        MoleTypeError,
        "floating dtype, got torch.int64",
        prepare=patched,
    ),
    refused(
        "55-complex",
        lambda g: g.model(g.x.to(torch.complex64)),
        MoleTypeError,
        "floating dtype, got torch.complex64",
        prepare=patched,
    ),
    refused("56-wide", lambda g: g.model(torch.ones(2, 6, 7)), MoleShapeError, "K = 7", prepare=patched),
    allowed("57-strided", non_contiguous, "right result", OPS + "test_57_non_contiguous_x", prepare=patched),
    allowed(
        "58-none",
        zero_tokens,
        "empty result, working backward",
        OPS + "test_58_zero_tokens_forward_and_backward",
        prepare=patched,
    ),
    allowed(
        "59-far",
        far_apart,
        "right result",
        OPS + "test_59_offsets_past_two_to_the_31",
        "tests/kernels/test_forward.py::test_offsets_past_two_to_the_31",
        "tests/backends/test_cpu_extension.py::test_offsets_past_two_to_the_31",
    ),
    refused(
        "60-meta",
        lambda g: g.model(g.x.to("meta")),
        MoleTypeError,
        "weight on x's device meta",
        prepare=patched,
    ),
    refused(
        "61-two-dtypes",
        lambda g: g.model(g.x.half()),
        MoleTypeError,
        "one dtype, x has torch.float16, got torch.bfloat16",
        prepare=bf16,
    ),
    allowed(
        "62-passed-over",
        passed_over,
        "`MoleWarning` once, and the next backend computes it (held here with a backend that refuses)",
        OPS + "test_refusals_are_kept_warned_once_and_listed",
        "tests/kernels/test_backend.py::test_old_and_missing_parts_are_named",
    ),
    refused(
        "63-gate",
        lambda g: SoftmaxGate(6, 3, top_k=4),
        MoleValueError,
        "top_k between 1 and the 3 experts, got 4",
    ),
    allowed("63-word", top_2_of_one, "of one expert, all: its gate is 1"),
    allowed("63-operator", top_k_of_all, "the operator takes it as a softmax over all experts"),
    *OPERATOR,
]
