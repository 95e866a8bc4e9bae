"""The experts and gates of several layers with one input as the operands of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.experts.shared import same_content
from mole_kernels.functional import NO_GATES
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.operands import Experts, Gates
from mole_kernels.problem import Problem


class LayerOperands(NamedTuple):
    """What one layer brings to the call: bias [N] or None, experts, gates, N."""

    bias: Tensor | None
    experts: Experts
    gates: Gates
    N: int

    def tensors(self) -> list[Tensor]:
        """Every tensor among them."""
        experts = self.experts
        return [
            t
            for t in (self.bias, experts.down, experts.up, experts.scale, *self.gates.tensors().values())
            if t is not None
        ]


class PackedOperands(NamedTuple):
    """The operands of the one call: bias [ΣN], experts with K and ΣN, gates."""

    bias: Tensor | None
    experts: Experts
    gates: Gates


def operands_of_layer(layer: GatedLoRALinear) -> LayerOperands:
    """The layer's operands as they stand now."""
    gates = NO_GATES if layer.gate is None else layer.gate.operands(layer.experts)
    return LayerOperands(layer.bias, layer.experts.operands(), gates, layer.out_features)


def reason_against_packing(operands: Sequence[LayerOperands]) -> str | None:
    """Why these cannot be one call that computes exactly what theirs compute, or None."""
    first = operands[0]
    for part in operands:
        if part.experts.assignment is not None:
            return "its samples have experts of their own (serving)"
        if part.gates.top_k:
            return "a softmax over one layer's experts is none over all of them"
        if part.experts.down.shape[0] != first.experts.down.shape[0]:
            return "its layers have different numbers of adapter sets"
        if _learned_kinds(part.gates) != _learned_kinds(first.gates):
            return "its layers have different kinds of gates"
    given_gates = [part.gates.gate for part in operands if part.gates.gate is not None]
    for dim in (0, 1):
        if len({gate.shape[dim] for gate in given_gates} - {1}) > 1:
            return "its layers' given gates have different sizes"
    return None


def _learned_kinds(gates: Gates) -> tuple[bool, ...]:
    return tuple(
        [t is None for t in (gates.token_weight, gates.token_bias, gates.sample_weight, gates.sample_bias)]
    )


def has_equal_down(operands: Sequence[LayerOperands]) -> bool:
    """Whether γ ⊙ x Aᵀ is one and the same for all layers: equal A, equal scales, no gates.

    Compares values, which on a GPU waits for the device.
    """
    first = operands[0].experts
    for part in operands:
        if part.gates.tensors() or part.experts.ranks != first.ranks:
            return False
    return all(
        same_content(part.experts.scale, first.scale) and same_content(part.experts.down, first.down)
        for part in operands[1:]
    )


def pack_operands(operands: Sequence[LayerOperands], shared: bool) -> PackedOperands:
    """One call's operands.

    Args:
        operands: Those of each layer.
        shared: A is the same for all layers. Then A stands there once and the B one beneath the other;
        otherwise
            the A stand one beneath the other and the B along the diagonal.
    """
    bias = None
    if any(part.bias is not None for part in operands):
        like = next(part.bias for part in operands if part.bias is not None)
        bias = torch.cat([like.new_zeros(part.N) if part.bias is None else part.bias for part in operands])
    first = operands[0].experts
    if shared:
        up = torch.cat([part.experts.up for part in operands], 1)
        return PackedOperands(bias, first._replace(up=up), NO_GATES)
    ranks = tuple(rank for part in operands for rank in part.experts.ranks)
    columns, start, R = [], 0, sum(ranks)
    for part in operands:
        own = sum(part.experts.ranks)
        columns.append(F.pad(part.experts.up, (start, R - start - own)))
        start += own
    down = torch.cat([part.experts.down for part in operands], 1)
    scale = torch.cat([part.experts.scale for part in operands])
    experts = Experts(down, torch.cat(columns, 1), scale, ranks, None)
    return PackedOperands(bias, experts, _packed_gates(operands))


def _packed_gates(operands: Sequence[LayerOperands]) -> Gates:
    given_gates = [part.gates.gate for part in operands if part.gates.gate is not None]
    gate = None
    if given_gates:
        B, T = (max(g.shape[dim] for g in given_gates) for dim in (0, 1))
        filled = [
            given_gates[0].new_ones(1, 1, len(part.experts.ranks))
            if part.gates.gate is None
            else part.gates.gate
            for part in operands
        ]
        gate = torch.cat([g.expand(B, T, -1) for g in filled], -1)

    def joined(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return torch.cat(present, dim) if present else None

    gates = [part.gates for part in operands]
    return Gates(
        gate,
        joined([g.token_weight for g in gates], 0),
        joined([g.token_bias for g in gates], 0),
        joined([g.sample_weight for g in gates], 1),
        joined([g.sample_bias for g in gates], 0),
        0,
    )


def problem_of_group(x: Tensor, operands: Sequence[LayerOperands], shared: bool) -> Problem:
    """The problem of the one call on x [B,T,K]."""
    B, T, K = x.shape
    first = operands[0]
    ranks = first.experts.ranks
    if not shared:
        ranks = tuple([rank for part in operands for rank in part.experts.ranks])
    given_gates = any(part.gates.gate is not None for part in operands)
    kinds = first.gates.token_weight is not None, first.gates.sample_weight is not None, given_gates
    return Problem(
        B,
        T,
        K,
        sum([part.N for part in operands]),
        ranks,
        first.experts.down.shape[0],
        x.dtype,
        x.device.type,
        *kinds,
    )


def wants_gradient(operands: Sequence[LayerOperands], x: Tensor | None) -> bool:
    """Whether autograd records this call."""
    if not torch.is_grad_enabled():
        return False
    return (x is not None and x.requires_grad) or any(
        t.requires_grad for part in operands for t in part.tensors()
    )


def split_output(y: Tensor, operands: Sequence[LayerOperands]) -> list[Tensor | None]:
    """The columns of y [..., ΣN] that belong to each layer."""
    ys: list[Tensor | None] = []
    start = 0
    for part in operands:
        ys.append(y.narrow(-1, start, part.N))
        start += part.N
    return ys
