"""Attach changes a layer's class and nothing else; detach gives it back bit for bit."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from mole_kernels.errors import MoleShapeError, MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.gates.gate import MoLEGate
from mole_kernels.layers.attach import attach, detach, reason_against_attaching
from mole_kernels.layers.conv import GatedLoRAConv2d
from mole_kernels.layers.linear import GatedLoRALinear


def experts(K, N, ranks=(3, 2)):
    return LayerExperts.from_factors(
        {f"e{i}": LowRank(torch.randn(r, K), torch.randn(N, r), 0.5) for i, r in enumerate(ranks)}
    )


def frozen_linear(K=8, N=6):
    return nn.Linear(K, N).requires_grad_(False)


@pytest.mark.parametrize(
    "make, gated",
    [(frozen_linear, GatedLoRALinear), (lambda: nn.Conv2d(8, 6, 1).requires_grad_(False), GatedLoRAConv2d)],
)
def test_there_and_back(make, gated):
    layer = make()
    x = torch.randn(2, 8, 5, 4) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5, 8)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before, members, plain = copy.deepcopy(layer.state_dict()), dict(layer.__dict__), layer(x)
    same = attach(layer, experts(8, 6), MoLEGate(8, 6, 2))
    assert same is layer and type(layer) is gated and layer.weight is members["_parameters"]["weight"]
    assert not torch.equal(layer(x), plain)
    detach(layer)
    assert type(layer) in (nn.Linear, nn.Conv2d) and set(layer.__dict__) == set(members)
    assert list(layer.state_dict()) == list(before) and all(
        torch.equal(a, b) for a, b in zip(layer.state_dict().values(), before.values())
    )
    assert torch.equal(layer(x), plain) and len(calls) == 3


def test_off_is_the_base_bit_for_bit():
    layer = frozen_linear()
    x = torch.randn(4, 8)
    plain = layer(x)
    attach(layer, experts(8, 6))
    layer.experts_on = False
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize(
    "module, words",
    [
        (nn.Conv2d(8, 8, 1, groups=2), "groups 2"),
        (nn.Conv3d(8, 8, 1), "forward of its own"),
        (nn.MultiheadAttention(8, 2).out_proj, "forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), "forward of its own"),
        (nn.Embedding(8, 6), "forward of its own"),
    ],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
def test_what_cannot_be_replaced_says_why(module, words):
    kind = type(module)
    assert words in (reason_against_attaching(module) or "")
    with pytest.raises(MoleStateError, match=words):
        attach(module, experts(8, 6))
    assert type(module) is kind and not hasattr(module, "experts")


def test_misfits_change_nothing():
    layer = frozen_linear()
    with pytest.raises(MoleShapeError, match="K, N = 8, 6"):
        attach(layer, experts(6, 8))
    assert type(layer) is nn.Linear and not hasattr(layer, "experts")
    attach(layer, experts(8, 6))
    with pytest.raises(MoleStateError, match="already holds experts"):
        attach(layer, experts(8, 6))
    detach(layer)
    with pytest.raises(MoleStateError, match="no experts of ours"):
        detach(layer)


def test_an_offload_hook_that_was_there_keeps_working():
    layer = frozen_linear()
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    x = torch.randn(2, 3, 8)
    plain = layer(x)
    attach(layer, experts(8, 6))
    mixed = layer(x)
    assert not torch.allclose(mixed, plain)
    hook = layer._hf_hook
    detach(layer)
    assert layer._hf_hook is hook and torch.equal(layer(x), plain)


def test_deepcopy_pickle_and_dtype():
    layer = attach(frozen_linear(), experts(8, 6), MoLEGate(8, 6, 2))
    x = torch.randn(2, 5, 8)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y) and twin.experts.up is not layer.experts.up
    layer.experts.set_weights({"e0": 0.3, "e1": 0.1})
    kept = layer.experts.scale.clone()
    low = copy.deepcopy(layer).to(torch.bfloat16)
    assert low.experts.up.dtype == torch.bfloat16 and torch.equal(low.experts.scale, kept)


def test_state_dict_round_trip_of_a_layer_built_with_its_experts():
    layer, other = (
        GatedLoRALinear.from_linear(frozen_linear(), experts(8, 6), MoLEGate(8, 6, 2)) for _ in range(2)
    )
    assert {"weight", "bias", "experts.down", "experts.up", "experts.scale", "gate.phi", "gate.head"} <= set(
        layer.state_dict()
    )
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(other(x), layer(x))


def test_last_gates_are_what_the_layer_used():
    layer = attach(frozen_linear(), experts(8, 6), MoLEGate(8, 6, 2))
    x = torch.randn(2, 5, 8)
    layer(x)
    truth = torch.sigmoid(x @ layer.gate.phi.mT + layer.gate.phi_bias)
    torch.testing.assert_close(layer.last_gates.token, truth.detach())
    assert layer.last_gates.sample.shape == (2, 2) and layer.last_gates.given is None
