"""Gates over the denoising steps: which expert counts when, and that nothing recompiles as the steps go
by.
"""

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.gates.schedule import Clock, ScheduleGate, k_lora, scheduled, switch
from mole_kernels.patching.apply import patch


def bank_of(model: nn.Module, ranks=(2, 3), seed=0, sizes=(1.0, 1.0)) -> ExpertBank:
    g = torch.Generator().manual_seed(seed)
    experts = {}
    for name, rank, size in zip(("content", "style"), ranks, sizes):
        layers = {
            path: LowRank(
                torch.randn(rank, m.in_features, generator=g),
                torch.randn(m.out_features, rank, generator=g) * size,
                0.5,
            )
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear)
        }
        experts[name] = Expert(layers)
    return ExpertBank(experts)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def alone(model: nn.Module, bank: ExpertBank, name: str, x: torch.Tensor) -> torch.Tensor:
    with patch(model, {name: bank.experts[name]}):
        return model(x)


def test_lora_switch_takes_one_expert_at_a_time(model):
    bank, clock, x = bank_of(model), Clock(12), torch.randn(2, 4, 6)
    want = {name: alone(model, bank, name, x) for name in bank.names}
    with patch(model, bank, switch(clock, every=5)), torch.no_grad():
        for i in range(12):
            clock.set(i)
            torch.testing.assert_close(model(x), want[("content", "style")[i // 5 % 2]])


def test_a_table_of_weights_and_the_pipeline_callback(model):
    bank, clock, x = bank_of(model), Clock(3), torch.randn(1, 4, 6)
    rows = {"style": [0.0, 0.5, 1.0], "content": [1.0, 1.0, -1.0]}
    with patch(model, bank, scheduled(clock, rows)) as handle, torch.no_grad():
        seen = []
        for i in range(3):
            seen.append(model(x))
            given = handle.gate_maps()["0"].given
            assert given.flatten().tolist() == [rows["content"][i], rows["style"][i]]
            assert clock.callback(None, i, 0, {"latents": x}) == {"latents": x}
        # after the last step it is the first again: the next picture starts right
        assert torch.equal(model(x), seen[0])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_steps_do_not_recompile(model, backend):
    clock, x, graphs = Clock(4), torch.randn(1, 4, 6), 0
    with patch(model, bank_of(model), switch(clock, every=1)), torch.no_grad():
        want = []
        for i in range(4):
            clock.set(i)
            want.append(model(x))
        torch._dynamo.reset()

        def count(gm, inputs):
            nonlocal graphs
            graphs += 1
            return torch._dynamo.lookup_backend(backend)(gm, inputs)

        compiled = torch.compile(model, backend=count, fullgraph=True)
        for i in range(4):
            clock.set(i)
            torch.testing.assert_close(compiled(x), want[i])
    assert graphs == 1


def test_k_lora_picks_by_the_largest_entries_and_style_comes_late(model):
    bank, clock = bank_of(model, sizes=(1.0, 0.8)), Clock(10)
    whole = {
        n: sum((f.up @ f.down * f.scale).abs().sum() for f in bank.experts[n].layers.values())
        for n in bank.names
    }
    gamma = whole["content"] / whole["style"]
    with patch(model, bank, k_lora(clock, bank, "content", "style")) as handle:
        changed = 0
        for path in ("0", "2"):
            sums = {}
            for name in bank.names:
                f = bank.experts[name].layers[path]
                sums[name] = (f.up @ f.down * f.scale).abs().flatten().topk(6).values.sum()
            table = handle.layers[path].gate.table
            for i in range(10):
                style = bool(sums["style"] * gamma * (1.5 * i / 10 + 0.5) > sums["content"])
                assert table[i].tolist() == [float(not style), float(style)]
            changed += int(table[0].tolist() != table[-1].tolist())
        assert changed, "no layer ever changes its expert: the case shows nothing"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m, b: Clock(0), MoleValueError, "at least one step"),
        (lambda m, b: Clock(3).set(-1), MoleValueError, "a step >= 0"),
        (lambda m, b: ScheduleGate(torch.ones(2, 2), Clock(3)), MoleShapeError, "with 3 steps"),
        (lambda m, b: patch(m, b, scheduled(Clock(1), {"content": [1.0]})), MoleKeyError, "none for 'style'"),
        (
            lambda m, b: patch(m, b, switch(Clock(1), order=["style"])),
            MoleKeyError,
            "an order of content, style",
        ),
        (lambda m, b: switch(Clock(1), every=0), MoleValueError, "every >= 1"),
        (lambda m, b: k_lora(Clock(1), b, "content", "other"), MoleKeyError, "'other'"),
    ],
)
def test_bad_schedules_name_what_is_wrong_and_change_nothing(model, call, error, words):
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        call(model, bank_of(model))
    assert [type(m) for m in model.modules()] == before
