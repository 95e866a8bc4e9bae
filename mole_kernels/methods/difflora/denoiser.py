"""The denoiser: a DiT over a LoRA's latent, with AdaLN-zero, that predicts the clean latent."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleValueError, printable

MOST_LAYERS = 1024


@dataclass(frozen=True)
class DenoiserConfig:
    """The shape of a denoiser.

    Args:
        latent_channels: C of the autoencoder's latent [C,L].
        latent_length: L of the autoencoder's latent [C,L].
        condition_dim: Width of the mixed features.
        depth: Layers; the paper has 16.
        width: Width of each token; the paper has 1454.
        heads: Any number: each is width / heads wide, up to the next multiple of 8 (1454 = 2 · 727
            divides by no useful one).
        patch: Positions of the latent in one token; the latent is padded to a multiple (ours).
    """

    latent_channels: int
    latent_length: int
    condition_dim: int
    depth: int = 16
    width: int = 1454
    heads: int = 16
    patch: int = 16
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "latent_length", "condition_dim", "depth", "width", "heads", "patch"):
            if getattr(self, name) < 1:
                raise MoleValueError(
                    f"DenoiserConfig: {name}", expected="at least 1", got=getattr(self, name)
                )
        # settings come out of files too
        if self.depth > MOST_LAYERS:
            raise MoleValueError(
                "DenoiserConfig: depth", expected=f"at most {MOST_LAYERS}", got=printable(self.depth)
            )

    @property
    def tokens(self) -> int:
        return -(-self.latent_length // self.patch)

    @property
    def head_dim(self) -> int:
        return -(-self.width // (8 * self.heads)) * 8

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LoRADenoiser(nn.Module):
    """x0 = f(x_t [B,C,L], t [B], c [B,condition_dim]) -> [B,C,L].

    DiT blocks (Peebles and Xie 2023): shift, scale and gate of each norm come from t and c, the gates start
    at zero, so that a new
    block is the identity. `null` is the learned condition of no person, for classifier-free guidance.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Linear(c.patch * c.latent_channels, c.width)
        self.place = nn.Parameter(torch.randn(c.tokens, c.width) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.condition = nn.Linear(c.condition_dim, c.width)
        self.null = nn.Parameter(torch.randn(c.condition_dim) * 0.02)
        self.blocks = nn.ModuleList(
            DiTBlock(c.width, c.heads, c.head_dim, c.mlp_ratio) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(c.width, 2 * c.width)
        self.out = nn.Linear(c.width, c.patch * c.latent_channels)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """condition None: the null condition for every sample."""
        c = self.config
        if x.dim() != 3 or x.shape[1:] != (c.latent_channels, c.latent_length):
            raise MoleShapeError(
                "LoRADenoiser", expected=f"x [B,{c.latent_channels},{c.latent_length}]", got=tuple(x.shape)
            )
        condition = self.null.expand(x.shape[0], -1) if condition is None else condition
        if condition.shape != (x.shape[0], c.condition_dim):
            raise MoleShapeError(
                "LoRADenoiser",
                expected=f"condition [{x.shape[0]},{c.condition_dim}]",
                got=tuple(condition.shape),
            )
        padded = F.pad(x, (0, c.tokens * c.patch - c.latent_length))
        tokens = padded.unflatten(2, (c.tokens, c.patch)).transpose(1, 2).flatten(2)
        h = self.embed(tokens) + self.place
        emb = F.silu(self.time(timestep_features(t.expand(x.shape[0]), x.dtype)) + self.condition(condition))
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, -1)
        out = self.out(self.norm(h) * (1 + scale) + shift)
        return (
            out.unflatten(2, (c.latent_channels, c.patch)).transpose(1, 2).flatten(2)[..., : c.latent_length]
        )


class DiTBlock(nn.Module):
    """h + g₁·Attention(norm(h)·(1+a₁)+b₁), then h + g₂·MLP(norm(h)·(1+a₂)+b₂); a, b, g from the embedding,
    zero at the start.
    """

    def __init__(self, width: int, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, inner, hidden = heads, heads * head_dim, int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        q, k, v = (
            self.to_qkv(self.norm1(h) * (1 + scale1) + shift1)
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        h = h + gate1 * self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


def timestep_features(t: Tensor, dtype: torch.dtype, width: int = 256) -> Tensor:
    """Sines and cosines of t [B] at 128 frequencies from 1 to 1/10000: [B,256]."""
    frequency = torch.exp(
        -math.log(10_000) * torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2)
    )
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)
