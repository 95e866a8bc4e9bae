"""The list of concepts to fuse: paths, names and alphas of a stranger's JSON."""

from __future__ import annotations

import math

import torch

from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io.mix_of_show import save_mix_of_show
from mole_kernels.methods.mix_of_show.concept import load_fusion_config
from tests.fuzz.meeting import file_of, folder

JSON = True


def check(data: bytes) -> None:
    concept = folder() / "c.pth"
    if not concept.exists():
        layer = LowRank(torch.ones(1, 2), torch.ones(2, 1))
        save_mix_of_show(
            Expert({"unet.x.to_q": layer}),
            {"text_encoder": {"<c1>": torch.ones(2, 3), "<c2>": torch.ones(2, 3)}},
            concept,
        )
    for found in load_fusion_config(file_of(data, "concepts.json")):
        assert found.name.split() == list(found.embeddings) or set(found.name.split()) == set(
            found.embeddings
        )
        assert math.isfinite(found.alpha("unet.x.to_q"))
