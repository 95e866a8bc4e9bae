"""The single file: all experts and, when given, the gates between them."""

from __future__ import annotations

import os

from mole_kernels.errors import MoleKeyError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.format import experts_from_tensors, tensors_of_experts
from mole_kernels.files.opening import PathLike
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save
from mole_kernels.io.gates import GateFile, gates_from_tensors, gates_to_tensors


def save_bank(bank: ExpertBank, path: PathLike, gates: GateFile | None = None) -> None:
    """Write experts and gates to one safetensors file, bit for bit and atomically."""
    tensors, metadata = tensors_of_experts(bank.experts)
    if gates is not None:
        if set(gates.expert_names) != set(bank.names):
            raise MoleKeyError(
                "save_bank",
                expected=f"gates of the experts {', '.join(bank.names)}",
                got=", ".join(gates.expert_names),
            )
        gate_tensors, about_gates = gates_to_tensors(gates)
        tensors, metadata = tensors | gate_tensors, metadata | about_gates
    atomic_save(tensors, path, metadata)


def load_bank(path: PathLike) -> tuple[ExpertBank, GateFile | None]:
    """The experts and, where the file has them, the gates."""
    tensors, metadata = read_tensors(path)
    source = os.fsdecode(path)
    experts, rest = experts_from_tensors(tensors, metadata, source)
    return ExpertBank(experts), gates_from_tensors(rest, metadata, source)
