"""Gradients of gradients through accelerated layers and through groups: those of PEFT, and of the layers
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from tests.peft_models import K, N, calls, draw, twins

pytest.importorskip("peft")


class Squared(nn.Linear):
    """A base that must be called, and is not linear in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def second_order(model: Any, x: Tensor) -> list[Tensor | None]:
    """Gradients of a penalty on first gradients, with respect to the input and every parameter."""
    x = x.clone().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(model(x).square().sum(), [x, *parameters], create_graph=True)
    # a mixture of all of them, no two alike
    penalty = sum((i + 1) * g.square().sum() for i, g in enumerate(first))
    return list(torch.autograd.grad(penalty, [x, *parameters], allow_unused=True))


def make_called(layer: Any) -> None:
    base = Squared(K, N).double().requires_grad_(False)
    base.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = base


CHANGES: dict[str, Callable[[Any], Any]] = {
    "the operator": lambda layer: None,
    "the base called": make_called,
    "the base trains": lambda layer: layer.base_layer.requires_grad_(True),
    "an adapter of weight zero": lambda layer: layer.set_scale("a1", 0.0),
    "scales as tensors": lambda layer: layer.scaling.update(a0=torch.tensor(0.3, dtype=torch.float64)),
    "PEFT's own forward": lambda layer: layer.lora_A["a0"].register_forward_hook(lambda m, a, y: 2 * y),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("ranks", [(4,), (4, 2)], ids=str)
def test_gradient_of_a_gradient_is_pefts(name: str, ranks: tuple[int, ...]):
    plain, fast = twins(ranks, torch.float64)
    for model in (plain, fast):
        if name != "an adapter of weight zero" or len(ranks) > 1:
            CHANGES[name](model[0])
    mk.status(reset=True)
    x = draw(2, 7, K, dtype=torch.float64)
    theirs, ours = second_order(plain, x), second_order(fast, x)
    assert sum(calls()[1].values()) == (name == "PEFT's own forward")
    for want, got in zip(theirs, ours, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gates", [None, "mole", "local"])
@pytest.mark.parametrize("same", [False, True], ids=["different-A", "equal-A"])
def test_gradient_of_a_gradient_through_a_group_is_its_layers(gates: str | None, same: bool):
    from tests.grouping.test_group import Twins

    t = Twins(gates, same)
    outs = []
    for model, handle in zip(t.models, t.handles):
        model.double()
        handle.experts_require_grad()
        handle.gates_require_grad()
        outs.append(second_order(model, t.x.double()))
    assert t.groups.report()["computed"] == 1
    assert len(outs[0]) > 6
    for want, got in zip(*outs, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want)
