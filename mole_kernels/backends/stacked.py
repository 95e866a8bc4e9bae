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
from mole_kernels.precision import gate_dtype
from mole_kernels.problem import Problem
from mole_kernels.reference import softmax_of_largest

name = "stacked"


def reject(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [B,T,P] times right [S,P,Q], the one set shared by the batch where S = 1."""
    return left @ (right[0] if right.shape[0] == 1 else right)


def _shrink(x: Tensor, down: Tensor, phi: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h = x downᵀ and the token logits x phiᵀ, in one product where the batch shares one set."""
    if phi is None:
        return _product(x, down.mT), None
    if down.shape[0] == 1:
        both = F.linear(x, torch.cat([down[0], phi]))
        return both[..., : down.shape[1]], both[..., down.shape[1] :]
    return x @ down.mT, F.linear(x, phi)


def _sample_gate(
    h: Tensor, pool: Tensor, pool_bias: Tensor | None, ranks: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    mean = h.sum(1, dtype=dtype) / max(h.shape[1], 1)
    logit = sum_columns(mean * pool.to(dtype), ranks)
    return torch.sigmoid(logit if pool_bias is None else logit + pool_bias.to(dtype))


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


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ranks: tuple[int, ...],
    gate: Tensor | None,
    phi: Tensor | None,
    phi_bias: Tensor | None,
    pool: Tensor | None,
    pool_bias: Tensor | None,
    save: bool,
    assignment: Tensor | None = None,
    top_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, l, G by the formulas of docs/design.md section 1; h is empty unless `save`. An assignment gathers
    the sets.
    """
    dtype = gate_dtype(x.dtype)
    if assignment is not None:
        down, up, pool = (
            sets.gather(assignment, down),
            sets.gather(assignment, up),
            None if pool is None else sets.gather(assignment, pool),
        )
    token_gate = sample_gate = None
    h, logits = _shrink(x, down, phi)
    if logits is not None:
        logits = logits.to(dtype)
        logits = logits if phi_bias is None else logits + phi_bias.to(dtype)
        token_gate = softmax_of_largest(logits, top_k) if top_k else torch.sigmoid(logits)
    if pool is not None:
        sample_gate = _sample_gate(h, pool, pool_bias, ranks, dtype)
    z = (h * widen(_gamma(scale, gate, token_gate, sample_gate, dtype), ranks)).to(x.dtype)
    y = F.linear(x, weight, bias).contiguous()
    _add_product(y, z, up)
    kept = h.contiguous() if save else x.new_empty(0)
    gates = [x.new_empty(0, dtype=dtype) if g is None else g for g in (token_gate, sample_gate)]
    return y, kept, gates[0], gates[1]


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ranks: tuple[int, ...],
    gate: Tensor | None,
    phi: Tensor | None,
    pool: Tensor | None,
    h: Tensor,
    token_gate: Tensor,
    sample_gate: Tensor,
    need: list[bool],
    assignment: Tensor | None = None,
    top_k: int = 0,
) -> tuple[Tensor, ...]:
    """dx, ddown, dup, dscale, dgate, dphi, dphi_bias, dpool, dpool_bias; an empty tensor where `need` says
    no.
    """
    n_x, n_down, n_up, n_scale, n_gate, n_phi, n_phi_bias, n_pool, n_pool_bias = need
    if assignment is not None:
        own = (
            sets.gather(assignment, down),
            sets.gather(assignment, up),
            None if pool is None else sets.gather(assignment, pool),
        )
        grads = backward(
            dy,
            x,
            weight,
            own[0],
            own[1],
            scale,
            ranks,
            gate,
            phi,
            own[2],
            h,
            token_gate,
            sample_gate,
            need,
            None,
            top_k,
        )
        pooled_sets = (1, 2, 7)
        return tuple(
            sets.scatter(assignment, g, down.shape[0]) if i in pooled_sets and need[i] else g
            for i, g in enumerate(grads)
        )
    dtype, T = gate_dtype(x.dtype), max(x.shape[1], 1)
    empty = x.new_empty(0)
    dx = ddown = dup = dscale = dgate = dphi = dphi_bias = dpool = dpool_bias = empty
    local, pooled = token_gate if phi is not None else None, sample_gate if pool is not None else None
    gamma = _gamma(scale, gate, local, pooled, dtype)
    wide = widen(gamma, ranks)
    if n_up:
        dup = _reduce_product(dy, (h * wide).to(x.dtype), up.shape[0])
    through_gates = n_scale or n_gate or local is not None or pooled is not None
    if not (n_x or n_down or through_gates):
        return dx, ddown, dup, dscale, dgate, dphi, dphi_bias, dpool, dpool_bias

    v = _product(dy, up).to(dtype)
    dh = wide * v
    dlogit = None
    if through_gates:
        d_gamma = sum_columns(v * h, ranks)
        ones = torch.ones_like(scale, dtype=dtype)
        if n_scale:
            dscale = sum_to(d_gamma * _gamma(ones, gate, local, pooled, dtype), scale)
        if n_gate and gate is not None:
            dgate = sum_to(d_gamma * _gamma(scale, None, local, pooled, dtype), gate)
        if local is not None:
            through = gamma * d_gamma
            dlogit = through - local * (through.sum(-1, keepdim=True) if top_k else through)
        if pooled is not None and pool is not None:
            dq = (gamma * d_gamma).sum(1) * (1 - pooled)
            wide_dq = widen(dq, ranks)
            dh = dh + (wide_dq * pool.to(dtype) / T)[:, None]
            if n_pool:
                dpool = sum_to(wide_dq * h.sum(1, dtype=dtype) / T, pool)
            if n_pool_bias:
                dpool_bias = dq.sum(0)
    dh = dh.to(x.dtype)
    if n_down:
        ddown = _reduce_product(dh, x, down.shape[0])
    if n_x:
        dx = (dy @ weight).contiguous()
        _add_product(dx, dh, down.mT)
    if dlogit is not None and phi is not None:
        rounded = dlogit.to(x.dtype)
        if n_phi:
            dphi = _reduce_product(rounded, x, 1)[0]
        if n_phi_bias:
            dphi_bias = dlogit.sum((0, 1))
        if n_x:
            _add_product(dx, rounded, phi.mT[None])
    return dx, ddown, dup, dscale, dgate, dphi, dphi_bias, dpool, dpool_bias


def _reduce_product(left: Tensor, right: Tensor, sets: int) -> Tensor:
    """leftᵀ right over the tokens: [B,T,P], [B,T,Q] -> [S,P,Q]."""
    if sets == 1:
        return (left.flatten(0, 1).mT @ right.flatten(0, 1))[None]
    return left.mT @ right
