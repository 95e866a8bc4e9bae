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
    """Write experts and gates to one safetensors file, bit for bit and atomically.

    Args:
        bank: The experts.
        path: The file.
        gates: Gates between exactly these experts, or None.

    Raises:
        MoleFileError: The file could not be written.
        MoleKeyError: Gates of other experts.
    """
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
    """Read a single file of ours.

    Args:
        path: The file.

    Returns:
        (experts, gates); None where the file has no gates.

    Raises:
        MoleFileError: Not a file of ours, or broken.
        MoleKeyError: Tensors that the metadata do not name.
        MoleShapeError: Tensors that do not fit each other.
        MoleValueError: NaN or Inf.
    """
    tensors, metadata = read_tensors(path)
    source = os.fsdecode(path)
    experts, rest = experts_from_tensors(tensors, metadata, source)
    return ExpertBank(experts), gates_from_tensors(rest, metadata, source)
