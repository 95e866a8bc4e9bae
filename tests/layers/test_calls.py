"""What an eager call of a layer costs in Python calls. A UNet has 722 adapted layers."""

import pytest
import torch
from torch import nn

import mole_kernels as mk
from mole_kernels.backends import cpu
from mole_kernels.gates import MoLEGate
from tests.calls import python_calls
from tests.truth import Case

pytestmark = pytest.mark.skipif(
    cpu.reason_against(Case().problem(torch.float32)) is not None, reason="needs the compiled library"
)
K, N, RANKS = 16, 12, (4, 4)


def layer_of(gate: str) -> mk.GatedLoRALinear:
    experts = mk.Experts(torch.randn(1, 8, K), torch.randn(1, N, 8), torch.ones(2), RANKS)
    made = MoLEGate(K, N, len(RANKS)) if gate == "mole" else None
    return mk.GatedLoRALinear.from_linear(nn.Linear(K, N), experts, made)


@pytest.mark.parametrize("gate, most", [("none", 12), ("mole", 26)])
@pytest.mark.parametrize("shape", [(2, 5, K), (5, K)], ids=str)
def test_calls_of_a_layer(gate: str, most: int, shape: tuple[int, ...]):
    layer, x = layer_of(gate), torch.randn(shape)
    with torch.no_grad():
        want = layer(x)
        calls = python_calls(lambda: layer(x))
        assert torch.equal(layer(x), want)
    # x [M,K] becomes one sample
    assert len(calls) <= most + (len(shape) == 2), "\n".join(calls)


def test_a_call_asks_neither_the_environment_nor_a_backend_again():
    layer, x = layer_of("mole"), torch.randn(2, 5, K)
    with torch.no_grad():
        layer(x)
        mk.status(reset=True)
        calls = python_calls(lambda: layer(x))
    assert not [
        name
        for name in calls
        if "py:reason_against" in name or name.startswith(("settings.py", "select.py", "os"))
    ]
    assert mk.status()["refusals"] == {}
