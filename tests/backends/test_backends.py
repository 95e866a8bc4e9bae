"""Every backend against float64: forward, the low-rank part alone, single experts, exact integers, all
gradients.
"""

import pytest
import torch

from mole_kernels.backends.select import BACKENDS
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Gates
from tests.cases import CASES
from tests.truth import DTYPES, ON_CPU, Case, assert_close_to_truth

# roundings on the way to y: reference rounds once, the others h, its gated form, the base and the sum
ROUNDINGS = {"reference": 1, "stacked": 4, "cpu": 4}


def usable(backend: str, case: Case, dtype: torch.dtype) -> None:
    reason = BACKENDS[backend].reason_against(case.problem(dtype))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, backend, dtype):
    usable(backend, case, dtype)
    for variant in (case, case.alone()):
        call = variant.make(dtype)
        got = gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend=backend)
        assert got.dtype == dtype
        assert_close_to_truth(got, call.truth(), dtype, ROUNDINGS[backend], f"{backend}, base {variant.base}")


@pytest.mark.parametrize("backend", ON_CPU)
def test_each_expert_alone(backend):
    case = Case(ranks=(3, 8, 5), gate="local", base=False)
    call = case.make(torch.float32)
    usable(backend, case, torch.float32)
    for e in range(case.E):
        one = call.gates._replace(gate=torch.eye(case.E)[e][None, None])
        got = gated_lora_linear(call.x, call.weight, call.bias, call.experts, one, backend=backend)
        start = sum(case.ranks[:e])
        span = slice(start, start + case.ranks[e])
        x, gates = call.x.double(), call.gates
        gate = torch.sigmoid(x @ gates.token_weight[e].double() + gates.token_bias[e].double())[..., None]
        h = x @ call.experts.down[0, span].double().mT
        truth = gate * call.experts.scale[e].double() * (h @ call.experts.up[0, :, span].double().mT)
        assert_close_to_truth(got, truth, torch.float32, 1, f"{backend}, expert {e}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_small_integers_are_exact(backend, dtype):
    case = Case(K=24, N=16, ranks=(3, 2), gate="none")
    usable(backend, case, dtype)
    call = case.make(dtype, integers=True)
    # keep |h| and |y| within what bf16 holds exactly
    down = torch.zeros_like(call.experts.down)
    down[..., ::8] = 1
    up = call.experts.up.sign()
    experts = call.experts._replace(down=down, up=up)
    weight = torch.where(torch.arange(24) % 6 == 0, call.weight.sign(), 0)
    got = gated_lora_linear(call.x, weight, call.bias, experts, Gates(), backend=backend)
    truth = (
        call.x.double() @ weight.double().mT
        + call.bias.double()
        + (call.x.double() @ down[0].double().mT) @ up[0].double().mT
    )
    assert truth.abs().max() <= 256
    assert torch.equal(got.double(), truth)


# roundings of a gradient: dy·up, its gate, dh, the sum with the base's; the limit is the output dtype's
# rounding times their root
GRAD_ROUNDINGS = {"reference": 4, "stacked": 8, "cpu": 8}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, backend, dtype):
    usable(backend, case, dtype)
    call = case.make(dtype)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}
    run = call.with_tensors(leaves)
    y = gated_lora_linear(run.x, run.weight, run.bias, run.experts, run.gates, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))
    truth, terms = call.truth_grads(dy)
    for name in truth:
        assert got[name].dtype == leaves[name].dtype and got[name].shape == leaves[name].shape
        # a handful of numbers, each a sum over all tokens that may cancel: judged against the size of its
        # terms
        size = max(truth[name].norm().item(), 2 * terms if truth[name].numel() == case.E else 0)
        assert_gradient(got[name], truth[name], dtype, size, GRAD_ROUNDINGS[backend], f"{backend}, d{name}")


def assert_gradient(got, truth, dtype, size, roundings, what):
    """Error of a gradient against its size (or its terms'); twice as loose as y, for its operands were
    rounded on the way forward.
    """
    assert not got.isnan().any(), f"{what}: NaN"
    if truth.numel() == 0 or size == 0:
        assert not got.double().abs().sum(), f"{what}: the truth is zero"
        return
    eps = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    error = (got.double() - truth).norm().item() / size
    limit = 2 * 1.25 * eps * roundings**0.5
    assert error <= limit, f"{what}: relative error {error:.2e} > {limit:.2e}"
