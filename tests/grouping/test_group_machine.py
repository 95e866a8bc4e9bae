"""No order of writes, casts, hooks, errors and threads makes a group give a layer another input's output."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch import Tensor, nn

from mole_kernels.gates.gate import ConstantGate
from mole_kernels.grouping import group as grouping
from mole_kernels.grouping.group import Group
from tests.grouping.test_group import Attention, B, E, K, T, Twins, a_model, draw, expert

INPUTS = st.integers(0, 2)


class Interrupted(Attention):
    """The attention, stopped between q and k, and between k and v, by what the test wants to happen there."""

    def __init__(self) -> None:
        super().__init__()
        self.middles: list[Callable[[Tensor], object]] = []

    def forward(self, x: Tensor) -> Tensor:
        # a forward inside this one, or in another thread, is not interrupted itself
        middles, self.middles = self.middles, []
        outs = [self.to_q(x)]
        for layer in (self.to_k, self.to_v):
            if middles:
                middles.pop(0)(x)
            outs.append(layer(x))
        return torch.cat(outs, -1)


class Side:
    """One of the two models, its inputs and its second thread."""

    def __init__(self, model: Any, handle: Any) -> None:
        self.model, self.handle, self.attention = model, handle, model[0]
        self.inputs = [draw(B, T, K, seed=i) for i in range(3)]
        self.other = ThreadPoolExecutor(1)
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x)

    # -- what may happen between two projections

    def nothing(self, x: Tensor) -> None:
        pass

    def write_in_place(self, x: Tensor) -> None:
        x.mul_(2)

    def write_a_view(self, x: Tensor) -> None:
        x[0, 1:].add_(1)

    def rebind(self, x: Tensor) -> None:
        x.data = draw(*x.shape, seed=50).to(x.dtype)

    def another_input(self, x: Tensor) -> None:
        self.seen.append(self.other.submit(self, self.inputs[1]).result())

    def the_same_input(self, x: Tensor) -> None:
        self.seen.append(self.other.submit(self, x).result())

    def a_forward_inside(self, x: Tensor) -> None:
        self.seen.append(self(self.inputs[2]))

    def write_a_weight(self, x: Tensor) -> None:
        self.other.submit(lambda: self.attention.to_v.weight.detach().mul_(2)).result()

    def replace_a_factor(self, x: Tensor) -> None:
        experts = self.attention.to_k.experts
        experts.up = nn.Parameter(draw(*experts.up.shape, seed=7).to(experts.up.dtype), requires_grad=False)

    def exchange_a_gate(self, x: Tensor) -> None:
        self.attention.to_v.gate = ConstantGate(E, [0.25, 2.0])

    def scale_one_layer(self, x: Tensor) -> None:
        self.attention.to_k.experts.scale.mul_(0.5)

    def switch_the_experts(self, x: Tensor) -> None:
        self.attention.to_v.experts_on = not self.attention.to_v.experts_on

    def move_the_weights(self, x: Tensor) -> None:
        self.attention.to_k.weight.data = self.attention.to_k.weight.detach().clone()

    def fail(self, x: Tensor) -> None:
        raise ZeroDivisionError


MIDDLES = [name for name, value in vars(Side).items() if callable(value) and not name.startswith("_")]


class GroupMachine(RuleBasedStateMachine):
    """The same steps on a model that is grouped and on one that is not; every output agrees."""

    def __init__(self) -> None:
        super().__init__()
        twins = Twins("mole", make=Interrupted)
        self.twins = twins
        self.sides = [Side(*pair) for pair in zip(twins.models, twins.handles)]
        self.dtype = torch.float32

    def teardown(self) -> None:
        for side in self.sides:
            side.other.shutdown()
        group: Group = next(iter(self.twins.groups.groups.values()))
        assert not group.open

    @rule(which=INPUTS, middles=st.lists(st.sampled_from(MIDDLES), max_size=2), grad=st.booleans())
    def call(self, which: int, middles: list[str], grad: bool) -> None:
        outs: list[list[Tensor]] = []
        for side in self.sides:
            side.seen.clear()
            side.attention.middles = [getattr(side, name) for name in middles]
            with torch.set_grad_enabled(grad):
                try:
                    side.seen.append(side.model(side.inputs[which]).detach())
                except ZeroDivisionError:
                    assert "fail" in middles
            side.attention.middles = []
            outs.append(list(side.seen))
        for want, got in zip(*outs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

    @rule(which=INPUTS, shape=st.sampled_from([(B, T, K), (1, T, K), (T, K)]))
    def new_input(self, which: int, shape: tuple[int, ...]) -> None:
        for side in self.sides:
            side.inputs[which] = draw(*shape, seed=20 + which).to(self.dtype)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        for side in self.sides:
            side.model.to(dtype)
            side.inputs = [x.to(dtype) for x in side.inputs]
        self.dtype = dtype

    @rule(rank=st.integers(1, 4))
    def swap(self, rank: int) -> None:
        for side in self.sides:
            side.handle.swap("a", expert(a_model(side.attention), rank, 7))

    @rule(name=st.sampled_from(["to_q", "to_v"]))
    def offload_and_back(self, name: str) -> None:
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules

        for side in self.sides:
            layer = getattr(side.attention, name)
            cpu_offload(layer, torch.device("cpu"))
        self.call(0, [], False)
        for side in self.sides:
            remove_hook_from_submodules(getattr(side.attention, name))


TestGroupMachine = GroupMachine.TestCase
TestGroupMachine.settings = settings(
    max_examples=25, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_write_while_the_product_runs_is_not_missed(monkeypatch: pytest.MonkeyPatch):
    """Another thread writes a weight just after it was read: k, called later, is computed of the new one."""
    t = Twins()
    t.check(1)
    attention = t.models[1][0]
    compute = grouping.gated_lora_linear_with_gates
    todo = [lambda: attention.to_k.weight.detach().mul_(2)]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        out = compute(*args, **kwargs)
        if todo:
            thread = threading.Thread(target=todo.pop())
            thread.start()
            thread.join(10)
        return out

    monkeypatch.setattr(grouping, "gated_lora_linear_with_gates", interrupted)
    with torch.no_grad():
        got = t.models[1](t.x)
        want = t.models[0](t.x)
        width = attention.to_q.out_features
        want[..., width : 2 * width] = attention.to_k(t.x)
    assert not todo
    torch.testing.assert_close(got, want)


def test_operands_of_another_layout_in_the_same_memory_are_packed_anew():
    """A view of one's own gate begins at the same address with the same version, and has other sizes."""
    from mole_kernels.gates.softmax import GivenGate

    t = Twins(lambda path, module, experts: GivenGate(E))
    whole = torch.rand(B, T, 2 * E, generator=torch.Generator().manual_seed(3))
    for given in (whole[..., :E], whole[..., ::2], whole[:, :1, :E]):
        t.both(lambda attention, handle, given=given: [m.gate.set(given) for m in gated(attention)])
        t.check(1)


def gated(attention: Any) -> list[Any]:
    return [attention.to_q, attention.to_k, attention.to_v]


def test_forwards_are_counted_exactly_when_one_runs_inside_another():
    t = Twins()
    t.check(1)
    attention = t.models[1][0]

    def inside(x: Tensor) -> None:
        attention.between = None
        t.models[1](t.x)

    attention.between = inside
    with torch.no_grad():
        t.models[1](t.x)
    report = t.groups.report()
    # the outer product lost its layers to the inner forward
    assert (report["computed"], report["wasted"]) == (2, 1)
