"""The cuda backend's own part: what it refuses, what it hands to the kernel, and where a call goes that the
kernel does not take.
"""

from types import SimpleNamespace

import pytest
import torch

from mole_kernels.backends import cuda, stacked
from mole_kernels.backends.select import BACKENDS, select
from mole_kernels.cli.measure import error, programs
from mole_kernels.dispatch.choose import CANDIDATES, HOPPER, candidates_of, choose
from mole_kernels.dispatch.device import KNOWN
from mole_kernels.dispatch.suite import SuiteCase
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleBackendError
from mole_kernels.kernels import sm90
from mole_kernels.operands import Experts, Gates, Need, Saved
from mole_kernels.problem import Problem
from mole_kernels.reference import gated_lora_ref
from tests.truth import NAMES, Case


def hopper_problem(**change):
    sizes = (
        dict(
            B=1,
            T=2048,
            K=1280,
            N=1280,
            ranks=(32, 32),
            S=1,
            dtype=torch.bfloat16,
            device="cuda",
            token_gate=True,
        )
        | change
    )
    return Problem(**sizes)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(device="cpu"), "computes on CUDA devices only"),
        (dict(dtype=torch.float32), "no kernels for torch.float32"),
        (dict(K=1281), "K = 1281 is no multiple of 8"),
        (dict(ranks=(3, 4)), "R = 7 is no multiple of 8"),
        (dict(T=0), "nothing to compute"),
        (dict(ranks=(8,) * 9), "9 experts"),
        (dict(ranks=(8,) * 17, token_gate=False), "17 experts"),
    ],
)
def test_refusals(change, words):
    assert words in cuda.reason_against(hopper_problem(**change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_by_name_with_a_reason():
    assert cuda.reason_against(hopper_problem()) is not None
    with pytest.raises(MoleBackendError, match="backend 'cuda'"):
        select(hopper_problem(), "cuda")


def test_it_comes_before_triton():
    assert list(BACKENDS).index("cuda") < list(BACKENDS).index("triton")


class StandIn:
    """The library's two operators on CPU tensors: plans come from a table, y and the rest from the
    reference.
    """

    def sm90_backward(
        self,
        dy,
        weight,
        down,
        up,
        scale,
        ranks,
        assignment,
        gate,
        token_weight,
        top_k,
        h,
        l,
        dx,
        dh,
        d,
        flags,
        way,
        tile,
    ):
        """dX, dh and D in float64 and in two shares, sample by sample."""
        self.calls.append((way, tuple(tile), dh, d, flags))
        if self.refuse:
            return self.refuse
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        gamma = scale.double().expand(*dy.shape[:2], -1)
        gamma = gamma * (1 if gate is None else gate.double()) * (1 if l is None else l.double())
        sets = (
            [0 if len(down) == 1 else b for b in range(len(dy))]
            if assignment is None
            else assignment.tolist()
        )
        V = torch.stack([dy[b].double() @ up[s].double() * (s >= 0) for b, s in enumerate(sets)])
        D = torch.zeros_like(gamma).index_add_(2, owner, V * h.double())
        z, out = gamma[..., owner] * V, dy.double() @ weight.double()
        out += torch.stack([z[b] @ down[s].double() for b, s in enumerate(sets)])
        if token_weight is not None:
            out += (
                gamma * D - l * ((gamma * D).sum(-1, keepdim=True) if top_k else gamma * D)
            ) @ token_weight.double()
        dx.copy_(out)
        if dh is not None:
            dh.copy_(z)
        if d is not None:
            d.zero_()
            d[0], d[-1] = (
                0.25 * D.flatten(0, 1),
                d[0] + 0.75 * D.flatten(0, 1) if len(d) == 1 else 0.75 * D.flatten(0, 1),
            )
        return ""

    def __init__(self, refuse=""):
        self.refuse, self.calls = refuse, []

    def sm90_plan(self, way, sizes, token, sample, assigned, backward, device):
        if backward and sample:
            return [], "the sample gate's gradient needs every token"
        if way == "recompute" and sample:
            return [], "the sample gate needs every token"
        return [2, 160, 24, 4, 4, 200_000, 128, 4, 0 if way == "cluster" else 7, 5 * sample, 11, 900], ""

    def sm90_forward(
        self,
        x,
        weight,
        bias,
        down,
        up,
        scale,
        ranks,
        assignment,
        gate,
        token_weight,
        token_bias,
        sample_weight,
        sample_bias,
        top_k,
        y,
        h,
        l,
        G,
        z,
        parts,
        flags,
        way,
        tile,
    ):
        self.calls.append((way, tuple(tile), z, parts, flags))
        if self.refuse:
            return self.refuse
        assert assignment is None and top_k == 0
        wide = [
            None if t is None else t.double()
            for t in (x, weight, bias, down, up, gate, token_weight, token_bias, sample_weight, sample_bias)
        ]
        truth = gated_lora_ref(
            *wide[:3], Experts(wide[3], wide[4], scale.double(), tuple(ranks)), Gates(*wide[5:])
        )
        for out, value in zip((y, l, G), truth):
            assert (out is None) == (value is None)
            if out is not None:
                out.copy_(value)
        if h is not None:
            h.copy_(wide[0] @ wide[3].mT)
        return ""


@pytest.fixture
def stand_in(monkeypatch):
    def use(**options):
        ops = StandIn(**options)
        monkeypatch.setattr(cuda.torch, "ops", SimpleNamespace(mole_cuda=ops))
        monkeypatch.setattr(cuda.torch.cuda, "current_device", lambda: 0)
        cuda._plan.cache_clear()
        return ops

    yield use
    monkeypatch.undo()
    cuda._plan.cache_clear()


def operands(case, save=True):
    call = case.make(torch.bfloat16)
    return call, call.operands(save)


@pytest.mark.parametrize("way", ["cluster", "persistent"])
@pytest.mark.parametrize("gate", ["both", "none", "mask+pooled"])
def test_outputs_and_workspace(stand_in, way, gate):
    ops = stand_in()
    case = Case(gate=gate, ranks=(3, 5))
    call, given = operands(case)
    y, h, l, G = cuda.forward(given, way=way)
    assert torch.equal(y, call.truth().to(torch.bfloat16)) and h.shape == (case.B, case.T, case.R)
    assert (l.shape if call.gates.token_weight is not None else l.numel()) == (
        (case.B, case.T, case.E) if call.gates.token_weight is not None else 0
    )
    assert (G.shape if call.gates.sample_weight is not None else G.numel()) == (
        (case.B, case.E) if call.gates.sample_weight is not None else 0
    )
    ((used, tile, z, parts, flags),) = ops.calls
    assert used == way and tile == (2, 160, 24, 4) and (z is None) == (way == "cluster")
    assert (
        (parts is None) == (call.gates.sample_weight is None)
        and flags.dtype == torch.int32
        and not flags.any()
    )


def test_a_way_by_name_that_cannot_is_an_error(stand_in):
    stand_in()
    _, given = operands(Case(gate="pooled"))
    with pytest.raises(MoleBackendError, match="needs every token"):
        cuda.forward(given, way="recompute")
    with pytest.raises(MoleBackendError, match="has no way 'merge'"):
        cuda.forward(given, way="merge")
    stand_in(refuse="x has a stride of 67 elements")
    with pytest.raises(MoleBackendError, match="stride of 67"):
        cuda.forward(given, way="cluster")


def test_a_layout_that_tma_does_not_take_goes_elsewhere(stand_in, monkeypatch):
    ops = stand_in(refuse="x has a stride of 67 elements")
    monkeypatch.setattr(cuda, "_way", lambda *_: "cuda_cluster")
    call, given = operands(Case())
    y = cuda.forward(given)[0]
    assert len(ops.calls) == 1
    assert (y.double() - call.truth()).norm() < 0.02 * call.truth().norm()


def test_the_dispatcher_takes_the_cluster_on_layers_of_one_wave():
    for shape in ((8192, 640, 640), (2048, 1280, 1280), (2048, 5120, 1280)):
        p = hopper_problem(T=shape[0], K=shape[1], N=shape[2])
        choice = choose(p, KNOWN["h200"], None, Use(), candidates_of(KNOWN["h200"]))
        assert choice.name == "cuda_cluster"
        assert choice.of("persistent").lost and choice.of("cuda_recompute").lost == "no tile of it fits"


def test_candidates_of_hopper_alone():
    assert candidates_of(KNOWN["a100"]) == CANDIDATES and set(candidates_of(KNOWN["h200"])) == {
        *CANDIDATES,
        *HOPPER,
    }
    backward = choose(hopper_problem(), KNOWN["h200"], None, Use(backward=True), candidates_of(KNOWN["h200"]))
    assert all(backward.of(name).launches == 2 for name in HOPPER) and len(HOPPER) == len(sm90.WAYS)
    assert backward.of("cuda_cluster").possible and backward.of("cuda_recompute").lost == "no tile of it fits"
    pooled = choose(
        hopper_problem(sample_gate=True),
        KNOWN["h200"],
        None,
        Use(backward=True),
        candidates_of(KNOWN["h200"]),
    )
    assert all("before the first dX" in pooled.of(name).lost for name in HOPPER)


def gradients(case, need=9, dtype=torch.float16, **way):
    """The nine gradients by the cuda backend, those wanted in float64 by autograd, and the backend's
    arguments.
    """
    call = case.make(dtype)
    dy = torch.randn(case.B, case.T, case.N, generator=torch.Generator().manual_seed(7)).to(dtype)
    forward = stacked.forward(call.operands())
    args = (call.operands(), Saved(*forward[1:]), dy)
    got = cuda.backward(*args, Need(*(i < need for i in range(9))), **way)
    return dict(zip(NAMES, got)), call.truth_grads(dy)[0], args


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's second launch on the CPU, with a small tile."""
    from tests.kernels.support import SMALL

    monkeypatch.setattr(cuda.triton, "reason_against", lambda problem: None)
    run = cuda.triton.backward
    monkeypatch.setattr(cuda.triton, "backward", lambda *args, **options: run(*args, **options, tile=SMALL))


@pytest.mark.parametrize(
    "way, case",
    [
        ("cluster", Case(gate="local+mask", ranks=(3, 5))),
        ("persistent", Case(gate="top1+constant", ranks=(3, 5), S=2)),
        ("persistent", Case(gate="none", S=-2, B=3)),
        ("cluster", Case(gate="top2", ranks=(3, 5), S=-2, B=3)),
    ],
    ids=str,
)
def test_dx_by_one_launch_and_the_sums_by_tritons_second(stand_in, interpreted, way, case):
    ops = stand_in()
    got, truth, _ = gradients(case, way=way)
    ((used, tile, dh, d, _),) = ops.calls
    assert (
        used == way
        and tile == (2, 160, 24, 4)
        and dh.shape == (case.B, case.T, case.R)
        and d.shape == (4, case.B * case.T, case.E)
    )
    for name, t in truth.items():
        assert (got[name].double() - t).norm() <= 0.02 * t.norm(), name


def test_only_what_is_wanted_is_made(stand_in, interpreted):
    ops = stand_in()
    gradients(Case(gate="none"), need=1, way="cluster")
    ((_, _, dh, d, _),) = ops.calls
    assert dh is None and d is None
    # nobody wants dX: no launch of ours, whatever way was named
    ops.calls.clear()
    case = Case(gate="none")
    args = gradients(case, need=1, way="cluster")[2]
    ops.calls.clear()
    cuda.backward(*args, Need(False, True, *[False] * 7), way="cluster")
    assert not ops.calls


def test_where_dx_goes_that_the_kernel_does_not_take(stand_in, interpreted, monkeypatch):
    with pytest.raises(MoleBackendError, match="every token"):
        stand_in()
        gradients(Case(gate="pooled"), way="cluster")
    ops = stand_in(refuse="dy has a stride of 67 elements")
    with pytest.raises(MoleBackendError, match="stride of 67"):
        gradients(Case(gate="local"), way="persistent")
    ops.calls.clear()
    monkeypatch.setattr(cuda, "_way", lambda *_: "cuda_cluster")
    got, truth, _ = gradients(Case(gate="local"))
    assert len(ops.calls) == 1 and (got["x"].double() - truth["x"]).norm() <= 0.02 * truth["x"].norm()


def test_tune_measures_our_own_dx_under_our_name(stand_in, interpreted):
    ops = stand_in()
    problem = Problem(1, 15, 64, 48, (8, 8), 1, torch.float16, "cpu", token_gate=True)
    runs = programs(SuiteCase("", problem, Use(backward=True)), ["stacked", "cuda_cluster"])
    ours, truth = runs["cuda_cluster"](), [t.float() for t in runs["stacked"]()]
    assert [call[0] for call in ops.calls] == ["cluster"] and error(ours, truth) < 0.02
