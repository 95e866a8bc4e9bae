"""`persistent` with tiles of h that have half the rows of a tile of y, or a quarter: the same bits, in any
order of programs.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.backward import Need, backward
from mole_kernels.kernels.triton.tiles import rows_of_h, tile_for
from tests.backends.test_backends import assert_gradient
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.kernels.test_backward import NAMES, saved, seed_of
from tests.truth import Case, assert_close_to_truth

BF16, F32 = torch.bfloat16, torch.float32
TALL = replace(SMALL, BM=64)
CASES = [
    (Case(B=1, T=69, K=40, gate="local", ranks=(9, 12)), 16, False),
    (Case(B=1, T=65, K=40, gate="mask"), 32, True),
    (Case(T=17, K=40, gate="both"), 16, False),
    (Case(T=81, K=40, gate="top1+pooled", ranks=(9, 12)), 32, True),
    (Case(B=3, S=-2, T=33, K=40, gate="local"), 16, True),
]


@pytest.mark.parametrize("case, BH, tma", CASES, ids=str)
def test_forward(case, BH, tma):
    """Groups that end in a tile's first, last, or only part of rows; one program, and as many at once as
    there are tiles.
    """
    call = case.make(BF16)
    f = forward_of(call, True)
    results = []
    for programs, resident, seed in ((1, 1, 0), (9, 4, 1)):
        with run(seed, resident), poisoned():
            b = launch.persistent(f, replace(TALL, BH=BH, tma=tma, programs=programs))
        assert not b.flags.any(), "flags must be left at zero"
        results.append(b)
    assert_close_to_truth(results[0].y, call.truth(), BF16, 2)
    assert all(torch.equal(b.y, results[0].y) and torch.equal(b.h, results[0].h) for b in results[1:])
    with run(), poisoned():
        whole = launch.persistent(f, replace(TALL, tma=tma))
    assert torch.equal(whole.h, results[0].h)
    if f.sample_weight is None:
        assert torch.equal(whole.y, results[0].y)


def test_backward():
    call = Case(B=1, T=69, K=41, N=40, ranks=(9, 12), gate="mask+both").make(F32)
    f, _ = saved(call)
    dy = seed_of(call)
    with run(resident=2) as counts, poisoned():
        got = dict(zip(NAMES, backward(f, dy, Need(*[True] * 9), replace(TALL, BH=16))))
    assert counts.launches == 2
    truth, terms = call.truth_grads(dy)
    for name, t in truth.items():
        assert_gradient(
            got[name], t, F32, max(t.norm().item(), 2 * terms if t.numel() == 2 else 0), 4, f"d{name}"
        )


def test_half_as_tall_where_it_shortens_the_whole():
    def rows(M, K, N, R):
        tile = tile_for(M, K, N, R, BF16, (9, 0), 132)
        return rows_of_h(tile, -(-M // tile.BM), -(-N // tile.width), R, 132).BH

    assert rows(8192, 640, 640, 64) == rows(2048, 1280, 1280, 64) == 64
    # the ragged last wave hides tiles of h there; more of them than programs; tiles of y no taller than 64
    assert rows(2048, 1280, 10240, 64) == rows(8192, 640, 640, 512) == rows(154, 2048, 1280, 64) == 0
