"""What a patch knows of one layer that it changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate


@dataclass
class Patched:
    """One patched layer: its module, what was put on it, its own parameters' requires_grad before, and each
    expert's rank.

    A rank is smaller than the packed one after a swap to a smaller expert; 0 where the new expert lacks the
    layer.
    """

    path: str
    module: nn.Module
    experts: LayerExperts
    gate: Gate | None
    flags: dict[str, bool]
    ranks: dict[str, int]
