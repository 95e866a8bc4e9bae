"""A pool of adapter sets and the samples that name them: nothing recompiles, nothing is copied, and −1 is the
base layer.
"""

import pytest
import torch
from torch.nn import functional as F

from mole_kernels.backends import cpu
from mole_kernels.backends.select import BACKENDS
from mole_kernels.errors import MoleValueError
from mole_kernels.functional import gated_lora_linear, gated_lora_linear_with_gates
from mole_kernels.operands import Call, Experts, Gates
from mole_kernels.reference import softmax_of_largest
from tests.truth import ON_CPU, Case

POOL = Case(B=5, T=70, K=96, N=80, ranks=(3, 5), S=-4)


def run(call, assignment, backend="auto", **gates):
    experts = call.experts._replace(assignment=torch.tensor(assignment))
    return gated_lora_linear(
        call.x, call.weight, call.bias, experts, call.gates._replace(**gates), backend=backend
    )


@pytest.fixture(params=ON_CPU)
def backend(request):
    reason = BACKENDS[request.param].reason_against(POOL.problem(torch.float32))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_sample_without_a_set_is_the_base_layer_bit_for_bit(backend, dtype):
    call = POOL.make(dtype)
    base = F.linear(call.x, call.weight, call.bias)
    if backend == "reference":
        # it computes in float32 and rounds once
        base = F.linear(*(t.float() for t in (call.x, call.weight, call.bias))).to(dtype)
    y = run(call, [2, -1, 0, -1, 2], backend)
    assert torch.equal(y[[1, 3]], base[[1, 3]]) and not torch.equal(y[[0]], base[[0]])
    assert torch.equal(run(call, [-1] * 5, backend), base)


@pytest.mark.parametrize("gate", ("none", "both", "softmax+mask"))
def test_samples_of_one_set_are_as_if_it_were_the_only_one(backend, gate):
    call = Case(**{**POOL.__dict__, "gate": gate}).make(torch.float32)
    e, g = call.experts, call.gates
    pool = None if g.sample_weight is None else g.sample_weight[3:]
    alone = Experts(e.down[3:].contiguous(), e.up[3:].contiguous(), e.scale, e.ranks)
    one = gated_lora_linear(
        call.x, call.weight, call.bias, alone, g._replace(sample_weight=pool), backend=backend
    )
    tolerance = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
    torch.testing.assert_close(run(call, [3] * 5, backend), one, **tolerance)
    some = run(call, [3, 0, 3, 1, 3], backend)
    torch.testing.assert_close(some[[0, 2, 4]], one[[0, 2, 4]])


def test_the_order_of_the_batch_does_not_matter_to_a_sample(backend):
    call = POOL.make(torch.float32)
    order = [4, 2, 0, 3, 1]
    sets = [1, 3, 1, 0, 3]
    mixed = gated_lora_linear(
        call.x[order],
        call.weight,
        call.bias,
        call.experts._replace(assignment=torch.tensor(sets)[order]),
        call.gates,
        backend=backend,
    )
    torch.testing.assert_close(mixed, run(call, sets, backend)[order])


def test_every_set_gets_the_gradient_of_its_samples_and_the_same_each_time(backend):
    call = POOL.make(torch.float32)
    experts = call.experts._replace(assignment=torch.tensor([2, 0, -1, 2, 0]))
    leaves = [
        t.detach().clone().requires_grad_()
        for t in (call.experts.down, call.experts.up, call.gates.sample_weight)
    ]
    run_ = experts._replace(down=leaves[0], up=leaves[1]), call.gates._replace(sample_weight=leaves[2])
    grads = []
    for _ in range(2):
        y = gated_lora_linear(call.x, call.weight, call.bias, *run_, backend=backend)
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    for one, two in zip(*grads):
        assert torch.equal(one, two)
        assert all(one[s].abs().sum() > 0 for s in (0, 2)) and not any(one[s].any() for s in (1, 3))


def test_a_thousand_sets_are_not_copied():
    case = Case(B=3, T=16, K=64, N=48, ranks=(8,), S=-1000, gate="local")
    if cpu.reason_against(case.problem(torch.float32)):
        pytest.skip("no compiled library")
    call = case.make(torch.float32)
    experts = call.experts._replace(assignment=torch.tensor([999, 17, 999]))
    pool = sum(t.numel() * 4 for t in (experts.down, experts.up))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        gated_lora_linear(call.x, call.weight, call.bias, experts, call.gates, backend="cpu")
    allocated = sum(
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    )
    assert 3 * 16 * 48 * 4 <= allocated < pool / 100, (allocated, pool)


def test_another_assignment_compiles_nothing():
    call = POOL.make(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(gated_lora_linear, fullgraph=True, backend="aot_eager")
    assignment = torch.tensor([0, 1, 2, 3, -1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for new in ([0, 1, 2, 3, -1], [1, 1, 1, 1, 1], [-1, -1, -1, -1, -1], [3, 2, 1, 0, 3]):
            assignment = torch.tensor(new)
            y = compiled(
                call.x, call.weight, call.bias, call.experts._replace(assignment=assignment), call.gates
            )
            torch.testing.assert_close(y, run(call, new))
    torch._dynamo.reset()


@pytest.mark.parametrize("wrong", ([0, 0, 0, 0, 4], [0, -2, 0, 0, 0]), ids=str)
def test_a_set_that_is_not_there_is_refused_by_the_door_and_by_the_operator(wrong):
    call = POOL.make(torch.float32)
    with pytest.raises(MoleValueError, match="assignment between -1 and 3"):
        run(call, wrong)
    if cpu.reason_against(POOL.problem(torch.float32)) is None:
        experts = call.experts._replace(assignment=torch.tensor(wrong))
        with pytest.raises(RuntimeError, match="mole_cpu: expected assignment between -1 and 3"):
            cpu.forward(Call(call.x, call.weight, call.bias, experts, Gates()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("k", (1, 2, 3, 5))
def test_softmax_ties_nan_and_infinity_are_the_references(k, dtype):
    """Logits chosen one by one: x is the identity, so that token_weight_eᵀ is token e's logits."""
    if cpu.reason_against(Case(gate="softmax").problem(dtype)):
        pytest.skip("no compiled library")
    nan, inf = float("nan"), float("inf")
    rows = [
        [1, 1, 1, 1, 1],
        [0, 3, 3, -1, 3],
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [500, -500, 499, 0, 500],
        [nan, 0, 1, 2, 3],
    ]
    rows += [
        [0, 1, nan, nan, 9],
        [inf, 0, 1, 2, 3],
        [-inf, 0, 1, -inf, 3],
        [-inf] * 5,
        [-200, -100, -50, -100, -200],
    ]
    logits = torch.tensor(rows, dtype=dtype)
    n, E = logits.shape
    # the bias carries the row: one token a call, x = 0
    experts = Experts(
        torch.ones(1, E, 4, dtype=dtype),
        torch.ones(1, 3, E, dtype=dtype),
        torch.ones(E, dtype=dtype),
        (1,) * E,
    )
    for row in range(n):
        gates = Gates(token_weight=torch.zeros(E, 4, dtype=dtype), token_bias=logits[row], top_k=k)
        x = torch.zeros(1, 1, 4, dtype=dtype)
        token = gated_lora_linear_with_gates(
            x, torch.ones(3, 4, dtype=dtype), None, experts, gates, backend="cpu"
        )[1]
        want = softmax_of_largest(logits[row], k)
        torch.testing.assert_close(
            token[0, 0], want, equal_nan=True, msg=lambda m, row=row: f"{rows[row]}, k={k}: {m}"
        )
        assert torch.equal(token[0, 0] == 0, want == 0) or dtype == torch.float32
