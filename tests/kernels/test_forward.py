"""Forward kernels against float64: every gate kind, awkward sizes, ranks and layouts, the low-rank part alone."""

import pytest
import torch

from mole_kernels.kernels.triton import launch
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.truth import DTYPES, Case, assert_close_to_truth

ways = {"two_pass": launch.two_pass, "persistent": launch.persistent}
WAYS = pytest.mark.parametrize("way", ways)

CASES = [Case(T=20, K=40, N=33, gate=g) for g in ("none", "local", "pooled", "both", "constant", "mask", "onehot", "mask+both")]
CASES += [
    Case(T=1),
    Case(T=17, K=63, N=65),
    Case(T=37, K=1, N=8),
    Case(T=39, K=8, N=1),
    Case(B=1, T=1, K=1, N=1, ranks=(1,)),
    Case(B=3, T=35, K=65, N=40, gate="none"),
    Case(ranks=(3,)),
    Case(ranks=(1, 3)),
    Case(ranks=(16, 24, 8)),
    Case(ranks=(40, 24), T=33, K=33, N=33),
    Case(ranks=(2,) * 7),
    Case(S=2),
    Case(S=2, gate="none", T=33),
    Case(B=3, S=3, ranks=(3, 5), gate="mask+pooled"),
    Case(layout="transposed"),
    Case(layout="sliced"),
    Case(layout="stride0", gate="none"),
    Case(bias=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@WAYS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, way, dtype):
    for variant in (case, case.alone()):
        call = variant.make(dtype)
        f = forward_of(call, save=True)
        with run(seed=case.T, resident=2), poisoned():
            b = ways[way](f, SMALL)
        # z and y are rounded; where K = 1 all of h is one vector, and its roundings do not average out
        assert_close_to_truth(b.y, call.truth(), dtype, 2 if case.K > 1 else 4, way)
        assert_close_to_truth(b.h, call.x.double() @ call.experts.down.double().mT, dtype, 1, "h")
        assert not b.flags.any(), "flags must be left at zero"
