"""GPU cases as pytest-benchmark sees them: `pytest benchmarks --benchmark-enable` on a machine with an NVIDIA
GPU. `make gpu` says more.

Each call ends with a synchronisation, so the times hold the launch; graphs, cold caches and paired ratios are
`make gpu`'s.
"""

import pytest
import torch

from benchmarks.cases import layers
from benchmarks.gpu import rules
from benchmarks.gpu.context import Context
from benchmarks.gpu.layers import ALLOWED, ROUNDINGS
from benchmarks.gpu.methods import TRUTHS, methods
from benchmarks.gpu.plan import FLUX, SDXL, of_rank
from benchmarks.gpu.training import step_of
from benchmarks.layer import Layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")

CASES = [of_rank(c, R) for model in (SDXL, FLUX) for c in layers(model)[:4] for R in (16, 64)]
NAMES = (
    "plain",
    "ours",
    "triton:persistent",
    "triton:two_pass",
    "triton:added",
    "stacked",
    "lorafusion",
    "eager",
    "peft",
    "compiled",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(benchmark, case, name):
    context = Context.make("cuda")
    method = methods(case, context, compiled=True)[name]
    if method.refuses is not None:
        pytest.skip(method.refuses)
    with torch.no_grad():
        layer = Layer.make(case, device="cuda")
        module = method.make(layer).eval()
        y, truth = module(layer.x), TRUTHS.get(name, Layer.truth)(layer)
        if method.ours:
            assert not rules.broken(y, truth, y.dtype, ROUNDINGS)
        else:
            assert rules.relative(y, truth) <= ALLOWED[case.dtype]
        benchmark.group = str(case)
        benchmark(lambda: (module(layer.x), torch.cuda.synchronize()))


@pytest.mark.parametrize("name", ("plain", "ours", "stacked", "eager"))
@pytest.mark.parametrize("case", [of_rank(c, 64, mode="training") for c in layers(SDXL)[:3]], ids=str)
def test_training_step(benchmark, case, name):
    step = step_of(name, case, "cuda")
    assert all(rules.relative(g, t) <= 0.05 for g, t in zip(step.run(), step.truth()))
    benchmark.group = str(case)
    benchmark(lambda: (step.run(), torch.cuda.synchronize()))
