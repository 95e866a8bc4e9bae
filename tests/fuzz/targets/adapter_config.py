"""PEFT's settings in a file's metadata: ranks, alphas, patterns."""

from __future__ import annotations

import math

from mole_kernels.errors import MoleError
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io.adapter_config import KEY, AdapterConfig, adapter_metadata
from mole_kernels.io.experts import expert_from_tensors
from tests.fuzz.meeting import numbers, text

JSON = True
TENSORS = {
    f"{path}.lora_{half}.weight": numbers(*shape)
    for path in ("unet.mid_block.proj_in", "unet.down.to_q", "text_encoder.q_proj")
    for half, shape in (("A", (2, 3)), ("B", (4, 2)))
}


def check(data: bytes) -> None:
    config = AdapterConfig.from_metadata({KEY: text(data)}, "file")
    for rank in (1, 2, 8):
        try:
            config.scale("unet.mid_block.proj_in", rank, "file")
        except MoleError:
            continue
    expert = expert_from_tensors(TENSORS, {KEY: text(data)}, "file")
    assert all(math.isfinite(layer.scale) for layer in expert.layers.values())
    told = AdapterConfig.from_metadata(adapter_metadata(Expert(expert.layers)), "again")
    for path, layer in expert.layers.items():
        # α is kept, s = α/r: one rounding each way
        assert math.isclose(told.scale(path, layer.rank, "again"), layer.scale, rel_tol=1e-12), path
