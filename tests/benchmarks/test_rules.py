"""The rules as numbers, and that what they must notice is noticed."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from benchmarks.gpu import rules, verify
from benchmarks.gpu.context import Context
from mole_kernels.backends import stacked
from mole_kernels.backends.select import BACKENDS
from mole_kernels.operands import Gradients, Outputs
from tests.truth import Case

BF16, F32 = torch.bfloat16, torch.float32


def truth() -> torch.Tensor:
    return torch.randn(2, 33, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def change(t: torch.Tensor, where: tuple, value: float) -> torch.Tensor:
    t = t.clone()
    t[where] = value
    return t


def test_a_rounded_truth_breaks_nothing():
    for dtype in (F32, BF16, torch.float16):
        assert rules.broken(truth().to(dtype), truth(), dtype, 1, eager=truth().to(dtype)) == []


@pytest.mark.parametrize(
    "spoil, rule",
    [
        (lambda y: change(y, (0, 0, 0), float("nan")), "G1"),
        (lambda y: change(y, (1, 2, 3), float("inf")), "G1"),
        (lambda y: y.float(), "G1"),
        (lambda y: y[:, :-1], "G1"),
        (lambda y: y * 1.05, "G2"),
        (lambda y: change(y, (0, 5), 0.0), "G3: worst row"),
        (lambda y: change(y, (slice(None), slice(None), 7), 0.0), "G3: worst column"),
        (lambda y: change(y, (0, 1, 1), float(y[0, 1, 1]) + 0.2), "G4"),
    ],
)
def test_each_rule_notices_its_fault(spoil, rule):
    y = truth().to(BF16)
    found = rules.broken(spoil(y), truth(), BF16, 2, eager=y)
    assert any(rule in f for f in found), found


def test_zero_and_empty_truths():
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    assert rules.broken(zero.to(BF16), zero, BF16, 1) == []
    assert rules.broken(zero.to(BF16) + 1, zero, BF16, 1)
    assert rules.broken(torch.empty(0, 3, dtype=BF16), torch.empty(0, 3, dtype=torch.float64), BF16, 1) == []


def test_gradients_and_equality():
    t = truth()
    assert rules.broken_gradient(t.to(BF16), t, BF16, t.norm().item(), 8) == []
    assert "G2" in rules.broken_gradient(t.to(BF16) * 1.05, t, BF16, t.norm().item(), 8)[0]
    assert "G1" in rules.broken_gradient(change(t, (0, 0, 0), float("nan")), t, BF16, 1.0, 8)[0]
    with_nan = change(t, (0, 0, 0), float("nan"))
    assert rules.same(with_nan, with_nan.clone()) and not rules.same(t, with_nan)


@pytest.fixture(scope="module")
def context():
    return Context.make("cpu")


KINDS = ("integers", "experts", "graph", "nan", "faults")


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_backend_passes_every_kind(context, kind):
    out = verify.HANDLERS[kind]({"id": kind, "kind": kind, "backend": "stacked", "dtype": "bf16"}, context)
    assert not out.failures and out.passed


@pytest.mark.parametrize(
    "case", [Case(), Case(S=2), Case(layout="sliced"), Case(layout="stride0"), Case(T=0)], ids=str
)
def test_rules_on_layouts(context, case):
    out = verify.check_rules(
        {"id": "x", "kind": "rules", "backend": "reference", "dtype": "fp32", "case": str(case)}, context
    )
    assert not out.failures and out.passed


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "stride0"])
def test_a_moved_tensor_keeps_its_strides(layout):
    x = Case(layout=layout).make(F32).x
    there = verify.moved(x, "cpu")
    assert (
        there.stride() == x.stride()
        and torch.equal(there, x)
        and there.storage_offset() == x.storage_offset()
    )


_numbers = count()


class Wrong:
    """Scales off by 5 %, the second call different from the first, or nothing written where it should be."""

    def __init__(self, how: str) -> None:
        # a name of its own: the backend of a kind of call is remembered by its name
        self.name, self.how, self.calls = f"wrong by {how} {next(_numbers)}", how, 0

    def reason_against(self, problem):
        return None

    def forward(self, call):
        self.calls += 1
        if self.how == "scale":
            call = call._replace(experts=call.experts._replace(scale=call.experts.scale * 1.05))
        y, *others = stacked.forward(call)
        if self.how == "unwritten":
            y = torch.empty(y.shape, dtype=y.dtype)
        if self.how == "changing" and self.calls % 2 and y.numel():
            y = y * (1 + 2**-7)
        if self.how == "raising":
            raise RuntimeError("planted")
        return Outputs(y, *others)

    def backward(self, call, saved, dy, need):
        grads = stacked.backward(call, saved, dy, need)
        return Gradients(grads[0] * 1.05, *grads[1:]) if self.how == "gradient" else grads


@pytest.mark.parametrize(
    "how, rule", [("scale", "G2"), ("unwritten", "G1"), ("changing", "G7"), ("gradient", "dx")]
)
def test_a_wrong_backend_is_caught(context, monkeypatch, how, rule):
    wrong = Wrong(how)
    monkeypatch.setitem(BACKENDS, wrong.name, wrong)
    out = verify.check_rules(
        {"id": "x", "kind": "rules", "backend": wrong.name, "dtype": "bf16", "case": str(Case())}, context
    )
    assert any(rule in f"{f['stage']} {f['error']}" for f in out.failures), out.failures


def test_a_replay_that_is_not_a_fresh_call_is_caught(context, monkeypatch):
    wrong = Wrong("changing")
    monkeypatch.setitem(BACKENDS, wrong.name, wrong)
    out = verify.check_graph({"id": "x", "kind": "graph", "backend": wrong.name, "dtype": "bf16"}, context)
    assert [f["stage"] for f in out.failures]


def test_items_are_ordered_and_named_once():
    items = verify.unique(verify.items("cuda"))
    names = [i["id"] for i in items]
    assert len(names) == len(set(names))
    assert items[0]["backend"] not in ("stacked", "reference") and items[0]["dtype"] == "bf16"
    ways = {i.get("backend") for i in items}
    assert ways >= {
        "triton",
        "triton:persistent",
        "triton:two_pass",
        "triton:recompute",
        "triton:merge",
        "triton:added",
        "stacked",
    }
    for way in ("triton:persistent", "triton"):
        assert {i["kind"] for i in items if i.get("backend") == way} == set(verify.HANDLERS) - {"regional"}
    assert len(verify.unique(verify.items("cuda", quick=True))) < len(items) / 4


def test_roundings_are_doubled_only_where_nothing_averages_out():
    assert verify.roundings("triton", Case()) == (4, 8) and verify.roundings(
        "triton", replace(Case(), K=1)
    ) == (8, 8)
    assert verify.roundings("reference", replace(Case(), K=1)) == (1, 4)
