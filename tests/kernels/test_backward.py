"""Gradients against float64 autograd through the reference: all nine, in one launch and in two, and subsets
of them.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.backward import Need, backward
from tests.backends.test_backends import assert_gradient
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.truth import NAMES, Case

CASES = [
    Case(T=20, K=40, N=33, gate=g)
    for g in ("none", "local", "pooled", "both", "constant", "mask", "onehot", "mask+both")
]
CASES += [
    Case(T=1),
    Case(T=37, K=63, N=65),
    Case(T=17, K=1, N=8),
    Case(T=17, K=8, N=1),
    Case(B=1, T=1, K=1, N=1, ranks=(1,)),
    Case(ranks=(16, 24, 8)),
    Case(ranks=(2,) * 7),
    Case(S=2),
    Case(S=2, gate="none", T=33),
    Case(B=3, S=3, ranks=(3, 5), gate="mask+pooled"),
    Case(layout="transposed"),
    Case(layout="sliced"),
]


def saved(call):
    """The forward with what it saves, as the backward gets it."""
    f = forward_of(call, save=True)
    with run(), poisoned():
        b = launch.two_pass(f, SMALL)
    return replace(f, h=b.h, token_gate=b.token_gate, sample_gate=b.sample_gate), b.y


def gradients(call, need: Need, dy, one_launch=True, seed=0, resident=2):
    f, _ = saved(call)
    with run(seed, resident) as counts, poisoned():
        got = backward(f, dy, need, SMALL, one_launch)
    return dict(zip(NAMES, got)), counts


def seed_of(call):
    g = torch.Generator().manual_seed(7)
    return torch.randn(call.x.shape[0], call.x.shape[1], call.case.N, generator=g).to(call.x.dtype)


RUNS = [(c, d, True) for c in CASES for d in (torch.bfloat16, torch.float32)]
RUNS += [(CASES[-3], torch.float16, True), *((c, torch.bfloat16, False) for c in (CASES[7], *CASES[13:17]))]


@pytest.mark.parametrize("case, dtype, one_launch", RUNS, ids=str)
def test_all_gradients(case, one_launch, dtype):
    call = case.make(dtype)
    dy = seed_of(call)
    got, counts = gradients(call, Need(*[True] * 9), dy, one_launch)
    assert counts.launches == (2 if one_launch else 3)
    truth, terms = call.truth_grads(dy)
    for name, t in truth.items():
        size = max(t.norm().item(), 2 * terms if t.numel() == case.E else 0)
        assert got[name].shape == t.shape, name
        assert_gradient(got[name], t, dtype, size, 4, f"d{name}")


SUBSETS = {
    "x": ("x",),
    "gates": ("token_weight", "token_bias", "sample_weight", "sample_bias"),
    "local gate": ("token_weight", "token_bias"),
    "experts": ("down", "up"),
    "up": ("up",),
    "down": ("down",),
    "scale": ("scale",),
    "sample_bias": ("sample_bias",),
}
LAUNCHES = {"x": 1, "up": 1}


@pytest.mark.parametrize("wanted", SUBSETS)
def test_only_what_is_needed(wanted):
    """The same numbers as when all are asked for; one launch where one is enough; no base product where x
    wants nothing.
    """
    call = Case(ranks=(3, 8)).make(torch.float32)
    dy = seed_of(call)
    names = SUBSETS[wanted]
    got, counts = gradients(call, Need(*(n in names for n in NAMES)), dy)
    full, all_counts = gradients(call, Need(*[True] * 9), dy, one_launch=False)
    for name in NAMES:
        if name in names:
            assert torch.equal(got[name], full[name]), name
        else:
            assert got[name].numel() == 0, name
    assert counts.launches == LAUNCHES.get(wanted, 2)
    if wanted != "x":
        assert counts.flops < all_counts.flops


def test_the_order_of_programs_changes_no_bit():
    call = Case(T=70, S=1, ranks=(8, 24)).make(torch.bfloat16)
    dy = seed_of(call)
    first, _ = gradients(call, Need(*[True] * 9), dy)
    for seed, resident in ((1, 1), (2, 3), (3, 8)):
        again, _ = gradients(call, Need(*[True] * 9), dy, seed=seed, resident=resident)
        for name in NAMES:
            assert torch.equal(first[name], again[name]), name
