"""One double and one single block of FLUX.1's kind in plain torch, with its real linear sizes: for machines
without diffusers.

Joint attention over text and picture tokens, GELU, modulation from one vector; no rotary embedding (it has no
linear layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    width: int = 3072
    heads: int = 24
    picture: int = 4096
    text: int = 512


TINY = Sizes(64, 2, 48, 16)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B,T,C] each -> [B,T,C]"""
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Stream(nn.Module):
    """What a double block has for each of its two streams."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Linear(width, 6 * width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Double(nn.Module):
    """Two streams with their own weights that attend to each other."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.picture, self.text = sizes.heads, Stream(sizes.width), Stream(sizes.width)

    def forward(self, x: Tensor, c: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        streams, inputs = (self.text, self.picture), (c, x)
        mods = [s.norm(F.silu(vector))[:, None].chunk(6, -1) for s in streams]
        normed = [modulated(t, m[0], m[1]) for t, m in zip(inputs, mods)]
        q, k, v = (
            torch.cat([getattr(s, n)(t) for s, t in zip(streams, normed)], 1)
            for n in ("to_q", "to_k", "to_v")
        )
        mixed = attention(q, k, v, self.heads).split([c.shape[1], x.shape[1]], 1)
        outputs = []
        for s, t, m, a in zip(streams, inputs, mods, mixed):
            t = t + m[2] * s.to_out(a)
            outputs.append(t + m[5] * s.down(F.gelu(s.up(modulated(t, m[3], m[4])), approximate="tanh")))
        return outputs[1], outputs[0]


class Single(nn.Module):
    """One stream over both kinds of token; attention and MLP side by side, one product out of both."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.norm = nn.Linear(width, 3 * width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.proj_mlp, self.proj_out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale, gate = self.norm(F.silu(vector))[:, None].chunk(3, -1)
        t = modulated(x, shift, scale)
        a = attention(self.to_q(t), self.to_k(t), self.to_v(t), self.heads)
        return x + gate * self.proj_out(torch.cat([a, F.gelu(self.proj_mlp(t), approximate="tanh")], -1))


class Blocks(nn.Module):
    """forward(x [B,T,C], c [B,L,C], vector [B,C]) -> [B,T,C]"""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.first, self.second = Double(sizes), Single(sizes)

    def forward(self, x: Tensor, c: Tensor, vector: Tensor) -> Tensor:
        x, c = self.first(x, c, vector)
        return self.second(torch.cat([c, x], 1), vector)[:, c.shape[1] :]
