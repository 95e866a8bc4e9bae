"""The Triton backend against the tensor contract, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from mole_kernels.backends import stacked
from mole_kernels.backends import triton as backend
from mole_kernels.kernels.triton.strategies import reason_against_way
from mole_kernels.kernels.triton.tiles import fitted, tile_for
from mole_kernels.operands import Need, Saved
from mole_kernels.problem import Problem
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of
from tests.truth import ALL, NAMES, Case

CASES = [Case(T=9, gate=g) for g in ("none", "both", "mask+local", "onehot", "constant+pooled")]
CASES += [Case(T=0), Case(B=0), Case(S=2, T=9)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_keep_the_contract(case):
    """Same shapes, dtypes and emptiness as the stacked backend, and the same numbers within rounding."""
    call = case.make(torch.bfloat16)
    for save in (False, True):
        with run(resident=2):
            got = backend.forward(call.operands(save), way="persistent", tile=SMALL)
        want = stacked.forward(call.operands(save))
        for name, a, b in zip(("y", "h", "token_gate", "sample_gate"), got, want):
            assert a.shape == b.shape and a.dtype == b.dtype, name
            assert torch.allclose(a.float(), b.float(), atol=0.1, rtol=0.05), name
    dy = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    for need in (ALL, Need(*[False] * 9), Need(True, *[False] * 8)):
        rest = (call.operands(), Saved(*want[1:]), dy, need)
        with run(resident=2):
            grads = backend.backward(*rest, way="persistent", tile=SMALL)
        for name, a, b in zip(NAMES, grads, stacked.backward(*rest)):
            assert a.shape == b.shape and (a.dtype == b.dtype or not a.numel()), name
            assert torch.allclose(
                a.float(), b.float(), atol=0.1 * (1 + b.abs().max().item() if b.numel() else 1)
            ), name


def test_the_chosen_tiles_run():
    """Those that a GPU of Ampere's kind would get."""
    call = Case(B=1, T=70, K=64, N=72, ranks=(16, 40)).make(torch.bfloat16)
    with run():
        y = backend.forward(call.operands(False), way="persistent")[0]
    assert torch.allclose(y.float(), stacked.forward(call.operands(False))[0].float(), atol=0.1, rtol=0.05)


GOOD = Problem(2, 64, 128, 128, (8, 8), 1, torch.bfloat16, "cuda", True, True)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(device="cpu"), "CUDA devices only, x is on cpu"),
        (dict(dtype=torch.float64), "no kernels for torch.float64"),
        (dict(ranks=(1,) * 65), "at most 64 experts"),
        (dict(K=1 << 23), "K and N up to"),
    ],
)
def test_what_it_refuses(change, words):
    assert words in backend.reason_against(replace(GOOD, **change))


def test_old_and_missing_parts_are_named(monkeypatch):
    monkeypatch.setattr(backend, "why_not_triton", lambda: "needs Triton 3.6, found 3.5.1")
    assert backend.reason_against(GOOD) == "needs Triton 3.6, found 3.5.1"
    monkeypatch.setattr(backend, "why_not_triton", lambda: None)
    monkeypatch.setattr(
        backend, "why_not_device", lambda: "needs compute capability 8.0 (Ampere), this GPU has 7.5"
    )
    assert "this GPU has 7.5" in backend.reason_against(GOOD)
    monkeypatch.setattr(backend, "why_not_device", lambda: None)
    assert backend.reason_against(GOOD) is None


def test_ways_refuse_with_a_reason():
    def fused(gate, ranks=(8, 8), save=False):
        return forward_of(Case(gate=gate, ranks=ranks).make(torch.bfloat16), save)

    assert "every token" in reason_against_way("recompute", fused("pooled"))
    assert "R = 40" in reason_against_way("recompute", fused("none", (40,)))
    assert "depend on x" in reason_against_way("merge", fused("local"))
    assert "varies by token" in reason_against_way("merge", fused("mask"))
    assert "to be saved" in reason_against_way("merge", fused("none", save=True))
    assert reason_against_way("persistent", fused("both")) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("shape", [(8192, 640, 640), (154, 2048, 1280), (4608, 3072, 12288), (1, 8, 8)])
def test_tiles_fit_the_shared_memory(capability, shape):
    """Stages of x and w tiles are most of what a program needs; the limits are those of the compute
    capability.
    """
    M, K, N = shape
    for dtype in (torch.bfloat16, torch.float32):
        t = fitted(tile_for(M, K, N, 64, dtype, capability, 132), capability, True, 2)
        size = dtype.itemsize
        limit = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) << 10
        assert t.stages * (t.BM + t.BN) * t.BK * size <= limit
        assert t.BM & (t.BM - 1) == 0 and t.BN & (t.BN - 1) == 0


def test_captured_launches_never_share_flags(monkeypatch):
    """Slices of the arena are disjoint and apart; when it is used up, flags of one's own."""
    from mole_kernels.kernels.triton import workspace

    device = torch.device("cpu")
    whole = torch.zeros(256, dtype=torch.int32)
    monkeypatch.setitem(workspace._arena, device, (whole, 0))
    slices = [workspace._captured(device, n) for n in (5, 33, 100, 64)]
    starts = [t.data_ptr() - whole.data_ptr() for t in slices[:3]]
    assert starts == [0, 128, 384] and [t.numel() for t in slices] == [32, 64, 128, 64]
    assert not 0 <= slices[3].data_ptr() - whole.data_ptr() < 1024
    assert not any(t.any() for t in slices)
