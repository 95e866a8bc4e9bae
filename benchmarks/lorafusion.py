"""A peer: LoRAFusion's scheme, written anew. A library makes h = x Aᵀ; one Triton product starts its
accumulator from (γ h) Bᵀ.

    y = (γ ⊙ h) Bᵀ + x Wᵀ + b          two launches where there are no gates, and torch's small ones for γ
    where there are

Source of the scheme: LoRAFusion (Zhu et al., 2025), the graph-splitting forward. Its tile is the fastest of
`TILES` for the shape, tried
before anything is measured.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.layer import Layer
from benchmarks.peers import Stacked


@dataclass(frozen=True)
class Tile:
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
)
SMALL = (Tile(32, 32, 32, 4, 2),)


def why_not(device: str) -> str | None:
    """Why it cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if device == "cuda" or ours.interpreting() else "needs an NVIDIA GPU"


class LoRAFusion(nn.Module):
    """The layer by that scheme; `tile` None takes the fastest."""

    def __init__(self, layer: Layer, tile: Tile | None = None) -> None:
        super().__init__()
        self.stacked, e = Stacked(layer), layer.experts.operands()
        self.weight, self.bias, self.up = layer.base.weight, layer.base.bias, e.up[0]
        self.tile = tile or self.fastest(layer.x)

    def fastest(self, x: Tensor) -> Tile:
        if x.device.type != "cuda":
            return SMALL[0]
        best, least = TILES[0], float("inf")
        for tile in TILES:
            self.tile = tile
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            try:
                self(x)
                begin.record()
                for _ in range(5):
                    self(x)
                end.record()
                end.synchronize()
            # a tile too large for this GPU's shared memory; which class Triton raises depends on its version
            except Exception:
                torch.cuda.synchronize()
                continue
            if begin.elapsed_time(end) < least:
                best, least = tile, begin.elapsed_time(end)
        return best

    def forward(self, x: Tensor) -> Tensor:
        z = self.stacked.gated(x) if self.stacked.token_weight is not None else self.ungated(x)
        y = torch.empty(*x.shape[:-1], self.weight.shape[0], dtype=x.dtype, device=x.device)
        M, K, N, R = z.shape[0], x.shape[-1], self.weight.shape[0], z.shape[-1]
        t = self.tile
        arguments: dict[str, Any] = dict(
            x=x,
            w=self.weight,
            z=z,
            up=self.up,
            bias=z if self.bias is None else self.bias,
            y=y,
            M=M,
            K=K,
            N=N,
            R=R,
            sxm=x.stride(-2),
            swn=self.weight.stride(0),
            sun=self.up.stride(0),
            BIAS=self.bias is not None,
            EVEN_K=K % t.BK == 0,
            BM=t.BM,
            BN=t.BN,
            BK=t.BK,
            BR=min(64, max(16, 1 << (R - 1).bit_length())),
        )
        if x.device.type == "cuda":
            arguments |= dict(num_warps=t.warps, num_stages=t.stages)
        _kernel()[(-(-M // t.BM) * -(-N // t.BN),)](**arguments)
        return y

    def ungated(self, x: Tensor) -> Tensor:
        """s·h: the scale is one small launch here; LoRAFusion folds it into A, so A is scaled beforehand."""
        return nn.functional.linear(x, self.scaled_down()).view(-1, self.up.shape[1])

    def scaled_down(self) -> Tensor:
        if not hasattr(self, "_down"):
            per_row = self.stacked.scale.repeat_interleave(
                torch.tensor(self.stacked.ranks, device=self.up.device)
            )
            self._down = (self.stacked.down.float() * per_row[:, None]).to(self.stacked.down.dtype)
        return self._down


def _kernel() -> Any:
    from benchmarks.lorafusion_kernel import fused_kernel

    return fused_kernel
