"""The suite as pytest-benchmark sees it: `pytest benchmarks --benchmark-enable`. Without that flag each case
is only verified.
"""

import pytest
import torch

from benchmarks.cases import suite
from benchmarks.layer import Layer
from benchmarks.measure import ALLOWED, error, verify
from benchmarks.peers import methods

CASES = [c for c in suite() if c.mode == "forward" and c.M == 154 and c.K == 768 and c.N == 320]


@pytest.mark.parametrize("method", ("plain", "ours", "stacked", "eager", "peft"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(benchmark, case, method):
    torch.set_num_threads(1)
    layer = Layer.make(case)
    with torch.no_grad():
        modules = methods(layer)
        if method not in modules:
            pytest.skip("PEFT is not installed")
        benchmark.group = str(case)
        benchmark(modules[method], layer.x)
        assert verify(case, layer, {method: modules[method]})[method] <= ALLOWED[case.dtype]


def test_a_wrong_method_is_not_timed():
    layer = Layer.make(CASES[0])
    with torch.no_grad(), pytest.raises(SystemExit, match="ours is wrong"):
        verify(CASES[0], layer, {"ours": lambda x: layer.base(x)})
    assert error(torch.ones(2), torch.ones(2).double()) == 0
