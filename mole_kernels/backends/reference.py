"""The oracle as a backend: expert by expert, for those who debug; slow, and right by inspection."""

from __future__ import annotations

import torch
from torch import Tensor

from mole_kernels.backends import sets
from mole_kernels.operands import Call, Gradients, Need, Outputs, Saved
from mole_kernels.precision import gate_dtype
from mole_kernels.problem import Problem
from mole_kernels.reference import gated_lora_ref, sets_of

name = "reference"
BIASES = ("token_bias", "sample_bias")


def reason_against(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def forward(call: Call) -> Outputs:
    """y, h, l, G in float32 (float64 for float64), rounded to x's dtype once at the end; see docs/design.md
    section 3.
    """
    dtype, wide = call.x.dtype, gate_dtype(call.x.dtype)
    x, weight, bias, experts, gates, save = _widened(call)
    y, *of_gates = gated_lora_ref(x, weight, bias, experts, gates)
    h = (x @ sets_of(experts).down.mT).to(dtype) if save else x.new_empty(0, dtype=dtype)
    token_gate, sample_gate = (x.new_empty(0, dtype=wide) if g is None else g.contiguous() for g in of_gates)
    return Outputs(y.to(dtype).contiguous(), h.contiguous(), token_gate, sample_gate)


def _widened(call: Call) -> Call:
    """The call with every tensor that enters a product in the gates' dtype."""
    wide = gate_dtype(call.x.dtype)
    experts = call.experts
    return call._replace(
        x=call.x.to(wide),
        weight=call.weight.to(wide),
        bias=None if call.bias is None else call.bias.to(wide),
        experts=experts._replace(
            down=experts.down.to(wide), up=experts.up.to(wide), scale=experts.scale.to(wide)
        ),
        gates=call.gates.map(lambda t: t.to(wide)),
    )


def backward(call: Call, saved: Saved, dy: Tensor, need: Need) -> Gradients:
    """The gradients that `need` names, one expert at a time, in the gates' dtype."""
    grads = sets.of_sets(call, _backward(_widened(sets.own_sets(call)), saved, dy), Need(*[True] * len(need)))
    wide = gate_dtype(call.x.dtype)
    # the biases' gradients are in the gates' dtype
    operands = call.experts._asdict() | call.gates._asdict() | {"x": call.x}
    dtypes = {
        name: wide if name in BIASES else t.dtype
        for name, t in operands.items()
        if name in Need._fields and t is not None
    }
    return Gradients(
        **{
            name: getattr(grads, name).sum_to_size(operands[name].shape).to(dtypes[name]).contiguous()
            if wanted and name in dtypes
            else call.x.new_empty(0)
            for name, wanted in need._asdict().items()
        }
    )


def _backward(call: Call, saved: Saved, dy: Tensor) -> Gradients:
    """All gradients of a call without an assignment, every tensor in the gates' dtype."""
    x, weight, _, (down, up, scale, ranks, _), gates, _ = call
    wide, (B, T, K), E = x.dtype, x.shape, len(ranks)
    dy, h = dy.to(wide), saved.h.to(wide)
    unit = torch.ones(B, T, E, dtype=wide, device=x.device)
    given_gate = unit if gates.gate is None else gates.gate.expand(B, T, E)
    token = unit if gates.token_weight is None else saved.token_gate
    sample = unit if gates.sample_weight is None else saved.sample_gate[:, None].expand(B, T, E)
    dx, ddown, dup = dy @ weight, torch.zeros_like(down), torch.zeros_like(up)
    dscale, dgate = torch.zeros(E, dtype=wide, device=x.device), torch.zeros_like(unit)
    dtoken_weight = torch.zeros(E, K, dtype=wide, device=x.device)
    dtoken_bias, dsample_bias = torch.zeros_like(dscale), torch.zeros_like(dscale)
    dsample_weight = torch.zeros(down.shape[:2], dtype=wide, device=x.device)
    # γ_e D_e: what reaches expert e's token logit through its own gate
    through = torch.zeros_like(unit)
    start = 0
    for e, rank in enumerate(ranks):
        span = slice(start, start + rank)
        start += rank
        A, Bup, he = down[:, span], up[:, :, span], h[..., span]
        gamma = scale[e] * given_gate[..., e] * token[..., e] * sample[..., e]
        V = dy @ Bup
        D = (V * he).sum(-1)
        dup[:, :, span] = (dy.mT @ (he * gamma[..., None])).sum_to_size(dup[:, :, span].shape)
        dscale[e] = (D * given_gate[..., e] * token[..., e] * sample[..., e]).sum()
        dgate[..., e] = D * scale[e] * token[..., e] * sample[..., e]
        dh = gamma[..., None] * V
        if gates.sample_weight is not None:
            dq = (gamma * (1 - sample[..., e]) * D).sum(1)
            dsample_weight[:, span] = (dq[:, None] * he.sum(1) / max(T, 1)).sum_to_size(
                dsample_weight[:, span].shape
            )
            dsample_bias[e] = dq.sum()
            dh = dh + (dq[:, None] * gates.sample_weight[:, span])[:, None] / max(T, 1)
        if gates.token_weight is not None:
            through[..., e] = gamma * D
        ddown[:, span] = (dh.mT @ x).sum_to_size(ddown[:, span].shape)
        dx = dx + dh @ A
    if gates.token_weight is not None:
        dlogit = through - token * (through.sum(-1, keepdim=True) if gates.top_k else through)
        dtoken_weight, dtoken_bias = torch.einsum("bte,btk->ek", dlogit, x), dlogit.sum((0, 1))
        dx = dx + dlogit @ gates.token_weight
    return Gradients(dx, ddown, dup, dscale, dgate, dtoken_weight, dtoken_bias, dsample_weight, dsample_bias)
