"""The experts and gates of several layers with one input as the operands of one call, and whether that call
is worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels import extension
from mole_kernels.dispatch.choose import CANDIDATES, candidates_of, choose
from mole_kernels.dispatch.cost import GAP
from mole_kernels.dispatch.device import present
from mole_kernels.dispatch.tables import for_device
from mole_kernels.dispatch.work import Use
from mole_kernels.experts.shared import same_content
from mole_kernels.functional import NO_GATES
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.operands import Experts, Gates
from mole_kernels.problem import Problem

# one product of equal A against three (docs/grouping.md): 64 rows 1 % slower, 154 rows 2 % faster
CPU_ROWS = 128


class Part(NamedTuple):
    """What one layer brings: bias [N] or None, experts, gates, N."""

    bias: Tensor | None
    experts: Experts
    gates: Gates
    N: int

    def tensors(self) -> list[Tensor]:
        experts = self.experts
        return [
            t
            for t in (self.bias, experts.down, experts.up, experts.scale, *self.gates.tensors().values())
            if t is not None
        ]


class Packed(NamedTuple):
    """The operands of the one call: bias [ΣN], experts with K and ΣN, gates."""

    bias: Tensor | None
    experts: Experts
    gates: Gates


def part_of(layer: GatedLoRALinear) -> Part:
    """The layer's operands as they stand now."""
    gates = NO_GATES if layer.gate is None else layer.gate.operands(layer.experts)
    return Part(layer.bias, layer.experts.operands(), gates, layer.out_features)


def refuse(parts: Sequence[Part]) -> str | None:
    """Why these cannot be one call that says exactly what theirs say, or None."""
    first = parts[0]
    for part in parts:
        if part.experts.assignment is not None:
            return "its samples have experts of their own (serving)"
        if part.gates.top_k:
            return "a softmax over one layer's experts is none over all of them"
        if part.experts.down.shape[0] != first.experts.down.shape[0]:
            return "its layers have different numbers of adapter sets"
        for mine, other in zip(part.gates[1:5], first.gates[1:5]):
            if (mine is None) != (other is None):
                return "its layers have different kinds of gates"
    given = [part.gates.gate for part in parts if part.gates.gate is not None]
    for dim in (0, 1):
        if len({gate.shape[dim] for gate in given} - {1}) > 1:
            return "its layers' given gates have different sizes"
    return None


def same_down(parts: Sequence[Part]) -> bool:
    """Whether γ ⊙ x Aᵀ is one and the same for all: equal A, equal scales, no gates. Looks at values; on a
    GPU that waits for it.
    """
    first = parts[0].experts
    for part in parts:
        if any(t is not None for t in part.gates[:5]) or part.experts.ranks != first.ranks:
            return False
    return all(
        same_content(p.experts.scale, first.scale) and same_content(p.experts.down, first.down)
        for p in parts[1:]
    )


def pack(parts: Sequence[Part], shared: bool) -> Packed:
    """One call's operands: A one under the other, B along the diagonal; where A is shared, A once and the B
    one under the other.
    """
    bias = None
    if any(part.bias is not None for part in parts):
        like = next(part.bias for part in parts if part.bias is not None)
        bias = torch.cat([like.new_zeros(part.N) if part.bias is None else part.bias for part in parts])
    first = parts[0].experts
    if shared:
        return Packed(bias, first._replace(up=torch.cat([part.experts.up for part in parts], 1)), NO_GATES)
    ranks = tuple(rank for part in parts for rank in part.experts.ranks)
    columns, start, R = [], 0, sum(ranks)
    for part in parts:
        own = sum(part.experts.ranks)
        columns.append(F.pad(part.experts.up, (start, R - start - own)))
        start += own
    down, scale = (
        torch.cat([part.experts.down for part in parts], 1),
        torch.cat([part.experts.scale for part in parts]),
    )
    return Packed(bias, Experts(down, torch.cat(columns, 1), scale, ranks, None), _gates(parts))


def _gates(parts: Sequence[Part]) -> Gates:
    given = [part.gates.gate for part in parts if part.gates.gate is not None]
    gate = None
    if given:
        B, T = (max(one.shape[dim] for one in given) for dim in (0, 1))
        filled = [
            p.gates.gate if p.gates.gate is not None else given[0].new_ones(1, 1, len(p.experts.ranks))
            for p in parts
        ]
        gate = torch.cat([one.expand(B, T, -1) for one in filled], -1)

    def joined(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        found = [t for t in tensors if t is not None]
        return torch.cat(found, dim) if found else None

    gates = [part.gates for part in parts]
    return Gates(
        gate,
        joined([g.phi for g in gates], 0),
        joined([g.phi_bias for g in gates], 0),
        joined([g.pool for g in gates], 1),
        joined([g.pool_bias for g in gates], 0),
        0,
    )


def problem_of(x: Tensor, parts: Sequence[Part], shared: bool) -> Problem:
    """The one call on x [B,T,K]."""
    B, T, K = x.shape
    first = parts[0]
    ranks = first.experts.ranks if shared else tuple([rank for part in parts for rank in part.experts.ranks])
    given = any(part.gates.gate is not None for part in parts)
    kinds = first.gates.phi is not None, first.gates.pool is not None, given
    return Problem(
        B,
        T,
        K,
        sum([part.N for part in parts]),
        ranks,
        first.experts.down.shape[0],
        x.dtype,
        x.device.type,
        *kinds,
    )


@lru_cache(maxsize=4096)
def not_worth(
    whole: Problem, split: tuple[tuple[int, tuple[int, ...]], ...], index: int | None, trains: bool
) -> str | None:
    """Why the calls one by one are faster, None where the one call is.

    split   N and ranks of each layer      index  of the GPU      trains  whether a backward follows
    """
    if whole.device != "cuda":
        if whole.ranks != split[0][1]:
            return "on a CPU the zeros beside each layer's B cost more than its calls"
        if whole.M < CPU_ROWS:
            return "too few rows for a CPU to gain by one product"
        return None
    alone = [replace(whole, N=N, ranks=ranks) for N, ranks in split]
    device = present(index)
    table, names = for_device(device), candidates_of(device) if extension.has_sm90() else CANDIDATES

    def time(problem: Problem) -> float:
        total = 0.0
        for use in (Use(save=trains), Use(backward=True)) if trains else (Use(),):
            found = choose(problem, device, table, use, names)
            best = found.of(found.name)
            total += best.predicted if best.measured is None else best.measured  # type: ignore[operator]
        return total

    if time(whole) >= sum(time(one) + GAP for one in alone) - GAP:
        return "predicted slower than its layers one by one"
    return None
