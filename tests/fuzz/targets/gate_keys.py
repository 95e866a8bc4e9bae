"""Keys of a gate file, one a line: MoLE's own names and ours."""

from __future__ import annotations

import json

from torch import Tensor

from mole_kernels.errors import MoleError
from mole_kernels.experts.format import stamp
from mole_kernels.files.writer import atomic_save
from mole_kernels.io.gates import OFFICIAL_NAMES, load_gates, save_gates
from tests.fuzz.meeting import folder, numbers, same, text

JSON = False
OURS = stamp() | {"gates": json.dumps({"experts": OFFICIAL_NAMES, "metadata": {}})}
SHAPES = {
    "Phi_1.weight": (2, 3),
    "Phi_1.bias": (2,),
    "phi": (2, 3),
    "phi_bias": (2,),
    "head": (2, 4),
    "head_bias": (2,),
}


def check(data: bytes) -> None:
    tensors = {}
    for key in text(data).split("\n")[:64]:
        ending = next((end for end in SHAPES if key.endswith(f".{end}")), "")
        tensors[key] = numbers(*SHAPES.get(ending, (1, 4) if key.endswith("weight") else (1,)))
    for metadata in ({}, OURS):
        try:
            check_file(tensors, metadata)
        except MoleError:
            if metadata:
                raise


def check_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path, again = folder() / "gates.safetensors", folder() / "gates2.safetensors"
    atomic_save(tensors, path, metadata)
    found = load_gates(path)
    save_gates(found, again)
    back = load_gates(again)
    assert back.expert_names == found.expert_names and list(back.layers) == list(found.layers)
    for key, layer in found.layers.items():
        assert all(same(back.layers[key].present()[name], tensor) for name, tensor in layer.present().items())
