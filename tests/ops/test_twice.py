"""A gradient of a gradient: exact on every road, for every gate and set, whatever computed the forward."""

import pytest
import torch

from mole_kernels.attention.regional import regional_attention
from mole_kernels.functional import gated_lora_linear
from mole_kernels.ops import direct
from mole_kernels.reference import gated_lora_ref
from tests.truth import ON_CPU, Case

SMALL = dict(B=2, T=3, K=5, N=4, ranks=(2, 1))
CASES = [
    *(
        Case(**SMALL, gate=g)
        for g in ("none", "local", "pooled", "both", "constant", "mask+both", "softmax", "top1")
    ),
    Case(**SMALL, gate="both", S=2),
    Case(**{**SMALL, "B": 3}, gate="mask+pooled", S=-2),
    Case(**{**SMALL, "T": 1}, gate="both", bias=False),
]


@pytest.fixture(params=["eager", "operator"])
def road(request, monkeypatch):
    if request.param == "operator":
        monkeypatch.setattr(direct, "unobserved", lambda tensors: False)


def leaves_of(call):
    return {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(case, backend, road):
    call = case.make(torch.float64)
    leaves = leaves_of(call)

    def run(*values):
        other = call.with_tensors(dict(zip(leaves, values)))
        return gated_lora_linear(
            other.x, other.weight, other.bias, other.experts, other.gates, backend=backend
        )

    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()), atol=1e-6)


def penalty(y, x, leaves):
    """The gradients of ‖d(Σ y²)/dx‖², as WGAN-GP and sharpness-aware losses take them."""
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_penalty_reaches_every_operand(case, backend, dtype):
    call = case.make(dtype)
    leaves = leaves_of(call)
    run = call.with_tensors(leaves)
    y = gated_lora_linear(run.x, run.weight, run.bias, run.experts, run.gates, backend=backend)
    got = penalty(y, run.x, list(leaves.values()))
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    true = call.double().with_tensors(wide)
    truth = penalty(
        gated_lora_ref(true.x, true.weight, true.bias, true.experts, true.gates)[0],
        true.x,
        list(wide.values()),
    )
    # four products and as many roundings lie one behind the other
    allowed = 2e-5 if dtype == torch.float32 else 4e-2
    for name, one, other in zip(leaves, got, truth):
        assert (one is None) == (other is None), name
        if one is not None:
            error = (one.double() - other).norm() / other.norm().clamp_min(1e-12)
            assert one.dtype == leaves[name].dtype and error <= allowed, (name, error.item())


def test_an_operand_made_from_another_counts_by_itself():
    """scale is computed from x: its gradient must not hold what reaches x by itself."""
    call = Case(**SMALL, gate="none").make(torch.float64)
    x = call.x.clone().requires_grad_()

    def run(operator):
        experts = call.experts._replace(scale=x.mean((0, 1))[:2])
        y = operator(x, call.weight, call.bias, experts, call.gates)
        (dx,) = torch.autograd.grad(
            (y if isinstance(y, torch.Tensor) else y[0]).square().sum(), x, create_graph=True
        )
        return dx, torch.autograd.grad(dx.square().sum(), x)[0]

    for got, truth in zip(run(gated_lora_linear), run(gated_lora_ref)):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("lengths", [None, torch.tensor([[2, 3], [3, 1]])], ids=["whole", "lengths"])
def test_regional_attention(lengths):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 1, 3, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in "kv")
    shares = torch.tensor([[1.0, 0.5, 0, 0.25], [0, 0.5, 1.0, 0.75]]).double().expand(2, 2, 4)

    def run(q, k, v):
        return regional_attention(q, k, v, shares, lengths, backend="gathered")

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))
