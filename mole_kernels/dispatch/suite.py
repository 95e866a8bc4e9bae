"""The calls that a table is measured on: layers of published models, ranks, kinds of gate, directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mole_kernels.dispatch.work import Use
from mole_kernels.problem import Problem

# model -> (B, T, K, N) of its attention and feed-forward layers, classifier-free guidance as a batch of two
# where it is used
LAYERS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "SDXL": (
        (2, 4096, 640, 640),
        (2, 1024, 1280, 1280),
        (2, 1024, 1280, 10240),
        (2, 1024, 5120, 1280),
        (2, 77, 2048, 1280),
        (2, 4096, 640, 5120),
        (2, 4096, 2560, 640),
        (2, 77, 2048, 640),
    ),
    "FLUX.1": (
        (1, 4608, 3072, 3072),
        (1, 4608, 3072, 12288),
        (1, 4608, 15360, 3072),
        (1, 4096, 12288, 3072),
        (1, 512, 3072, 3072),
        (1, 512, 3072, 12288),
        (1, 512, 12288, 3072),
    ),
    "SD1.5": (
        (2, 4096, 320, 320),
        (2, 1024, 640, 640),
        (2, 256, 1280, 1280),
        (2, 77, 768, 320),
        (2, 4096, 320, 2560),
        (2, 4096, 1280, 320),
        (2, 1024, 640, 5120),
        (2, 1024, 2560, 640),
        (2, 256, 1280, 10240),
        (2, 256, 5120, 1280),
    ),
    "SD3.5-large": (
        (2, 4096, 2432, 2432),
        (2, 4096, 2432, 9728),
        (2, 4096, 9728, 2432),
        (2, 333, 2432, 2432),
        (2, 333, 2432, 9728),
    ),
    "Z-Image": ((1, 4608, 3840, 3840), (1, 4608, 3840, 10240), (1, 4608, 10240, 3840)),
    "Wan2.1": ((1, 32760, 1536, 1536), (1, 32760, 1536, 8960), (1, 32760, 5120, 5120)),
}
QUICK = ("SDXL", "FLUX.1")
RANKS = (8, 16, 32, 64, 128, 256, 512)
# none; MoLE's two; a mask per token; constants
GATES = ("none", "mole", "mask", "fixed")


@dataclass(frozen=True)
class SuiteCase:
    model: str
    problem: Problem
    use: Use


def gated(kind: str) -> dict[str, bool]:
    """Problem's flags for a kind of gate."""
    return dict(token_gate=kind == "mole", sample_gate=kind == "mole", given_gate=kind in ("mask", "fixed"))


def suite(quick: bool = False) -> Iterator[SuiteCase]:
    """Two experts of R/2 each, bfloat16; quick: five layers, two ranks, two kinds of gate."""
    models = QUICK if quick else tuple(LAYERS)
    for model in models:
        for B, T, K, N in LAYERS[model][: 3 if quick else None]:
            for R in (32, 128) if quick else RANKS:
                for kind in GATES[:2] if quick else GATES:
                    problem = Problem(B, T, K, N, (R // 2, R // 2), 1, torch.bfloat16, "cuda", **gated(kind))
                    for use in (Use(), Use(save=True), Use(backward=True)):
                        yield SuiteCase(
                            model, problem, Use(use.backward, use.save, kind == "mask", kind == "mask")
                        )
