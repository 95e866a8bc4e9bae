"""Keys of a LoRA file, one a line, in whatever dialect: read, written as diffusers has it, and read again."""

from __future__ import annotations

from mole_kernels.errors import MoleKeyError
from mole_kernels.io.dialects.keys import parse_key
from mole_kernels.io.experts import load_expert
from mole_kernels.io.save import expert_tensors
from tests.fuzz.meeting import numbers, same, text

JSON = False


def check(data: bytes) -> None:
    tensors = {}
    for key in text(data).split("\n")[:64]:
        part = parse_key(key)
        half = part.half if part is not None else "down"
        tensors[key] = {"down": numbers(2, 3), "up": numbers(4, 2), "alpha": numbers()}[half]
    expert = load_expert(tensors)
    try:
        written, metadata = expert_tensors(expert, "diffusers", None, False)
    # flat names that no table knows have no dotted form
    except MoleKeyError:
        return
    assert not metadata or expert.layers
    again = load_expert(written)
    assert sorted(again.layers) == sorted(expert.layers)
    for path, layer in expert.layers.items():
        assert same(again.layers[path].down, layer.down) and same(again.layers[path].up, layer.up)
