"""Softmax and top-k gates by the reference's rule; sets named by an assignment, of which nothing leaks into
another sample.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.kernels.triton.backward import Need
from mole_kernels.kernels.triton.strategies import WAYS, reason_against_way
from mole_kernels.reference import softmax_of_largest
from tests.backends.test_backends import assert_gradient
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.kernels.test_backward import NAMES, gradients, seed_of
from tests.truth import Case

F32, BF16 = torch.float32, torch.bfloat16
GATED = ("two_pass", "persistent", "recompute")
NAN, INF = float("nan"), float("inf")
LOGITS = {
    "ties": [1.0, 2.0, 2.0, 2.0, 0.0],
    "all equal": [0.5] * 5,
    "NaN": [1.0, NAN, 2.0, 0.0, 0.0],
    "NaN last": [1.0, 3.0, 2.0, 0.0, NAN],
    "-inf": [-INF, 1.0, -INF, -INF, 0.0],
    "nothing but -inf": [-INF] * 5,
    "inf": [INF, 1.0, 2.0, 0.0, 0.0],
    "two infs": [INF, 1.0, INF, 0.0, 0.0],
    "large": [1e30, -1e30, 3e4, -3e4, 1e30],
}


def run_way(way, call, save=False):
    with run(seed=1, resident=2), poisoned():
        return WAYS[way](forward_of(call, save), SMALL)


# every kernel that makes the gates, and for those that share a function with another the two hardest
TIED = [("two_pass", name) for name in LOGITS] + [
    (way, name) for way in (*GATED[1:], "dense") for name in ("ties", "NaN")
]


@pytest.mark.parametrize("way, name", TIED)
def test_ties_and_what_is_no_number(way, name):
    """The gates of rows that all have the same logits, for every k; the same kernel whatever k is."""
    call = Case(T=3, ranks=(2,) * 5, gate="local").make(F32)
    row = torch.tensor(LOGITS[name])
    for k in (1, 2, 3, 9):
        gates = call.gates._replace(
            token_weight=torch.zeros_like(call.gates.token_weight), token_bias=row, top_k=k
        )
        b = run_way(way, replace(call, gates=gates))
        want = softmax_of_largest(row, k)
        assert torch.allclose(b.token_gate, want.expand(2, 3, 5), atol=1e-6, equal_nan=True), (
            k,
            b.token_gate[0, 0],
            want,
        )
        assert torch.equal(b.y.isnan().any(-1), torch.full((2, 3), bool(want.isnan().any())))


POOL = Case(B=5, S=-3, T=9, K=40, N=33, ranks=(5, 9))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ["none", "softmax+pooled"])
def test_a_sample_without_a_set_is_the_base_to_the_bit(way, gate):
    """Even where the sets hold NaN: those that no sample takes, and the first, which a careless index of −1
    would read.
    """
    call = replace(POOL, gate=gate).make(BF16)
    experts = call.experts
    sets = [t.clone() for t in (experts.down, experts.up)]
    for t in sets:
        t[0], t[2] = NAN, NAN
    call = replace(
        call, experts=experts._replace(down=sets[0], up=sets[1], assignment=torch.tensor([-1, 1, -1, 1, -1]))
    )
    if call.gates.sample_weight is not None:
        call.gates.sample_weight[0] = NAN
    f = forward_of(call)
    if reason_against_way(way, f) is not None:
        return
    base = replace(
        call, experts=call.experts._replace(down=torch.zeros_like(sets[0]), up=torch.zeros_like(sets[1]))
    )
    none = replace(
        base,
        gates=base.gates._replace(
            sample_weight=None
            if call.gates.sample_weight is None
            else torch.zeros_like(call.gates.sample_weight)
        ),
    )
    y, plain = run_way(way, call).y, run_way(way, none).y
    assert torch.equal(y[::2], plain[::2]) and not torch.equal(y[1::2], plain[1::2])
    assert not y.isnan().any()


@pytest.mark.parametrize("way", ["two_pass", "persistent", "merge"])
def test_an_assignment_is_a_gather(way):
    """Bit-equal to sets laid out one for each sample, whatever the pool's order."""
    call = replace(POOL, gate="none" if way == "merge" else "both").make(BF16)
    call = replace(call, experts=call.experts._replace(assignment=torch.tensor([2, 0, 1, 1, 0])))
    own, gates = call.experts, call.gates
    index = own.assignment
    spread = replace(
        call,
        experts=own._replace(down=own.down[index], up=own.up[index], assignment=None),
        gates=gates._replace(
            sample_weight=None if gates.sample_weight is None else gates.sample_weight[index]
        ),
    )
    assert torch.equal(run_way(way, call).y, run_way(way, spread).y)


BACKWARD = [
    Case(gate="softmax", ranks=(8, 3, 16)),
    Case(gate="top1+constant", ranks=(4,) * 7),
    Case(gate="top2+mask+pooled", ranks=(2, 3, 4), S=2, T=17),
    Case(B=5, S=-3),
    Case(B=4, S=-2, gate="none", ranks=(3,)),
    Case(B=3, S=-7, gate="mask+pooled", T=17, K=33, ranks=(3, 4)),
    Case(B=5, S=-4, T=1, ranks=(6, 4), gate="onehot+softmax"),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_all_gradients(case, dtype):
    call = case.make(dtype)
    dy = seed_of(call)
    got, counts = gradients(call, Need(*[True] * 9), dy)
    assert counts.launches == 2
    truth, terms = call.truth_grads(dy)
    for name, t in truth.items():
        assert got[name].shape == t.shape, name
        assert_gradient(
            got[name], t, dtype, max(t.norm().item(), 2 * terms if t.numel() == case.E else 0), 4, f"d{name}"
        )
    if case.S < 0:
        unused = torch.ones(-case.S, dtype=torch.bool).index_fill_(
            0, call.experts.assignment.clamp_min(0), False
        )
        for name in ("down", "up"):
            assert not got[name][unused].any(), f"d{name} of a set that no sample took"


def test_the_order_of_programs_changes_no_bit():
    call = Case(B=4, S=-2, T=9, ranks=(3, 8), gate="top1+pooled").make(BF16)
    dy = seed_of(call)
    first, _ = gradients(call, Need(*[True] * 9), dy)
    for seed, resident in ((1, 1), (2, 8)):
        again, _ = gradients(call, Need(*[True] * 9), dy, seed=seed, resident=resident)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


@pytest.mark.parametrize(
    "shape, gate",
    [((2, 40), "softmax+pooled"), ((1, 40), "none"), ((2, 1), "none"), ((1, 1), "softmax+pooled")],
    ids=str,
)
def test_the_gradient_of_a_given_gate_of_any_shape(shape, gate):
    """In the same two launches, alone and beside all others; bit for bit the same whatever order programs
    take.

    Alone and beside the others the sums are laid out differently, so those two agree with the truth, not in
    bits.
    """
    call = Case(B=2, T=40, K=24, N=20, ranks=(3, 8), gate=gate).make(F32)
    given = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(2))
    call = replace(call, gates=call.gates._replace(gate=given))
    dy = seed_of(call)
    truth, terms = call.truth_grads(dy)
    for need in (Need(*(n == "gate" for n in NAMES)), Need(*[True] * 9)):
        got, counts = gradients(call, need, dy)
        assert counts.launches == 2 and got["gate"].shape == given.shape
        size = max(truth["gate"].norm().item(), 2 * terms)
        assert_gradient(got["gate"], truth["gate"], F32, size, 4, "dgate")
        again, _ = gradients(call, need, dy, seed=3, resident=5)
        assert torch.equal(again["gate"], got["gate"])
