"""Gates: how much of each expert a token and a sample get. `mk.gates.MoLEGate` and its like.

Names are fetched when first used.
"""

from __future__ import annotations

from mole_kernels.doors import door

_HOME = {
    "BlockGate": "mole_kernels.gates.block",
    "BlockRouter": "mole_kernels.gates.block",
    "BlockRouting": "mole_kernels.gates.block",
    "Clock": "mole_kernels.gates.schedule",
    "ClusterGate": "mole_kernels.gates.softmax",
    "ConstantGate": "mole_kernels.gates.gate",
    "Gate": "mole_kernels.gates.gate",
    "GivenGate": "mole_kernels.gates.softmax",
    "MaskGate": "mole_kernels.gates.gate",
    "MoLEGate": "mole_kernels.gates.gate",
    "SampleGate": "mole_kernels.gates.gate",
    "ScheduleGate": "mole_kernels.gates.schedule",
    "SoftmaxGate": "mole_kernels.gates.softmax",
    "k_lora": "mole_kernels.gates.schedule",
    "scheduled": "mole_kernels.gates.schedule",
    "switch": "mole_kernels.gates.schedule",
    "TimeGate": "mole_kernels.gates.time",
    "Timestep": "mole_kernels.gates.time",
}

__all__ = list(_HOME)


__getattr__, __dir__ = door(__name__, _HOME)
