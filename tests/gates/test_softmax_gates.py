"""Softmax, top-k, given and cluster gates against their formulas in plain torch."""

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.gates.gate import Gate
from mole_kernels.gates.softmax import ClusterGate, GivenGate, SoftmaxGate
from mole_kernels.layers.linear import GatedLoRALinear
from tests.gates.test_mole_gate import experts_of

RANKS = (3, 1, 2)


def layer_of(gate: Gate, K: int = 6, N: int = 5) -> tuple[GatedLoRALinear, list]:
    torch.manual_seed(0)
    experts = experts_of(RANKS, K, N)
    layer = GatedLoRALinear.from_linear(nn.Linear(K, N).double(), experts, gate)
    return layer, [experts.factor(name) for name in experts.names]


def mixture(layer: GatedLoRALinear, factors: list, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y by the formula: one expert after the other, weights [B,T,E]."""
    y = nn.functional.linear(x, layer.weight, layer.bias)
    for e, f in enumerate(factors):
        y = y + weights[..., e : e + 1] * f.scale * (x @ f.down.mT @ f.up.mT)
    return y


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_x_lora_softmax_per_token(top_k, temperature):
    torch.manual_seed(1)
    gate = SoftmaxGate(6, 3, top_k=top_k, temperature=temperature).double()
    nn.init.normal_(gate.phi_bias)
    layer, factors = layer_of(gate)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    logits = (x @ gate.phi.mT + gate.phi_bias) / temperature
    kept = logits.topk(top_k or 3, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, kept.indices, torch.softmax(kept.values, -1))
    torch.testing.assert_close(layer(x), mixture(layer, factors, x, weights), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.last_gates.token.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert bool((layer.last_gates.token > 0).sum(-1).eq(top_k or 3).all())


def test_softmax_gate_learns_through_its_temperature():
    gate = SoftmaxGate(6, 3, temperature=2.0).double()
    layer, factors = layer_of(gate)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    phi, bias = (p.detach().clone().requires_grad_() for p in (gate.phi, gate.phi_bias))
    mixture(layer, factors, x, torch.softmax((x @ phi.mT + bias) / 2, -1)).square().sum().backward()
    torch.testing.assert_close(gate.phi.grad, phi.grad)
    torch.testing.assert_close(gate.phi_bias.grad, bias.grad)


def test_a_given_gate_sends_its_gradient_back():
    gate = GivenGate(3)
    layer, factors = layer_of(gate)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    source = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    gate.set(source * 2)
    y = layer(x)
    torch.testing.assert_close(y, mixture(layer, factors, x, source * 2))
    (got,) = torch.autograd.grad(y.square().sum(), source)
    (want,) = torch.autograd.grad(mixture(layer, factors, x, source * 2).square().sum(), source)
    torch.testing.assert_close(got, want)
    with pytest.raises(MoleShapeError, match=r"\[B\|1,T\|1,3\]"):
        gate.set(torch.ones(2, 3))


@pytest.mark.parametrize("top_k", [1, 2])
def test_mocle_routes_by_cluster_and_leaves_the_rest_to_the_universal_expert(top_k):
    torch.manual_seed(3)
    centres = torch.randn(4, 5)
    gate = ClusterGate(centres, 3, top_k=top_k, temperature=0.5)
    gate.assign(torch.tensor([2, 0, 2]))
    shares = torch.softmax(centres[[2, 0, 2]] @ gate.weight.mT / 0.5, -1)
    kept = torch.zeros_like(shares).scatter(-1, shares.topk(top_k).indices, shares.topk(top_k).values)
    torch.testing.assert_close(gate.weights(), torch.cat([kept, 1 - shares.amax(-1, keepdim=True)], -1))
    layer, factors = layer_of(gate)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), mixture(layer, factors, x, gate.weights()[:, None].double()), rtol=1e-6, atol=1e-6
    )
    layer(x).sum().backward()
    assert gate.weight.grad.norm() > 0


def test_mocle_assigns_the_nearest_cluster():
    gate = ClusterGate(torch.eye(3), 2)
    assert gate.assign_nearest(torch.eye(3)[[2, 1]] * 0.9).tolist() == [2, 1]
    assert ClusterGate(torch.eye(3), 2, universal=False).weights().shape == (1, 2)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: SoftmaxGate(6, 3, top_k=4), MoleValueError, "top_k between 1 and the 3 experts, got 4"),
        (lambda: SoftmaxGate(6, 3, temperature=0.0), MoleValueError, "temperature above 0"),
        (lambda: ClusterGate(torch.ones(3), 2), MoleShapeError, r"centres \[C,D\]"),
        (lambda: ClusterGate(torch.full((2, 2), torch.nan), 2), MoleShapeError, "finite centres"),
        (lambda: ClusterGate(torch.eye(2), 1), MoleValueError, "beside the universal one"),
        (lambda: ClusterGate(torch.eye(2), 2).assign(torch.tensor([0, 2])), MoleValueError, "2 for sample 1"),
        (lambda: ClusterGate(torch.eye(2), 2).assign(torch.tensor([0.5])), MoleTypeError, "int64"),
        (
            lambda: ClusterGate(torch.eye(2), 2).assign_nearest(torch.ones(1, 3)),
            MoleShapeError,
            r"embeddings \[B,2\]",
        ),
    ],
)
def test_bad_gates_name_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()
