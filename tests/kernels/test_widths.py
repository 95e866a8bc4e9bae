"""Tiles of y with a second accumulator beside the first (160 and 192 columns on a GPU): the same numbers,
with TMA and without.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.kernels.triton.backward import Need, backward
from mole_kernels.kernels.triton.strategies import WAYS
from mole_kernels.kernels.triton.tiles import tile_for
from tests.backends.test_backends import assert_gradient
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.kernels.test_backward import NAMES, saved, seed_of
from tests.kernels.test_forward import NO_SAMPLE_GATE
from tests.truth import Case, assert_close_to_truth

WIDE = replace(SMALL, BX=16)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("way", ["two_pass", "persistent", "recompute", "added", "dense"])
@pytest.mark.parametrize("N", [33, 48, 57])
def test_forward(N, way, tma):
    """N ends in the first accumulator, with the tile, and in a next tile's."""
    call = Case(T=19, K=40, N=N, ranks=(9, 12), gate="local" if way in NO_SAMPLE_GATE else "both").make(
        torch.bfloat16
    )
    with run(resident=2), poisoned():
        b = WAYS[way](forward_of(call, way != "dense"), replace(WIDE, tma=tma))
    assert_close_to_truth(b.y, call.truth(), torch.bfloat16, 3, way)
    assert not b.flags.any()


@pytest.mark.parametrize("tma", [False, True])
def test_backward(tma):
    call = Case(T=19, K=57, N=40, ranks=(9, 12), gate="mask+both").make(torch.float32)
    f, _ = saved(call)
    dy = seed_of(call)
    with run(resident=2) as counts, poisoned():
        got = dict(zip(NAMES, backward(f, dy, Need(*[True] * 9), replace(WIDE, tma=tma))))
    assert counts.launches == 2
    truth, terms = call.truth_grads(dy)
    for name, t in truth.items():
        assert_gradient(
            got[name],
            t,
            torch.float32,
            max(t.norm().item(), 2 * terms if t.numel() == 2 else 0),
            4,
            f"d{name}",
        )


def test_hopper_takes_160_columns_where_they_make_one_wave():
    """1280 columns of 2048 rows are 128 tiles of 128×160, and an H200 has 132 multiprocessors; Ampere has no
    registers for them.
    """
    for K in (1280, 5120):
        assert tile_for(2048, K, 1280, 64, torch.bfloat16, (9, 0), 132).width == 160
    assert tile_for(8192, 640, 640, 64, torch.bfloat16, (9, 0), 132).width == 160
    assert tile_for(2048, 1280, 1280, 64, torch.bfloat16, (8, 0), 108).BX == 0
