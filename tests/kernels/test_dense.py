"""`dense`: every ΔW made and applied as such, its gates exact in float32."""

from dataclasses import replace

import pytest
import torch

from mole_kernels.backends import triton as backend
from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.strategies import reason_against_way
from mole_kernels.kernels.triton.tiles import fitted, for_dense, tile_for
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.truth import Case, assert_close_to_truth

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("gate", ["mask+softmax", "top1+constant", "mask", "local"])
def test_ranks_wider_than_a_step_and_tails_everywhere(gate, dtype, tma):
    """K no multiple of eight (ΔW's rows are padded), N ends inside a tile, so that the last one reads the
    next expert's rows.
    """
    call = Case(B=3, T=13, K=44, N=41, ranks=(20, 33, 7), gate=gate, base=False).make(dtype)
    with run(seed=1) as counts, poisoned():
        b = launch.dense(forward_of(call), replace(SMALL, tma=tma))
    assert counts.launches == 2
    assert_close_to_truth(b.y, call.truth(), dtype, 2, gate)


def test_the_operations_are_those_of_dense_layers():
    case = Case(B=1, T=64, K=64, N=64, ranks=(16, 16), gate="mask")
    with run() as counts, poisoned():
        launch.dense(forward_of(case.make(BF16)), SMALL)
    assert counts.flops == 2 * 64 * 64 * 64 * 3 + 2 * 64 * 64 * 32


def test_nothing_is_kept_between_calls():
    """An expert changed in place between two calls with the same tensors: the second has the new one."""
    call = Case(T=9, gate="local").make(F32)
    e = call.experts

    def y():
        with run(), poisoned():
            return backend.forward(call.operands(False), way="dense", tile=SMALL)[0]

    first = y()
    e.down.mul_(2)
    assert_close_to_truth(y(), call.truth(), F32, 2)
    assert not torch.equal(first, y())


@pytest.mark.parametrize(
    "case, save, words",
    [
        (Case(S=2, gate="local"), False, "its own ΔW"),
        (Case(B=3, S=-2, gate="local"), False, "its own ΔW"),
        (Case(gate="pooled"), False, "the sample gate is made of h"),
        (Case(gate="local"), True, "h is to be saved"),
    ],
    ids=str,
)
def test_what_it_refuses(case, save, words):
    f = forward_of(case.make(F32), save)
    assert words in (reason_against_way("dense", f) or "")
    assert reason_against_way("dense", forward_of(Case(gate="mask+softmax").make(F32))) is None


@pytest.mark.parametrize(
    "capability, processors, widest",
    [((8, 0), 108, 64), ((8, 9), 128, 64), ((9, 0), 132, 160), ((10, 0), 148, 160)],
)
def test_its_tiles_leave_room_for_two_accumulators(capability, processors, widest):
    for M, N in ((8192, 320), (4608, 12288), (154, 1280)):
        tile = for_dense(
            fitted(tile_for(M, 1280, N, 64, BF16, capability, processors), capability, False, 2), capability
        )
        assert tile.width <= widest
