"""What a gate file's metadata say: whose row is whose."""

from __future__ import annotations

from mole_kernels.io.gates import gates_from_tensors, gates_to_tensors
from tests.fuzz.meeting import numbers, same, text

JSON = True


def check(data: bytes) -> None:
    tensors = {
        f"gate.unet.x.{name}": numbers(2, *more)
        for name, more in (("phi", (3,)), ("phi_bias", ()), ("head", (4,)), ("head_bias", ()))
    }
    found = gates_from_tensors(tensors, {"gates": text(data)}, "gates")
    assert found is not None and len(found.expert_names) == 2
    back = gates_from_tensors(*gates_to_tensors(found), "again")
    assert back is not None and back.expert_names == found.expert_names and back.metadata == found.metadata
    assert all(
        same(tensor, back.layers["unet.x"].present()[name])
        for name, tensor in found.layers["unet.x"].present().items()
    )
