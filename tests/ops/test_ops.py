"""The op as compilers and autograd see it: opcheck, gradcheck, compile without breaks or recompiles,
autocast, checkpointing.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mole_kernels.backends.select import BACKENDS
from mole_kernels.functional import gated_lora_linear, gated_lora_linear_with_gates
from mole_kernels.gates.gate import ConstantGate, MoLEGate
from mole_kernels.layers.linear import GatedLoRALinear
from tests.gates.test_mole_gate import experts_of
from tests.truth import ON_CPU, Case

SMALL = [
    Case(T=4, K=5, N=6, ranks=(2, 1)),
    Case(T=3, K=5, N=4, ranks=(1, 2), S=2, gate="mask+pooled"),
    Case(T=3, K=4, N=5, ranks=(2,), gate="onehot+local"),
    Case(T=0, K=4, N=5, ranks=(2, 2)),
    Case(T=2, K=4, N=5, ranks=(2, 2), gate="constant", bias=False),
    Case(T=3, K=4, N=5, ranks=(2, 1, 2), gate="softmax+pooled"),
    Case(B=3, T=3, K=4, N=5, ranks=(2, 1, 2), S=-2, gate="top2+pooled"),
]


def op_args(call, save, backend="auto"):
    return (*call.operands(save).flat(), backend)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case, grad):
    call = case.make(torch.float32)
    if grad:
        call = call.with_tensors(
            {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}
        )
    torch.library.opcheck(torch.ops.mole.gated_lora_fwd.default, op_args(call, save=grad))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_in_float64(case, backend):
    reason = BACKENDS[backend].reason_against(case.problem(torch.float64))
    if reason is not None:
        pytest.skip(reason)
    call = case.make(torch.float64)
    names = list(call.tensors())
    leaves = [t.detach().clone().requires_grad_() for t in call.tensors().values()]

    def run(*tensors):
        c = call.with_tensors(dict(zip(names, tensors)))
        return gated_lora_linear(c.x, c.weight, c.bias, c.experts, c.gates, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    "name", ["x", "down", "up", "scale", "token_weight", "token_bias", "sample_weight", "sample_bias"]
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_each_gradient_alone(backend, name):
    case = Case(T=5, K=6, N=7, ranks=(2, 3))
    reason = BACKENDS[backend].reason_against(case.problem(torch.float64))
    if reason is not None:
        pytest.skip(reason)
    call = case.make(torch.float64)
    leaf = call.tensors()[name].detach().clone().requires_grad_()
    run = call.with_tensors({**call.tensors(), name: leaf})
    y = gated_lora_linear(run.x, run.weight, run.bias, run.experts, run.gates, backend=backend)
    dy = torch.randn(y.shape, dtype=y.dtype)
    truth, _ = call.truth_grads(dy)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], truth[name], rtol=1e-9, atol=1e-9)


def mixture(local=True, pooled=True, gate=None):
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    return GatedLoRALinear.from_linear(
        base,
        experts_of((4, 3), 16, 24, torch.float32),
        gate or MoLEGate(16, 24, 2, local=local, pooled=pooled),
    )


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiles_whole_and_never_again(grad):
    layer = mixture()
    x = torch.randn(2, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x), layer(x))
        layer.experts.set_weights({"e0": 0.5})
        torch.testing.assert_close(compiled(x), layer(x))
        with torch.no_grad():
            layer.experts.up.mul_(2)
            layer.gate.phi.add_(0.1)
        torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


def test_export_keeps_the_op():
    program = torch.export.export(mixture(), (torch.randn(2, 5, 16),))
    assert "mole.gated_lora_fwd" in str(program.graph)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(program.module()(x), mixture()(x))


def test_fake_and_meta_tensors_say_the_shape():
    layer = mixture().to("meta")
    assert layer(torch.empty(2, 5, 16, device="meta")).shape == (2, 5, 24)


@pytest.mark.parametrize(
    "shape", [(16,), (7, 16), (2, 5, 16), (2, 3, 4, 16), (0, 5, 16), (2, 0, 16), (0, 16)], ids=str
)
def test_any_leading_dimensions(shape):
    layer = mixture(pooled=False)
    x = torch.randn(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    if y.numel():
        torch.testing.assert_close(y.reshape(-1, 24), layer(x.reshape(-1, 16)))


def test_autocast_computes_in_its_dtype_and_gradients_in_the_parameters():
    layer = mixture()
    layer.gate.requires_grad_(True)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert layer.gate.phi.grad.dtype == torch.float32 and not layer.gate.phi.grad.isnan().any()


def test_gradient_checkpointing_gives_the_same_gradients():
    layer = mixture()
    x = torch.randn(2, 9, 16, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.gate.phi])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, layer.gate.phi])
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def test_inference_mode_and_gates_out():
    layer = mixture()
    with torch.inference_mode():
        x = torch.randn(2, 9, 16)
        y, token, sample = gated_lora_linear_with_gates(
            x, layer.weight, layer.bias, layer.experts.operands(), layer.gate.operands(layer.experts)
        )
    assert token.shape == (2, 9, 2) and sample.shape == (2, 2) and token.dtype == torch.float32
    torch.testing.assert_close(y, layer(x.clone()))


def test_two_runs_are_bit_equal():
    layer = mixture()
    x = torch.randn(2, 300, 16)
    assert torch.equal(layer(x), layer(x))


def test_a_gate_of_zero_is_the_base_bit_for_bit():
    layer = mixture(gate=ConstantGate(2, 0.0))
    x = torch.randn(2, 9, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_gates_only_training_leaves_the_rest_without_gradient():
    layer = mixture()
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    assert all(p.grad is not None for p in layer.gate.parameters())
    assert layer.weight.grad is None and layer.experts.down.grad is None and layer.experts.up.grad is None
