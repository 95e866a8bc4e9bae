"""The oracle as a backend: expert by expert, for those who debug; slow, and right by inspection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mole_kernels.backends import sets
from mole_kernels.operands import Experts, Gates
from mole_kernels.precision import gate_dtype
from mole_kernels.problem import Problem
from mole_kernels.reference import gated_lora_ref, sets_of

name = "reference"
# dphi_bias and dpool_bias among the nine gradients: in the gates' dtype
BIASES = (6, 8)


def reject(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def forward(
    x,
    weight,
    bias,
    down,
    up,
    scale,
    ranks,
    gate,
    phi,
    phi_bias,
    pool,
    pool_bias,
    save,
    assignment=None,
    top_k=0,
):
    """y, h, l, G in float32 (float64 for float64), rounded to x's dtype once at the end; see docs/design.md
    section 3.
    """
    wide = gate_dtype(x.dtype)

    def cast(*tensors: Tensor | None) -> list[Any]:
        return [None if t is None else t.to(wide) for t in tensors]

    xw, weight, bias = cast(x, weight, bias)
    wide_down, wide_up, wide_scale = cast(down, up, scale)
    experts = Experts(wide_down, wide_up, wide_scale, ranks, assignment)
    y, *gates = gated_lora_ref(
        xw,
        weight,
        bias,
        experts,
        Gates(gate, phi, phi_bias, pool, pool_bias, top_k).map(lambda t: t.to(wide)),
    )
    h = (xw @ sets_of(experts).down.mT).to(x.dtype) if save else x.new_empty(0)
    return (
        y.to(x.dtype).contiguous(),
        h.contiguous(),
        *(xw.new_empty(0) if g is None else g.contiguous() for g in gates),
    )


def backward(
    dy,
    x,
    weight,
    down,
    up,
    scale,
    ranks,
    gate,
    phi,
    pool,
    h,
    token_gate,
    sample_gate,
    need,
    assignment=None,
    top_k=0,
):
    """The nine gradients, one expert at a time, in the gates' dtype; what nobody needs is dropped at the
    end.
    """
    wide = gate_dtype(x.dtype)
    B, T, E = x.shape[0], x.shape[1], len(ranks)
    like = (x, down, up, scale, gate, phi, scale, pool, scale)
    if assignment is not None:
        down, up, pool = (None if t is None else sets.gather(assignment, t) for t in (down, up, pool))
    dyw, xw, hw, downw, upw = (t.to(wide) for t in (dy, x, h, down, up))
    ones = torch.ones(B, T, E, dtype=wide, device=x.device)
    given = ones if gate is None else gate.to(wide).expand(B, T, E)
    local = ones if phi is None else token_gate
    pooled = ones if pool is None else sample_gate[:, None].expand(B, T, E)
    dx, ddown, dup = dyw @ weight.to(wide), torch.zeros_like(downw), torch.zeros_like(upw)
    dscale, dgate = torch.zeros(E, dtype=wide, device=x.device), torch.zeros_like(ones)
    dphi = torch.zeros(E, x.shape[2], dtype=wide, device=x.device)
    dphi_bias, dpool_bias = torch.zeros_like(dscale), torch.zeros_like(dscale)
    dpool = torch.zeros(down.shape[:2], dtype=wide, device=x.device)
    # γ_e D_e: what reaches expert e's token logit through its own gate
    through = torch.zeros_like(ones)
    start = 0
    for e, rank in enumerate(ranks):
        span = slice(start, start + rank)
        start += rank
        A, Bup, he = downw[:, span], upw[:, :, span], hw[..., span]
        gamma = scale[e].to(wide) * given[..., e] * local[..., e] * pooled[..., e]
        V = dyw @ Bup
        D = (V * he).sum(-1)
        dup[:, :, span] = (dyw.mT @ (he * gamma[..., None])).sum_to_size(dup[:, :, span].shape)
        dscale[e] = (D * given[..., e] * local[..., e] * pooled[..., e]).sum()
        dgate[..., e] = D * scale[e].to(wide) * local[..., e] * pooled[..., e]
        dh = gamma[..., None] * V
        if pool is not None:
            dq = (gamma * (1 - pooled[..., e]) * D).sum(1)
            dpool[:, span] = (dq[:, None] * he.sum(1) / max(T, 1)).sum_to_size(dpool[:, span].shape)
            dpool_bias[e] = dq.sum()
            dh = dh + (dq[:, None] * pool[:, span].to(wide))[:, None] / max(T, 1)
        if phi is not None:
            through[..., e] = gamma * D
        ddown[:, span] = (dh.mT @ xw).sum_to_size(ddown[:, span].shape)
        dx = dx + dh @ A
    if phi is not None:
        dlogit = through - local * (through.sum(-1, keepdim=True) if top_k else through)
        dphi, dphi_bias = torch.einsum("bte,btk->ek", dlogit, xw), dlogit.sum((0, 1))
        dx = dx + dlogit @ phi.to(wide)
    if assignment is not None:
        ddown, dup, dpool = (sets.scatter(assignment, g, like[1].shape[0]) for g in (ddown, dup, dpool))
    grads = (dx, ddown, dup, dscale, dgate, dphi, dphi_bias, dpool, dpool_bias)
    return tuple(
        g.sum_to_size(t.shape).to(t.dtype if i not in BIASES else wide).contiguous()
        if wanted and t is not None
        else x.new_empty(0)
        for i, (g, t, wanted) in enumerate(zip(grads, like, need))
    )
