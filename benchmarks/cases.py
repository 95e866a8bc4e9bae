"""What is measured: layer shapes of real models, with the work that the mathematics needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

SHAPES = Path(__file__).with_name("linear_shapes.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One layer of `model`: x [2,M/2,K] -> [2,M/2,N], E experts of rank r with MoLE's local and global gates."""

    model: str
    M: int
    K: int
    N: int
    bias: bool
    dtype: str = "fp32"
    r: int = 16
    E: int = 2
    mode: str = "forward"

    def __str__(self) -> str:
        return f"{self.mode}-{self.M}x{self.K}x{self.N}-{self.dtype}-r{self.r}"

    @property
    def R(self) -> int:
        return self.E * self.r

    @property
    def base_flops(self) -> int:
        return 2 * self.M * self.K * self.N

    @property
    def flops(self) -> int:
        """forward: base, shrink with E token logits, expand.
        backward: dx with dh·A and dlogit·Φ, V = dy·B, dA, dΦ and dB."""
        if self.mode == "forward":
            return 2 * self.M * (self.K * self.N + (self.R + self.E) * self.K + self.R * self.N)
        return 2 * self.M * (self.K * self.N + 2 * (self.R + self.E) * self.K + 2 * self.R * self.N)

    @property
    def flop_ratio(self) -> float:
        return self.flops / self.base_flops

    @property
    def bytes_min(self) -> int:
        """Each input read once, each output written once."""
        M, K, N, R, E = self.M, self.K, self.N, self.R, self.E
        elements = M * (K + N) + N * K + R * (K + N) + E * K
        if self.mode == "backward":
            elements += M * (K + R) + R * (K + N) + E * K
        return elements * (4 if self.dtype == "fp32" else 2)


def shapes(models: tuple[str, ...], most_gflop: float) -> list[Case]:
    """The distinct M,K,N of the attention blocks of `models` (what MoLE adapts), M halved until the plain layer is affordable."""
    found: dict[tuple[int, int, int], Case] = {}
    for entry in json.loads(SHAPES.read_text()):
        if entry["model"] not in models or "attentions" not in entry["module_pattern"]:
            continue
        M, K, N = entry["M"], entry["K"], entry["N"]
        while most_gflop < 2e-9 * M * K * N and M > 256:
            M //= 2
        case = found.get((M, K, N)) or Case(entry["model"], M, K, N, entry["bias"])
        found[M, K, N] = replace(case, model=case.model if entry["model"] in case.model else f"{case.model}, {entry['model']}")
    return sorted(found.values(), key=lambda c: (c.K * c.N, c.M))


def suite(most_gflop: float = 3.4, ranks: tuple[int, ...] = (16, 64, 256), dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[Case]:
    """Forward: every shape, dtype and rank. Backward: the shapes below 1 Gflop and the three of each width, ranks 16 and 64."""
    layers = shapes(("SD1.5-UNet", "SDXL-UNet"), most_gflop)
    forward = [replace(c, dtype=d, r=r) for c in layers for d in dtypes for r in ranks]
    some = [c for c in layers if c.base_flops < 1e9 or c.K == c.N]
    backward = [replace(c, dtype=d, r=r, mode="backward") for c in some for d in dtypes for r in ranks if r <= 64]
    return forward + backward
