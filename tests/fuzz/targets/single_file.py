"""The metadata of our own single file, and what is written of what was read."""

from __future__ import annotations

import json

from mole_kernels.experts.format import experts_from_tensors, stamp, tensors_of_experts
from tests.fuzz.meeting import numbers, same, text

JSON = True
TENSORS = {
    f"expert.{name}.{path}.{half}": numbers(*shape)
    for name, path in (("a", "unet.x"), ("a", "unet.y"), ("b", "unet.x"))
    for half, shape in (("down", (2, 3)), ("up", (4, 2)))
}


def check(data: bytes) -> None:
    bank, rest = experts_from_tensors(TENSORS, stamp() | {"experts": text(data)}, "file")
    assert not rest
    tensors, metadata = tensors_of_experts(bank)
    again, _ = experts_from_tensors(tensors, metadata, "again")
    assert list(again) == list(bank) and tensors_of_experts(again)[1] == metadata
    assert all(same(tensors[key], tensor) for key, tensor in TENSORS.items())
    assert json.loads(metadata["experts"])
