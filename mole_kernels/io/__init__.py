"""LoRA files, gate files and our single file, in and out."""

from mole_kernels.files.reader import read_header, read_tensors
from mole_kernels.files.writer import atomic_save
from mole_kernels.io.bank import load_bank, save_bank
from mole_kernels.io.experts import load_expert
from mole_kernels.io.gates import GateFile, GateTensors, load_gates, save_gates
from mole_kernels.io.save import save_expert

__all__ = [
    "GateFile",
    "GateTensors",
    "atomic_save",
    "load_bank",
    "load_expert",
    "load_gates",
    "read_header",
    "read_tensors",
    "save_bank",
    "save_expert",
    "save_gates",
]
