"""The pooled gate in its collapsed form is the official one; MoLE's criteria for the layer (its section 1.1
as the truth).
"""

import pytest
import torch
from torch.nn import functional as F

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.gates.gate import ConstantGate, MaskGate, MoLEGate, SampleGate
from mole_kernels.layers.conv import GatedLoRAConv2d
from mole_kernels.layers.linear import GatedLoRALinear


def experts_of(ranks, K, N, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = {
        f"e{i}": LowRank(
            torch.randn(r, K, generator=g, dtype=dtype) / K**0.5,
            torch.randn(N, r, generator=g, dtype=dtype) / r**0.5,
            0.25 + 0.5 * i,
        )
        for i, r in enumerate(ranks)
    }
    return LayerExperts.from_factors(factors)


def official(x, base, experts, gate):
    """o_e = s_e B_e(A_e x); l = sigmoid(Phi x); g_e = sigmoid(w_e · mean(o_e) + c_e); y = Wx + b + Σ o_e l_e
    g_e.
    """
    y = F.linear(x, base.weight, base.bias)
    local = torch.ones(*x.shape[:2], len(experts.names), dtype=x.dtype)
    if gate.phi is not None:
        local = torch.sigmoid(F.linear(x, gate.phi, gate.phi_bias))
    for e, name in enumerate(experts.names):
        factor = experts.factor(name)
        o = experts.scale[e].to(x.dtype) * F.linear(F.linear(x, factor.down), factor.up)
        if gate.head is not None:
            o = o * torch.sigmoid(o.mean(1) @ gate.head[e] + gate.head_bias[e])[:, None, None]
        y = y + o * local[..., e : e + 1]
    return y


def layer_of(ranks, K, N, local, pooled, dtype=torch.float64):
    torch.manual_seed(1)
    base = torch.nn.Linear(K, N, dtype=dtype)
    gate = MoLEGate(K, N, len(ranks), local=local, pooled=pooled, dtype=dtype)
    return base, GatedLoRALinear.from_linear(base, experts_of(ranks, K, N, dtype), gate)


@pytest.mark.parametrize("local, pooled", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("ranks", [(5,), (4, 7), (3, 1, 8), (2,) * 5], ids=str)
@pytest.mark.parametrize("tokens", [1, 77])
def test_equals_the_papers_formula(tokens, ranks, local, pooled):
    base, layer = layer_of(ranks, 24, 40, local, pooled)
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), official(x, base, layer.experts, layer.gate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (5, 3), (1, 1)])
def test_pointwise_convolution_any_height_and_width(size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(12, 20, 1).double()
    gate = MoLEGate(12, 20, 2, dtype=torch.float64)
    layer = GatedLoRAConv2d.from_conv(conv, experts_of((3, 4), 12, 20), gate)
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    linear = torch.nn.Linear(12, 20).double()
    linear.weight, linear.bias = torch.nn.Parameter(conv.weight.flatten(1)), conv.bias
    truth = official(x.flatten(2).mT, linear, layer.experts, gate).mT.unflatten(2, size)
    torch.testing.assert_close(layer(x), truth, rtol=1e-12, atol=1e-12)
    assert layer(x).is_contiguous()
    last = x.to(memory_format=torch.channels_last)
    assert size == (1, 1) or layer(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


def test_zero_up_gives_the_base_exactly():
    base, layer = layer_of((4, 4), 16, 24, True, True, torch.float32)
    layer.experts.up.data.zero_()
    x = torch.randn(2, 9, 16)
    assert torch.equal(layer(x), F.linear(x, base.weight, base.bias))


def test_closed_gates_give_the_base_open_gates_the_sum():
    base, layer = layer_of((4, 4), 16, 24, True, True)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = F.linear(x, base.weight, base.bias)
    total = plain + sum(
        layer.experts.scale[e].double() * (x @ f.down.mT @ f.up.mT)
        for e, f in enumerate(map(layer.experts.factor, ("e0", "e1")))
    )
    with torch.no_grad():
        layer.gate.phi.zero_()
        layer.gate.head.zero_()
        for logit, truth in ((-30.0, plain), (30.0, total)):
            layer.gate.phi_bias.fill_(logit)
            layer.gate.head_bias.fill_(logit)
            torch.testing.assert_close(layer(x), truth, rtol=1e-9, atol=1e-9)


def test_tokens_permute_and_samples_do_not_mix():
    _, layer = layer_of((4, 3), 16, 24, True, True)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    torch.testing.assert_close(layer(x), torch.cat([layer(x[:1]), layer(x[1:])]))


def test_expert_order_with_its_gate_rows_does_not_matter():
    base, layer = layer_of((4, 3), 16, 24, True, True)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    gate = MoLEGate(16, 24, 2, dtype=torch.float64)
    with torch.no_grad():
        for name in ("phi", "phi_bias", "head", "head_bias"):
            getattr(gate, name).copy_(getattr(layer.gate, name).flip(0))
    swapped = LayerExperts.from_factors({name: layer.experts.factor(name) for name in ("e1", "e0")})
    torch.testing.assert_close(GatedLoRALinear.from_linear(base, swapped, gate)(x), layer(x))


def test_pool_is_kept_while_nothing_changes_and_made_anew_when_something_does():
    _, layer = layer_of((4, 3), 16, 24, False, True)
    layer.requires_grad_(False)
    first = layer.gate.pooled(layer.experts)
    assert layer.gate.pooled(layer.experts) is first
    layer.experts.set_weights({"e1": 0.5})
    second = layer.gate.pooled(layer.experts)
    assert not torch.equal(second, first)
    with torch.no_grad():
        layer.experts.up.mul_(2)
    third = layer.gate.pooled(layer.experts)
    torch.testing.assert_close(third, 2 * second)
    layer.gate.requires_grad_(True)
    assert layer.gate.pooled(layer.experts).requires_grad


def test_gradients_reach_gates_alone_through_the_pooled_form():
    base, layer = layer_of((4, 3), 16, 24, True, True)
    layer.requires_grad_(False)
    layer.gate.requires_grad_(True)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    names = ("phi", "phi_bias", "head", "head_bias")
    got = torch.autograd.grad(layer(x).square().sum(), [getattr(layer.gate, n) for n in names])
    truth = torch.autograd.grad(
        official(x, base, layer.experts, layer.gate).square().sum(), [getattr(layer.gate, n) for n in names]
    )
    for name, a, b in zip(names, got, truth):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_close_to_float32_and_input_untouched(dtype):
    base, layer = layer_of((8, 8), 32, 48, True, True, torch.float32)
    x = torch.randn(2, 33, 32)
    low = GatedLoRALinear.from_linear(base, layer.experts, layer.gate).to(dtype)
    x_low = x.to(dtype)
    before = x_low.clone()
    y = low(x_low)
    assert torch.equal(x_low, before) and low.experts.scale.dtype == torch.float32
    truth = official(x_low.double(), base.double(), low.experts.double(), low.gate.double())
    error = (y.double() - truth).norm() / truth.norm()
    assert error < 3 * {torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]


def test_constant_mask_and_sample_gates():
    base = torch.nn.Linear(16, 24).double()
    experts = experts_of((4, 3), 16, 24)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    outputs = [
        experts.scale[e].double() * (x @ f.down.mT @ f.up.mT)
        for e, f in enumerate(map(experts.factor, experts.names))
    ]
    plain = base(x)
    mask, onehot = torch.rand(5, 2), torch.eye(2)[[0, 1, 0]]
    for gate, weights in (
        (None, torch.ones(1, 1, 2)),
        (ConstantGate(2, [0.3, 0.7]), torch.tensor([[[0.3, 0.7]]])),
        (ConstantGate(2, learned=True), torch.full((1, 1, 2), 0.25)),
        (MaskGate(mask), mask[None]),
        (SampleGate(onehot), onehot[:, None]),
    ):
        truth = plain + sum(weights[..., e : e + 1].double() * o for e, o in enumerate(outputs))
        torch.testing.assert_close(
            GatedLoRALinear.from_linear(base, experts, gate)(x), truth, rtol=1e-6, atol=1e-6
        )


def test_gates_refuse_what_they_cannot_be():
    with pytest.raises(MoleValueError, match="neither local nor pooled"):
        MoLEGate(4, 4, 2, local=False, pooled=False)
    with pytest.raises(MoleShapeError, match=r"one value, or 2"):
        ConstantGate(2, [1.0, 2.0, 3.0])
    with pytest.raises(MoleValueError, match="between 0 and 1"):
        ConstantGate(2, 1.0, learned=True)
    gate = MaskGate(torch.ones(4, 2))
    with pytest.raises(MoleShapeError, match=r"\(1, 4, 2\).*got \(1, 5, 2\)"):
        gate.set(torch.ones(5, 2))
    assert gate.mask.shape == (1, 4, 2)
