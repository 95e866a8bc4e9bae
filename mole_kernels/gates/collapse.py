"""A gate over expert outputs, carried over to the rank columns: p = s Bᵀ head, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mole_kernels.backends.columns import widen
from mole_kernels.ops.direct import unobserved
from mole_kernels.precision import gate_dtype, no_autocast

Ranks = tuple[int, ...]


def collapsed(up: Tensor, scale: Tensor, head: Tensor, ranks: Ranks) -> Tensor:
    """p [S,R], p_r = s_e Σ_n up[n,r] head[e,n] for column r of expert e.  up [S,N,R]  scale [E]  head [E,N]; p in the gates' dtype"""
    with no_autocast(up.device.type):
        if torch.is_grad_enabled() and unobserved((up, scale, head)):
            return Collapse.apply(up, scale, head, ranks)  # type: ignore[no-untyped-call]
        return _collapse(up, scale, head, ranks)


def _collapse(up: Tensor, scale: Tensor, head: Tensor, ranks: Ranks) -> Tensor:
    E, (S, _, R), wide = len(ranks), up.shape, gate_dtype(head.dtype)
    scaled, up = head.to(wide) * scale.to(wide)[:, None], up.to(wide)
    # [S,E,R]: each head row against every column; expert e then keeps its own
    every = (scaled @ up[0])[None] if S == 1 else scaled @ up
    if min(ranks) == max(ranks):
        return every.view(S, E, E, ranks[0]).diagonal(dim1=1, dim2=2).mT.reshape(S, R)
    return torch.cat([part[:, e] for e, part in enumerate(every.split(ranks, -1))], -1)


class Collapse(torch.autograd.Function):
    """`_collapse`, and the gradient of its formula: torch's own makes [S,E,R] of it, and multiplies as many zeros as there are experts.

    With q_e[n] = Σ_{s, r∈e} up[s,n,r] dp[s,r]:  dup = s_e head_e dpᵀ   dhead_e = s_e q_e   ds_e = head_e · q_e
    """

    @staticmethod
    def forward(ctx: Any, up: Tensor, scale: Tensor, head: Tensor, ranks: Ranks) -> Tensor:
        ctx.save_for_backward(up, scale, head)
        ctx.ranks = ranks
        return _collapse(up, scale, head, ranks)

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        up, scale, head = ctx.saved_tensors
        n_up, n_scale, n_head, _ = ctx.needs_input_grad
        dup = dscale = dhead = None
        with no_autocast(up.device.type):
            wide_head, wide_scale = head.to(dp.dtype), scale.to(dp.dtype)
            if n_up:
                dup = _outer(wide_head * wide_scale[:, None], dp, ctx.ranks).to(up.dtype)
            if n_scale or n_head:
                parts = zip(up.to(dp.dtype).split(ctx.ranks, -1), dp.split(ctx.ranks, -1))
                q = torch.stack([(b @ d[..., None]).sum(0)[:, 0] for b, d in parts])
                dscale = (wide_head * q).sum(-1).to(scale.dtype) if n_scale else None
                dhead = (wide_scale[:, None] * q).to(head.dtype) if n_head else None
        return dup, dscale, dhead, None


def _outer(rows: Tensor, columns: Tensor, ranks: Ranks) -> Tensor:
    """rows [E,N], columns [S,R] -> [S,N,R]: each expert's row times its columns."""
    E, S = len(ranks), columns.shape[0]
    if min(ranks) == max(ranks):
        return (rows.mT[:, :, None] * columns.view(S, 1, E, ranks[0])).flatten(2)
    return widen(rows.mT, ranks) * columns[:, None]
