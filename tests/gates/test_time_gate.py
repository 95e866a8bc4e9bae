"""Gates over layer and timestep: the formula, samples of unlike timesteps, gradients, training through a UNet."""

from __future__ import annotations

import math

import pytest
import torch

import mole_kernels as mk
from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.gates.time import TimeGate, Timestep
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching.apply import patch
from tests.training.pipelines import sd_pipeline


def test_fresh_gates_are_one_and_trained_ones_the_formula():
    gate = TimeGate(2, Timestep(), frequencies=3)
    assert torch.equal(gate.at(torch.tensor([0.0, 0.3, 1.0])), torch.ones(3, 2))
    torch.manual_seed(0)
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    for t in (0.0, 0.25, 0.9):
        features = [math.cos(math.pi * k * t) for k in (1, 2, 3)] + [
            math.sin(math.pi * k * t) for k in (1, 2, 3)
        ]
        for e in range(2):
            logit = sum(w * f for w, f in zip(gate.weight[e].tolist(), features)) + float(
                gate.bias[e].detach()
            )
            want = 2 / (1 + math.exp(-logit))
            assert float(gate.at(torch.tensor([t]))[0, e].detach()) == pytest.approx(want, rel=1e-5)


def patched(pipe):
    torch.manual_seed(0)
    shapes = {p: sizes(m) for p, m in mole_targets(pipe.unet).items()}
    bank = ExpertBank.new(shapes, ["a", "b"], 2)
    for expert in bank.experts.values():
        for layer in expert.layers.values():
            torch.nn.init.normal_(layer.up, std=0.3)
    return bank


def test_every_sample_has_the_gate_of_its_timestep_and_gradients_reach_every_layer():
    pipe, time = sd_pipeline(), Timestep()
    bank = patched(pipe)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)

    def make(path, module, experts):
        return TimeGate(len(experts.names), time, device=experts.scale.device)

    with patch(pipe.unet, bank) as handle:
        plain = pipe.unet(x, torch.tensor([10, 900]), text).sample
    with patch(pipe.unet, bank, gates=make) as handle, time.watching(pipe.unet):
        torch.testing.assert_close(pipe.unet(x, torch.tensor([10, 900]), text).sample, plain)
        for layer in handle.layers.values():
            torch.nn.init.normal_(layer.gate.weight, std=0.5)
        both = pipe.unet(x, torch.tensor([10, 900]), text).sample
        for b, t in enumerate((10, 900)):
            alone = pipe.unet(x[b : b + 1], t, text[b : b + 1]).sample
            torch.testing.assert_close(both[b : b + 1], alone, rtol=1e-4, atol=1e-5)
        handle.gates_require_grad() if hasattr(handle, "gates_require_grad") else handle.train_gates()
        pipe.unet(x, torch.tensor([10, 900]), text).sample.square().sum().backward()
        for layer in handle.layers.values():
            assert layer.gate.weight.grad is not None and layer.gate.weight.grad.abs().sum() > 0
    assert not pipe.unet._forward_pre_hooks


def test_what_is_no_time_is_named():
    assert mk.gates.TimeGate is TimeGate
    for wrong in (0, -1, float("inf")):
        with pytest.raises(MoleValueError, match="largest"):
            Timestep(wrong)
    with pytest.raises(MoleValueError, match="frequencies"):
        TimeGate(2, Timestep(), 0)
    net = torch.nn.Linear(2, 2)
    with Timestep().watching(net), pytest.raises(MoleShapeError, match="timestep"):
        net(torch.ones(1, 2))
