"""An expert that is swapped keeps its place among the others, whatever its rank, and so do its gates."""

import copy

import pytest
import torch

from mole_kernels.gates.gate import MoLEGate
from mole_kernels.patching.apply import patch
from tests.tiny_models import Mlp, make_expert

X = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))
NAMES = ("a", "b", "c")


def mlp():
    torch.manual_seed(0)
    return Mlp()


def patched(ranks, gates):
    """Three experts, each gate row of its own: which expert a row weighs is seen in the output."""
    model = mlp()
    experts = {
        name: make_expert(model, rank=rank, seed=i) for i, (name, rank) in enumerate(zip(NAMES, ranks))
    }
    torch.manual_seed(7)
    handle = patch(model, experts, gates, scales={"a": 0.5, "b": 2.0, "c": 1.0})
    for module in handle.layers.values():
        if isinstance(module.gate, MoLEGate):
            with torch.no_grad():
                for i, parameter in enumerate(module.gate.parameters()):
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 3
                    )
    return model, handle


@pytest.mark.parametrize("gates", [None, "mole", "local", "global"])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_swap_is_a_fresh_patch(name, rank, gates):
    model, handle = patched((2, 2, 2), gates)
    new = make_expert(mlp(), rank=rank, seed=9)
    handle.swap(name, new)
    fresh = mlp()
    experts = {n: make_expert(fresh, rank=2, seed=i) for i, n in enumerate(NAMES)} | {name: new}
    other = patch(fresh, experts, handle.gates(), scales={"a": 0.5, "b": 2.0, "c": 1.0})
    torch.testing.assert_close(model(X), fresh(X))
    assert handle.names == other.names == NAMES
    for path, module in handle.layers.items():
        assert module.experts.names == other.layers[path].experts.names
    # and back again
    handle.swap(name, make_expert(mlp(), rank=2, seed=NAMES.index(name)))
    before, _ = patched((2, 2, 2), gates)
    torch.testing.assert_close(model(X), before(X))


@pytest.mark.parametrize("gates", [None, "mole"])
def test_swaps_of_several_ranks_one_after_the_other(gates):
    model, handle = patched((1, 2, 3), gates)
    held = copy.deepcopy(handle.gates())
    for name, rank, seed in (("b", 4, 5), ("c", 2, 6), ("a", 3, 7), ("b", 1, 8)):
        handle.swap(name, make_expert(mlp(), rank=rank, seed=seed))
    fresh = mlp()
    last = {"a": (3, 7), "b": (1, 8), "c": (2, 6)}
    experts = {n: make_expert(fresh, rank=last[n][0], seed=last[n][1]) for n in NAMES}
    patch(fresh, experts, held, scales={"a": 0.5, "b": 2.0, "c": 1.0})
    torch.testing.assert_close(model(X), fresh(X))
