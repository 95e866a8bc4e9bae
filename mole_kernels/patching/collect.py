"""Experts and gates read back from patched layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole_kernels.errors import MoleStateError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.gates.gate import MoLEGate
from mole_kernels.io.gates import GateFile, GateTensors
from mole_kernels.layers import sharded
from mole_kernels.layers.conv import conv_of
from mole_kernels.patching.families import completed_by_base

if TYPE_CHECKING:
    from mole_kernels.patching.patched import Patched
    from mole_kernels.patching.plan import Plan


def collect_bank(patched: Iterable[Patched], plan: Plan) -> ExpertBank:
    """Copies of every expert's factors; columns that a swap to a smaller rank left empty are cut off."""
    layers: dict[str, dict[str, LowRank]] = {name: {} for name in plan.names}
    for layer in patched:
        for name in layer.experts.names:
            rank = layer.ranks.get(name, 0)
            if rank and not completed_by_base(plan.experts[name], layer.path):
                whole = layer.experts.factor(name)
                layers[name][layer.path] = LowRank(
                    whole.down[:rank].clone(),
                    whole.up[:, :rank].clone(),
                    whole.scale,
                    conv=conv_of(layer.module),
                )
    experts = {
        name: Expert(
            layers[name],
            dialect="memory",
            source=plan.experts[name].source,
            metadata=plan.experts[name].metadata,
            families=plan.experts[name].families,
        )
        for name in plan.names
    }
    return ExpertBank(experts)


def collect_gates(patched: Iterable[Patched], names: Sequence[str]) -> GateFile | None:
    """Copies of every layer's MoLE gate, one row for each of `names`; rows of experts that a layer lacks are
    zero and never read.
    """
    layers: dict[str, GateTensors] = {}
    for layer in patched:
        if layer.gate is None:
            continue
        if not isinstance(layer.gate, MoLEGate):
            raise MoleStateError(
                "gates", f"{layer.path} has a {type(layer.gate).__name__}; only MoLE gates are kept in files"
            )
        rows = [list(names).index(name) for name in layer.experts.names]
        gate = layer.gate
        layers[layer.path] = GateTensors(
            *(_spread(t, rows, len(names)) for t in (gate.phi, gate.phi_bias, gate.head, gate.head_bias))
        )
    return GateFile(layers, tuple(names), {}) if layers else None


def _spread(tensor: Tensor | None, rows: list[int], count: int) -> Tensor | None:
    if tensor is None:
        return None
    whole = torch.zeros(count, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    whole[rows] = sharded.whole(tensor.detach())
    return whole
