"""Gates: how much of each expert a token and a sample get. `mk.gates.MoLEGate` and its like.

Names are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BlockGate": "block",
    "BlockRouter": "block",
    "BlockRouting": "block",
    "Clock": "schedule",
    "ClusterGate": "softmax",
    "ConstantGate": "gate",
    "Gate": "gate",
    "GivenGate": "softmax",
    "MaskGate": "gate",
    "MoLEGate": "gate",
    "SampleGate": "gate",
    "ScheduleGate": "schedule",
    "SoftmaxGate": "softmax",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mole_kernels.gates' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mole_kernels.gates.{_HOME[name]}"), name)
    globals()[name] = value
    return value
