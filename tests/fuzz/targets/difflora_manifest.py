"""The layout of a vector of LoRA weights."""

from __future__ import annotations

import torch

from mole_kernels.methods.difflora.manifest import Manifest
from tests.fuzz.meeting import text

JSON = True


def check(data: bytes) -> None:
    manifest = Manifest.from_json(text(data))
    assert Manifest.from_json(manifest.to_json()) == manifest
    if manifest.length < 10_000:
        tensors = manifest.unflatten(torch.zeros(manifest.length))
        assert sum(t.numel() for t in tensors.values()) == manifest.length
        manifest.expert(torch.zeros(manifest.length))
