"""What an eager call of an accelerated layer costs in Python calls, and what it must not do at each call."""

from __future__ import annotations

import pytest
import torch

import mole_kernels as mk
from tests.calls import python_calls
from tests.peft_models import K, draw, twins

pytest.importorskip("peft")


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("loaded", [0, 20])
def test_calls_of_a_layer(count: int, loaded: int):
    _, fast = twins((4,) * (count + loaded))
    fast[0].set_adapter([f"a{i}" for i in range(count)])
    layer, x = fast[0].eval(), draw(1, 7, K)
    with torch.no_grad():
        layer(x)
        calls = python_calls(lambda: layer(x))
    assert len(calls) <= 25, "\n".join(calls)


def test_no_call_asks_the_environment_or_a_backend_again(monkeypatch: pytest.MonkeyPatch):
    _, fast = twins((4, 2))
    x = draw(1, 7, K)
    with torch.no_grad():
        fast(x)
        mk.status(reset=True)
        calls = python_calls(lambda: fast(x))
    assert not [
        name
        for name in calls
        if "py:reason_against" in name or name.startswith(("settings.py", "select.py", "os"))
    ]
    # backends of other devices are no news
    assert mk.status()["refusals"] == {}
