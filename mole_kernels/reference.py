"""The meaning of the operator: expert by expert, in plain torch, with no cleverness.

Differentiable by torch's own autograd, so it is the oracle for the backward too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.operands import Experts, Gates


def token_gate_ref(x: Tensor, gates: Gates) -> Tensor | None:
    """l = sigmoid(x phiᵀ + phi_bias).  x [B,T,K] -> [B,T,E], or None where the call has no token gate."""
    if gates.phi is None:
        return None
    logits = x @ gates.phi.to(x.dtype).mT
    return torch.sigmoid(logits if gates.phi_bias is None else logits + gates.phi_bias.to(x.dtype))


def sample_gate_ref(h: Tensor, e: int, span: slice, gates: Gates) -> Tensor | None:
    """G_e = sigmoid(p_e · mean_t h_e + c_e).  h [B,T,R_e] -> [B,1], or None where the call has no sample gate."""
    if gates.pool is None:
        return None
    mean = h.mean(1) if h.shape[1] else h.new_zeros(h.shape[0], h.shape[2])
    logit = (mean * gates.pool[:, span].to(h.dtype)).sum(-1, keepdim=True)
    return torch.sigmoid(logit if gates.pool_bias is None else logit + gates.pool_bias[e].to(h.dtype))


def gated_lora_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = x Wᵀ + b + Σ_e s_e·gate_e·l_e·G_e·(x A_eᵀ) B_eᵀ.

    x [B,T,K], weight [N,K], bias [N]; experts and gates as in `operands`.
    Returns y [B,T,N], the token gate l [B,T,E] and the sample gate G [B,E] (None where the call has none).
    """
    y = F.linear(x, weight, bias)
    local = token_gate_ref(x, gates)
    sample_gates = []
    start = 0
    for e, rank in enumerate(experts.ranks):
        span = slice(start, start + rank)
        start += rank
        h = x @ experts.down[:, span].mT
        pooled = sample_gate_ref(h, e, span, gates)
        o = experts.scale[e].to(x.dtype) * (h @ experts.up[:, :, span].mT)
        if gates.gate is not None:
            o = o * gates.gate[..., e : e + 1].to(x.dtype)
        if local is not None:
            o = o * local[..., e : e + 1]
        if pooled is not None:
            o = o * pooled[:, None]
            sample_gates.append(pooled)
        y = y + o
    return y, local, torch.cat(sample_gates, -1) if sample_gates else None
