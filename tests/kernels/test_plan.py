"""A call launched again by its plan gives to the bit what it gives without, with any tensors of its kind."""

import threading
from dataclasses import replace

import pytest
import torch

from mole_kernels.backends import triton as backend
from mole_kernels.kernels.triton import launch, plan
from mole_kernels.kernels.triton.strategies import WAYS
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.truth import Case


@pytest.fixture(autouse=True)
def _no_plans():
    plan._plans.clear()
    yield
    plan._plans.clear()


def forward(call, way, save=True, tile=SMALL):
    with run(resident=2), poisoned():
        return backend.forward(call.operands(save), way=way, tile=tile)


CASES = [
    ("persistent", "both", 1),
    ("persistent", "mask", -2),
    ("two_pass", "top1+pooled", 2),
    ("recompute", "local", 1),
    ("recompute", "none", 1),
]


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("way, gate, S", CASES, ids=str)
def test_other_tensors_of_the_kind(way, gate, S, tma, monkeypatch):
    case, tile = Case(T=19, K=40, N=40, gate=gate, S=S), replace(SMALL, tma=tma)
    first, second = case.make(torch.bfloat16), replace(case, seed=1).make(torch.bfloat16)
    with run(resident=2), poisoned():
        want = WAYS[way](forward_of(second, True), tile)
    forward(first, way, tile=tile)
    assert len(plan._plans) == 1
    monkeypatch.setattr(plan, "record", pytest.fail)
    for call in (second, first, second):
        y, h, token_gate, sample_gate = forward(call, way, tile=tile)
    assert torch.equal(y, want.y) and torch.equal(h, want.h)
    assert torch.equal(token_gate, want.token_gate) and torch.equal(sample_gate, want.sample_gate)
    assert y.data_ptr() != forward(second, way, tile=tile)[0].data_ptr()


def test_one_tensor_in_two_places():
    """The first call's two biases are one tensor; the second's are not."""
    call = Case(T=9, gate="both").make(torch.float32)
    shared = call.gates.sample_bias
    forward(replace(call, gates=call.gates._replace(token_bias=shared)), "persistent")
    own = replace(call, gates=call.gates._replace(token_bias=shared + 1))
    y = forward(own, "persistent")[0]
    assert len(plan._plans) == 1
    plan._plans.clear()
    assert torch.equal(y, forward(own, "persistent")[0])


def test_what_makes_another_kind():
    call = Case(T=9, K=40, gate="top1", ranks=(3, 4, 5)).make(torch.bfloat16)
    wide = torch.zeros(2, 9, 48, dtype=torch.bfloat16)
    off_by_one = torch.zeros(2 * 9 * 40 + 1, dtype=torch.bfloat16)[1:].view(2, 9, 40)
    changed = (
        call,
        replace(call, x=wide[..., :40]),
        replace(call, x=off_by_one),
        replace(call, bias=None),
        replace(call, gates=call.gates._replace(top_k=2)),
        replace(call, experts=call.experts._replace(ranks=(5, 4, 3))),
        replace(call, x=call.x[:1]),
    )
    for n, one in enumerate(changed, 1):
        forward(one, "two_pass")
        assert len(plan._plans) == n
    forward(call, "two_pass", save=False)
    forward(call, "persistent")
    forward(call, "persistent", tile=replace(SMALL, BX=16))
    assert len(plan._plans) == len(changed) + 3


def test_another_threads_launches_are_not_written_down():
    call = Case(T=3, gate="none").make(torch.float32)
    with launch.recording() as started:
        other = threading.Thread(target=WAYS["two_pass"], args=(forward_of(call), SMALL))
        other.start()
        other.join()
    assert not started
