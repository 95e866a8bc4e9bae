"""What is measured: layer shapes of real models, with the work that the mathematics needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

SHAPES = Path(__file__).with_name("linear_shapes.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATES = {"mole": "token+sample", "none": "none"}
# rows with fewer tokens (time embeddings, modulation) are left out: together they are below 0.1 % of a
# model's operations
LEAST_ROWS = 64


@dataclass(frozen=True)
class Case:
    """One layer of `model`: x [B,M/B,K] -> [B,M/B,N], E experts of rank r with MoLE's local and global gates
    ("mole"), or none.

    mode    "forward", "backward" (gradients alone) or "training" (forward and backward)
    counts  how many layers of this shape each model has: ((model, layers), …)
    """

    model: str
    M: int
    K: int
    N: int
    bias: bool
    dtype: str = "fp32"
    r: int = 16
    E: int = 2
    mode: str = "forward"
    gate: str = "mole"
    B: int = 2
    counts: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        usual = f"{self.mode}-{self.M}x{self.K}x{self.N}-{self.dtype}-r{self.r}"
        return (
            usual + (f"-E{self.E}" if self.E != 2 else "") + (f"-{self.gate}" if self.gate != "mole" else "")
        )

    @property
    def R(self) -> int:
        return self.E * self.r

    @property
    def T(self) -> int:
        return self.M // self.B

    @property
    def columns(self) -> int:
        """Columns of the shrink: h, and a logit for each expert with a token gate."""
        return self.R + (self.E if self.gate == "mole" else 0)

    @property
    def base_flops(self) -> int:
        """Of the plain layer: y, and with gradients dx."""
        return 2 * self.M * self.K * self.N * (2 if self.mode == "training" else 1)

    @property
    def flops(self) -> int:
        """forward: base, shrink with E token logits, expand.
        backward: dx with dh·A and dlogit·Φ, V = dy·B, dA, dΦ and dB."""
        forward = 2 * self.M * (self.K * self.N + self.columns * self.K + self.R * self.N)
        backward = 2 * self.M * (self.K * self.N + 2 * self.columns * self.K + 2 * self.R * self.N)
        return {"forward": forward, "backward": backward, "training": forward + backward}[self.mode]

    @property
    def flop_ratio(self) -> float:
        return self.flops / self.base_flops

    @property
    def size(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def bytes_min(self) -> int:
        """Each input read once, each output written once."""
        M, K, N, R, gates = self.M, self.K, self.N, self.R, self.columns - self.R
        forward = M * (K + N) + N * K + R * (K + N) + gates * K
        backward = forward + M * (K + R) + R * (K + N) + gates * K
        return (
            self.size * {"forward": forward, "backward": backward, "training": forward + backward}[self.mode]
        )

    @property
    def base_bytes(self) -> int:
        """The plain layer's."""
        elements = self.M * (self.K + self.N) + self.N * self.K
        return self.size * elements * (2 if self.mode == "training" else 1)


def layers(model: str, only: str = "") -> list[Case]:
    """The distinct M,K,N of `model`, with their counts; `only` is a part of the module's name."""
    found: dict[tuple[int, int, int], Case] = {}
    for entry in json.loads(SHAPES.read_text()):
        M, K, N = entry["M"], entry["K"], entry["N"]
        if entry["model"] != model or only not in entry["module_pattern"] or M < LEAST_ROWS:
            continue
        case = found.get((M, K, N)) or Case(model, M, K, N, entry["bias"], B=entry["batch"])
        count = dict(case.counts).get(model, 0) + entry["count"]
        # a shape of which some layers have a bias is measured with one
        found[M, K, N] = replace(case, counts=((model, count),), bias=case.bias or entry["bias"])
    return sorted(found.values(), key=lambda c: -c.base_flops * dict(c.counts)[model])


def shapes(models: tuple[str, ...], most_gflop: float) -> list[Case]:
    """The distinct M,K,N of the attention blocks of `models` (what MoLE adapts), M halved until the plain
    layer is affordable.
    """
    found: dict[tuple[int, int, int], Case] = {}
    for entry in json.loads(SHAPES.read_text()):
        if entry["model"] not in models or "attentions" not in entry["module_pattern"]:
            continue
        M, K, N = entry["M"], entry["K"], entry["N"]
        while most_gflop < 2e-9 * M * K * N and M > 256:
            M //= 2
        case = found.get((M, K, N)) or Case(entry["model"], M, K, N, entry["bias"])
        found[M, K, N] = replace(
            case, model=case.model if entry["model"] in case.model else f"{case.model}, {entry['model']}"
        )
    return sorted(found.values(), key=lambda c: (c.K * c.N, c.M))


def suite(
    most_gflop: float = 3.4,
    ranks: tuple[int, ...] = (16, 64, 256),
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
) -> list[Case]:
    """The CPU's. Forward: every shape, dtype and rank. Backward: the shapes below 1 Gflop and the three of
    each width, ranks 16 and 64.
    """
    found = shapes(("SD1.5-UNet", "SDXL-UNet"), most_gflop)
    forward = [replace(c, dtype=d, r=r) for c in found for d in dtypes for r in ranks]
    some = [c for c in found if c.base_flops < 1e9 or c.K == c.N]
    backward = [
        replace(c, dtype=d, r=r, mode="backward") for c in some for d in dtypes for r in ranks if r <= 64
    ]
    return forward + backward
