"""Given gates in any layout, and learned gates that are all but closed or open, in every backend that is
here.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.functional import gated_lora_linear
from tests.truth import ON_CPU, Case, assert_close_to_truth

CASE = Case(T=17, K=40, N=24, ranks=(4, 3, 8), gate="none", base=False)


def run(call, backend):
    return gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend=backend)


def layouts(B, T, E):
    g = torch.Generator().manual_seed(5)
    yield "experts first", torch.rand(E, B, T, generator=g).permute(1, 2, 0)
    yield "every other expert", torch.rand(B, T, 2 * E, generator=g)[..., ::2]
    yield "reversed tokens and experts first", torch.rand(E, T, B, generator=g).permute(2, 1, 0)
    yield "one sample for all", torch.rand(E, 1, T, generator=g).permute(1, 2, 0)
    yield "one token for all", torch.rand(E, B, 1, generator=g).permute(1, 2, 0)
    yield "one value for all experts", torch.rand(B, T, 1, generator=g).expand(B, T, E)
    yield "one value", torch.rand(1, 1, 1, generator=g).expand(B, T, E)


LAYOUTS = dict(layouts(CASE.B, CASE.T, CASE.E))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_given_gate_in_any_layout(layout, backend):
    call = CASE.make(torch.float32)
    call = replace(call, gates=call.gates._replace(gate=LAYOUTS[layout]))
    assert_close_to_truth(run(call, backend), call.truth(), torch.float32, 1)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}
    # the leaf keeps the layout: clone() would lay it out anew
    leaves["gate"] = LAYOUTS[layout].detach().requires_grad_()
    dy = torch.randn(CASE.B, CASE.T, CASE.N, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(run(call.with_tensors(leaves), backend), list(leaves.values()), dy)
    truth = call.truth_grads(dy)[0]
    for name, g in zip(leaves, got):
        error = (g.double() - truth[name]).norm() / truth[name].norm()
        assert g.shape == leaves[name].shape and error < 2e-6, (name, error.item())


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("gate", ["local", "pooled", "both"])
@pytest.mark.parametrize("logit", [-100.0, -87.0, -30.0, -20.0, 20.0, 30.0, 88.0, 100.0])
def test_gates_all_but_closed_or_open(logit, gate, backend):
    """sigmoid(−30) is 1e-13, no zero: the low-rank part is still right to its own size, and nothing is
    NaN.
    """
    call = replace(CASE, gate=gate).make(torch.float32)
    biases = {
        n: torch.full((CASE.E,), logit)
        for n in ("token_bias", "sample_bias")
        if getattr(call.gates, n) is not None
    }
    call = replace(call, gates=call.gates._replace(**biases))
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}
    y = run(call.with_tensors(leaves), backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    truth, true_grads = call.truth(), call.truth_grads(dy)[0]
    # the logit itself is rounded: near ±100 that alone is 4e-6 of the gate; two gates below 1e-40 are
    # subnormal or zero
    closed = logit * (1 + (gate == "both")) < -80
    if closed:
        assert y.abs().max() <= 1e-30
    else:
        assert ((y.double() - truth).norm() / truth.norm()).item() < 2e-5
    for name, g in zip(leaves, grads):
        assert g.isfinite().all(), name
        if not closed and logit < 0:
            error = (g.double() - true_grads[name]).norm() / true_grads[name].norm()
            assert error < 1e-4, (name, error.item())
