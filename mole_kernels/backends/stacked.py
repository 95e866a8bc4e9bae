"""The operator in plain torch with stacked A and B: any device, any float dtype; what a user gets where no
kernel fits.

Forward: base, one shrink product, gates on h, one expand accumulated into the base's output. Gates are
computed in float32
(float64 for float64), h is rounded to the input dtype before and after its gates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.backends import sets
from mole_kernels.backends.columns import sum_columns, sum_to, widen
from mole_kernels.operands import Call, Gradients, Need, Outputs, Saved
from mole_kernels.precision import gate_dtype
from mole_kernels.problem import Problem
from mole_kernels.reference import softmax_of_largest

name = "stacked"


def reason_against(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [B,T,P] times right [S,P,Q], the one set shared by the batch where S = 1."""
    return left @ (right[0] if right.shape[0] == 1 else right)


def _shrink(x: Tensor, down: Tensor, token_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h = x downᵀ and the token logits x token_weightᵀ, in one product where the batch shares one set."""
    if token_weight is None:
        return _product(x, down.mT), None
    if down.shape[0] == 1:
        both = F.linear(x, torch.cat([down[0], token_weight]))
        return both[..., : down.shape[1]], both[..., down.shape[1] :]
    return x @ down.mT, F.linear(x, token_weight)


def _sample_gate(
    h: Tensor, sample_weight: Tensor, sample_bias: Tensor | None, ranks: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    mean = h.sum(1, dtype=dtype) / max(h.shape[1], 1)
    logit = sum_columns(mean * sample_weight.to(dtype), ranks)
    return torch.sigmoid(logit if sample_bias is None else logit + sample_bias.to(dtype))


def _gamma(
    scale: Tensor,
    gate: Tensor | None,
    token_gate: Tensor | None,
    sample_gate: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """γ = s·gate·l·G, as small as the gates allow: broadcastable to [B,T,E]."""
    gamma = scale.to(dtype)[None, None]
    if gate is not None:
        gamma = gamma * gate.to(dtype)
    if token_gate is not None:
        gamma = gamma * token_gate
    return gamma if sample_gate is None else gamma * sample_gate[:, None]


def _add_product(y: Tensor, z: Tensor, up: Tensor) -> None:
    """y [B,T,N] += z [B,T,R] upᵀ [S,N,R], in place; y is contiguous."""
    if up.shape[0] == 1:
        flat = y.view(-1, y.shape[-1])
        torch.addmm(flat, z.reshape(-1, z.shape[-1]), up[0].mT, out=flat)
    else:
        torch.baddbmm(y, z, up.mT, out=y)


def forward(call: Call) -> Outputs:
    """y, h, l, G by the formulas of docs/design.md section 1; h is empty unless it is saved. An assignment
    gathers the sets.
    """
    x, weight, bias, (down, up, scale, ranks, _), gates, save = sets.own_sets(call)
    dtype = gate_dtype(x.dtype)
    token_gate = sample_gate = None
    h, logits = _shrink(x, down, gates.token_weight)
    if logits is not None:
        logits = logits.to(dtype)
        logits = logits if gates.token_bias is None else logits + gates.token_bias.to(dtype)
        token_gate = softmax_of_largest(logits, gates.top_k) if gates.top_k else torch.sigmoid(logits)
    if gates.sample_weight is not None:
        sample_gate = _sample_gate(h, gates.sample_weight, gates.sample_bias, ranks, dtype)
    z = (h * widen(_gamma(scale, gates.gate, token_gate, sample_gate, dtype), ranks)).to(x.dtype)
    y = F.linear(x, weight, bias).contiguous()
    _add_product(y, z, up)
    absent = x.new_empty(0, dtype=dtype)
    return Outputs(
        y=y,
        h=h.contiguous() if save else x.new_empty(0),
        token_gate=absent if token_gate is None else token_gate,
        sample_gate=absent if sample_gate is None else sample_gate,
    )


def backward(call: Call, saved: Saved, dy: Tensor, need: Need) -> Gradients:
    """The gradients that `need` names."""
    return sets.of_sets(call, _backward(sets.own_sets(call), saved, dy, need), need)


def _backward(call: Call, saved: Saved, dy: Tensor, need: Need) -> Gradients:
    x, weight, _, (down, up, scale, ranks, _), gates, _ = call
    h, token_gate, sample_gate = saved
    dtype, T = gate_dtype(x.dtype), max(x.shape[1], 1)
    out = Gradients(*[x.new_empty(0)] * len(Gradients._fields))
    token = token_gate if gates.token_weight is not None else None
    sample = sample_gate if gates.sample_weight is not None else None
    gamma = _gamma(scale, gates.gate, token, sample, dtype)
    wide = widen(gamma, ranks)
    if need.up:
        out = out._replace(up=_reduce_product(dy, (h * wide).to(x.dtype), up.shape[0]))
    through_gates = need.scale or need.gate or token is not None or sample is not None
    if not (need.x or need.down or through_gates):
        return out

    v = _product(dy, up).to(dtype)
    dh = wide * v
    dlogit = None
    if through_gates:
        d_gamma = sum_columns(v * h, ranks)
        if need.scale:
            unit = torch.ones_like(scale, dtype=dtype)
            out = out._replace(scale=sum_to(d_gamma * _gamma(unit, gates.gate, token, sample, dtype), scale))
        if need.gate and gates.gate is not None:
            out = out._replace(gate=sum_to(d_gamma * _gamma(scale, None, token, sample, dtype), gates.gate))
        if token is not None:
            through = gamma * d_gamma
            dlogit = through - token * (through.sum(-1, keepdim=True) if gates.top_k else through)
        if sample is not None and gates.sample_weight is not None:
            dq = (gamma * d_gamma).sum(1) * (1 - sample)
            wide_dq = widen(dq, ranks)
            dh = dh + (wide_dq * gates.sample_weight.to(dtype) / T)[:, None]
            if need.sample_weight:
                d_weight = sum_to(wide_dq * h.sum(1, dtype=dtype) / T, gates.sample_weight)
                out = out._replace(sample_weight=d_weight)
            if need.sample_bias:
                out = out._replace(sample_bias=dq.sum(0))
    dh = dh.to(x.dtype)
    if need.down:
        out = out._replace(down=_reduce_product(dh, x, down.shape[0]))
    if need.x:
        dx = (dy @ weight).contiguous()
        _add_product(dx, dh, down.mT)
        out = out._replace(x=dx)
    if dlogit is None or gates.token_weight is None:
        return out
    rounded = dlogit.to(x.dtype)
    if need.token_weight:
        out = out._replace(token_weight=_reduce_product(rounded, x, 1)[0])
    if need.token_bias:
        out = out._replace(token_bias=dlogit.sum((0, 1)))
    if need.x:
        _add_product(out.x, rounded, gates.token_weight.mT[None])
    return out


def _reduce_product(left: Tensor, right: Tensor, sets: int) -> Tensor:
    """leftᵀ right over the tokens: [B,T,P], [B,T,Q] -> [S,P,Q]."""
    if sets == 1:
        return (left.flatten(0, 1).mT @ right.flatten(0, 1))[None]
    return left.mT @ right
