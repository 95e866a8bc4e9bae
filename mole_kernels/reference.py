"""The meaning of the operator: expert by expert, in plain torch, with no cleverness.

Differentiable by torch's own autograd, so it is the oracle for the backward too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.operands import Experts, Gates


def token_gate_ref(x: Tensor, gates: Gates) -> Tensor | None:
    """l = sigmoid(logits), or softmax over the top_k, of logits = x token_weightᵀ + token_bias.

    x [B,T,K] -> l [B,T,E], or None without a token gate.
    """
    if gates.token_weight is None:
        return None
    logits = x @ gates.token_weight.to(x.dtype).mT
    logits = logits if gates.token_bias is None else logits + gates.token_bias.to(x.dtype)
    return softmax_of_largest(logits, gates.top_k) if gates.top_k else torch.sigmoid(logits)


def softmax_of_largest(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of the last dimension, 0 elsewhere; of equal ones the first counts as the
    larger.  [..., E] -> [..., E]
    """
    if k >= logits.shape[-1]:
        return torch.softmax(logits, -1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., :k], True)
    return torch.softmax(logits.masked_fill(~chosen, -torch.inf), -1)


def sets_of(experts: Experts) -> Experts:
    """Every sample its own set, gathered by the assignment: down [B,R,K], up [B,N,R], zeros where it is
    −1.
    """
    if experts.assignment is None:
        return experts
    has_set, index = experts.assignment >= 0, experts.assignment.clamp_min(0)
    down, up = (torch.where(has_set[:, None, None], t[index], 0) for t in (experts.down, experts.up))
    return Experts(down, up, experts.scale, experts.ranks)


def sample_gate_ref(h: Tensor, e: int, span: slice, gates: Gates) -> Tensor | None:
    """G_e = sigmoid(p_e · mean_t h_e + c_e).  h [B,T,R_e] -> [B,1], or None where the call has no sample
    gate.
    """
    if gates.sample_weight is None:
        return None
    mean = h.mean(1) if h.shape[1] else h.new_zeros(h.shape[0], h.shape[2])
    logit = (mean * gates.sample_weight[:, span].to(h.dtype)).sum(-1, keepdim=True)
    return torch.sigmoid(logit if gates.sample_bias is None else logit + gates.sample_bias[e].to(h.dtype))


def gated_lora_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = x Wᵀ + b + Σ_e s_e·gate_e·l_e·G_e·(x A_eᵀ) B_eᵀ.

    x [B,T,K], weight [N,K], bias [N]; experts and gates as in `operands`; with an assignment, A and B are
    those of the sample's set.
    Returns y [B,T,N], the token gate l [B,T,E] and the sample gate G [B,E] (None where the call has none).
    """
    y = F.linear(x, weight, bias)
    token = token_gate_ref(x, gates)
    if experts.assignment is not None:
        if gates.sample_weight is not None:
            gates = gates._replace(sample_weight=gates.sample_weight[experts.assignment.clamp_min(0)])
        experts = sets_of(experts)
    sample_gates = []
    start = 0
    for e, rank in enumerate(experts.ranks):
        span = slice(start, start + rank)
        start += rank
        h = x @ experts.down[:, span].mT
        sample = sample_gate_ref(h, e, span, gates)
        o = experts.scale[e].to(x.dtype) * (h @ experts.up[:, :, span].mT)
        if gates.gate is not None:
            o = o * gates.gate[..., e : e + 1].to(x.dtype)
        if token is not None:
            o = o * token[..., e : e + 1]
        if sample is not None:
            o = o * sample[:, None]
            sample_gates.append(sample)
        y = y + o
    return y, token, torch.cat(sample_gates, -1) if sample_gates else None
