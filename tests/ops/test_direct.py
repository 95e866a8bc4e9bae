"""The way past the dispatcher: the same numbers, taken only where nobody watches, and no check skipped that
could now fail.
"""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mole_kernels import functional
from mole_kernels.backends.select import BACKENDS
from mole_kernels.errors import (
    MoleBackendError,
    MoleError,
    MoleShapeError,
    MoleStateError,
    MoleTypeError,
    MoleValueError,
)
from mole_kernels.functional import gated_lora_linear, gated_lora_linear_with_gates
from mole_kernels.gates.gate import MoLEGate, collapsed
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.ops import direct
from mole_kernels.reference import gated_lora_ref
from tests.gates.test_mole_gate import experts_of
from tests.truth import ON_CPU, Case

CASE = Case(B=3, T=5, K=6, N=7, ranks=(2, 3), S=-2, gate="top1+pooled")


def through_the_dispatcher(call, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "unobserved", lambda tensors: False)
        return gated_lora_linear_with_gates(
            call.x, call.weight, call.bias, call.experts, call.gates, **kwargs
        )


def straight(call, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional.schema, "forward_op", None)
        return gated_lora_linear_with_gates(
            call.x, call.weight, call.bias, call.experts, call.gates, **kwargs
        )


@pytest.mark.parametrize("case", [CASE, Case(T=4, S=2), Case(T=0), Case(gate="none", bias=False)], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_both_ways_give_the_same_bits(case, backend):
    if BACKENDS[backend].reason_against(case.problem(torch.float32)):
        pytest.skip(BACKENDS[backend].reason_against(case.problem(torch.float32)))
    call = case.make(torch.float32)
    for one, two in zip(straight(call, backend=backend), through_the_dispatcher(call, backend=backend)):
        assert (one is None and two is None) or torch.equal(one, two)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}
    run = call.with_tensors(leaves)
    pairs = []
    for way in (straight, through_the_dispatcher):
        y, token, sample = way(run, backend=backend)
        assert y.requires_grad and not any(g.requires_grad for g in (token, sample) if g is not None)
        pairs.append(torch.autograd.grad(y.square().sum(), list(leaves.values())))
    for name, one, two in zip(leaves, *pairs):
        assert torch.equal(one, two), name


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def run(call, x=None, **changes):
    experts = call.experts._replace(**changes)
    return gated_lora_linear(call.x if x is None else x, call.weight, call.bias, experts, call.gates)


@pytest.mark.parametrize("mode", [Seen, SeenFunctions], ids=str)
def test_modes_see_the_operator(mode):
    call = CASE.make(torch.float32)
    run(call)
    with mode() as seen:
        run(call)
    assert any("mole.gated_lora_fwd" in name for name in seen.names)


def test_subclasses_tracers_and_profilers_see_the_operator():
    call = CASE.make(torch.float32)
    Own.seen.clear()
    run(call, call.x.as_subclass(Own))
    assert any("gated_lora_fwd" in name for name in Own.seen)
    call = Case(T=3, gate="local").make(torch.float32)
    assert "mole.gated_lora_fwd" in make_fx(lambda x: run(call, x))(call.x).code
    assert "mole::gated_lora_fwd" in str(
        torch.jit.trace(lambda x: run(call, x), call.x, check_trace=False).inlined_graph
    )
    x = call.x.clone().requires_grad_()
    outside = run(call, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(call, x).sum().backward()
        outside.sum().backward()
    names = [event.name for event in profile.events()]
    assert names.count("mole::gated_lora_fwd") == 1 and names.count("mole::gated_lora_bwd") == 2


def test_function_transforms_and_dual_numbers_go_by_the_operator():
    call = Case(B=1, T=3, gate="local").make(torch.float32)
    x = torch.randn(4, 1, 3, 64)
    # torch runs an operator without a batching rule sample by sample
    torch.testing.assert_close(
        torch.func.vmap(lambda x: run(call, x))(x), torch.stack([run(call, one) for one in x])
    )
    assert direct.unobserved((call.x, None, nn.Parameter(call.x)))
    with torch.autograd.forward_ad.dual_level():
        assert not direct.unobserved((call.x,))


@pytest.mark.parametrize("transform", ["grad", "vmap", "vjp", "vmap of grad", "grad of grad"])
def test_function_transforms_never_take_the_eager_road(transform):
    """Inside a transform a tensor's type is plain, so that only the transform itself gives it away."""
    call = Case(B=1, T=3, K=6, N=5, ranks=(2, 3), gate="both").make(torch.float64)
    roads = []

    def loss(x, operator=run):
        roads.append(direct.unobserved((x,)))
        return operator(call, x).square().sum()

    def true(call, x):
        return gated_lora_ref(x, call.weight, call.bias, call.experts, call.gates)[0]

    func = torch.func
    xs = torch.randn(2, 1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apply = {
        "grad": lambda f: func.grad(f)(xs[0]),
        "vmap": lambda f: func.vmap(f)(xs),
        "vjp": lambda f: func.vjp(f, xs[0])[1](torch.ones((), dtype=torch.float64))[0],
        "vmap of grad": lambda f: torch.stack([func.grad(f)(x) for x in xs]),
        "grad of grad": lambda f: func.grad(lambda x: func.grad(f)(x).square().sum())(xs[0]),
    }[transform]
    got, truth = apply(loss), apply(lambda x: loss(x, true))
    torch.testing.assert_close(got, truth)
    assert roads and not any(roads)


def layer_of(dtype=torch.float32):
    torch.manual_seed(0)
    return GatedLoRALinear.from_linear(
        nn.Linear(16, 24), experts_of((4, 3), 16, 24, dtype), MoLEGate(16, 24, 2)
    ).requires_grad_(False)


WRONG = {
    "down": lambda m: m.experts.down.set_(torch.zeros(1, 6, 16)),
    "up-data": lambda m: setattr(m.experts.up, "data", torch.zeros(1, 7, 24)),
    "up-type": lambda m: setattr(m.experts.up, "data", torch.zeros(1, 24, 7, dtype=torch.int64)),
    "scale": lambda m: m.experts.scale.resize_(3),
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.zeros(23), requires_grad=False)),
    "weight-type": lambda m: m.weight.__setattr__("data", m.weight.data.half()),
    "phi": lambda m: setattr(m.gate, "phi", nn.Parameter(torch.zeros(3, 16))),
    "phi-device": lambda m: setattr(m.gate, "phi", nn.Parameter(torch.zeros(2, 16, device="meta"))),
    "ranks": lambda m: setattr(m.experts, "ranks", (4, 4)),
    "backend": lambda m: setattr(m, "backend", "warp"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_turns_wrong_between_two_calls_is_found(name):
    layer, x = layer_of(), torch.randn(2, 5, 16)
    layer.gate = MoLEGate(16, 24, 2, pooled=False).requires_grad_(False)
    layer(x), layer(x)
    with torch.no_grad():
        WRONG[name](layer)
    with pytest.raises((MoleShapeError, MoleTypeError, MoleValueError)):
        layer(x)


def test_gradients_modes_and_devices_may_change_between_two_calls(monkeypatch):
    layer, x = layer_of(), torch.randn(2, 5, 16)
    y = layer(x)
    assert not y.requires_grad and layer(x.clone().requires_grad_()).requires_grad
    layer.experts.up.requires_grad_(True)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.weight.requires_grad_(True)
    with pytest.raises(MoleStateError, match="base layer is frozen"):
        layer(x)
    layer.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32 and torch.equal(layer(x), y)
    assert layer(x[0]).shape == (5, 24) and layer(x.double().float()).shape == (2, 5, 24)
    with pytest.raises(MoleTypeError):
        layer(x.double())
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).is_meta
    layer.backend = "cpu"
    monkeypatch.setenv("MOLE_NO_EXTENSION", "1")
    monkeypatch.setattr(functional, "_KNOWN", {})
    with pytest.raises(MoleBackendError, match="MOLE_NO_EXTENSION"):
        layer(x)


def test_the_values_of_an_assignment_are_looked_at_in_every_call():
    call = CASE.make(torch.float32)
    assignment = torch.tensor([0, 1, -1])
    run(call, assignment=assignment)
    assignment[1] = 2
    with pytest.raises(MoleError, match="2 for sample 1"):
        run(call, assignment=assignment)


def test_what_is_known_stays_bounded(monkeypatch):
    monkeypatch.setattr(functional, "MOST_KNOWN", 4)
    monkeypatch.setattr(functional, "_KNOWN", {})
    call = Case(B=1, gate="none").make(torch.float32)
    for tokens in range(1, 10):
        run(call, call.x[:, :tokens])
    assert 0 < len(functional._KNOWN) <= 4


def test_the_pooled_gate_follows_casts_swaps_and_inference_mode():
    layer, x = layer_of(), torch.randn(2, 9, 16)

    def fresh():
        with torch.no_grad():
            return collapsed(layer.experts.up, layer.experts.scale, layer.gate.head, layer.experts.ranks)

    before = layer(x)
    for _ in range(3):
        # rounded, and back to where it may have lain before
        layer.half().float()
        gc.collect()
        assert torch.equal(layer.gate.pooled(layer.experts), fresh())
    for seed in range(3):
        layer.experts = experts_of((4, 3), 16, 24, torch.float32, seed=seed)
        gc.collect()
        assert torch.equal(layer.gate.pooled(layer.experts), fresh())
    with torch.inference_mode():
        kept = layer.gate.pooled(layer.experts)
        assert layer.gate.pooled(layer.experts) is kept and not kept.is_inference()
        layer.experts.up.mul_(2)
        assert torch.equal(layer.gate.pooled(layer.experts), fresh())
    layer.experts.down.requires_grad_(True)
    layer(x).square().sum().backward()
    assert layer.experts.down.grad is not None and before.shape == (2, 9, 24)


@pytest.mark.parametrize("ranks, sets", [((3, 3), 1), ((2, 4, 1), 1), ((2, 2), 3), ((1, 3), 2)], ids=str)
def test_the_pooled_gate_is_its_formula_and_has_its_gradient(ranks, sets):
    make = {"dtype": torch.float64, "requires_grad": True}
    up, scale, head = (
        torch.randn(sets, 6, sum(ranks), **make),
        torch.randn(len(ranks), **make),
        torch.randn(len(ranks), 6, **make),
    )
    owner = [e for e, r in enumerate(ranks) for _ in range(r)]
    truth = torch.einsum("snr,rn,r->sr", up, head[owner], scale[owner])
    torch.testing.assert_close(collapsed(up, scale, head, ranks), truth)
    assert torch.autograd.gradcheck(lambda *t: collapsed(*t, ranks), (up, scale, head))
