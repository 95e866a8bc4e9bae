"""Layers whose weight is sharded over ranks, and batches whose tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.backends.columns import sum_columns, widen
from mole_kernels.errors import MoleTypeError
from mole_kernels.functional import as_samples
from mole_kernels.operands import Experts, Gates
from mole_kernels.precision import gate_dtype
from mole_kernels.reference import sets_of, token_gate_ref

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Mixed(NamedTuple):
    """The low-rank part [B,T,N] of one call, and what its gates said."""

    y: Tensor
    token: Tensor | None
    sample: Tensor | None


def low_rank(x: Tensor, experts: Experts, gates: Gates) -> Mixed:
    """Σ_e s_e·gate_e·l_e·G_e·(x A_eᵀ) B_eᵀ without the base, in plain torch.  x [B,T,K] -> y [B,T,N]"""
    dtype = gate_dtype(x.dtype)
    if experts.assignment is not None and gates.sample_weight is not None:
        gates = gates._replace(sample_weight=gates.sample_weight[experts.assignment.clamp_min(0)])
    down, up, scale, ranks, _ = sets_of(experts)
    h = x @ down.to(x.dtype).mT
    gamma = scale.to(dtype)[None, None]
    token = token_gate_ref(x.to(dtype), gates)
    sample = (
        None
        if gates.sample_weight is None
        else sample_gate(h.sum(1, dtype=dtype), h.new_tensor(h.shape[1], dtype=dtype), gates, ranks)
    )
    for factor in (gates.gate, token, None if sample is None else sample[:, None]):
        gamma = gamma if factor is None else gamma * factor.to(dtype)
    return Mixed((h * widen(gamma, ranks)).to(x.dtype) @ up.to(x.dtype).mT, token, sample)


def sample_gate(total: Tensor, count: Tensor, gates: Gates, ranks: tuple[int, ...]) -> Tensor:
    """G [B,E] = sigmoid(p · total/count + c).  total [B,R]: Σ_t h, count []: T"""
    assert gates.sample_weight is not None
    logit = sum_columns(total / count.clamp_min(1) * gates.sample_weight.to(total.dtype), ranks)
    return torch.sigmoid(logit if gates.sample_bias is None else logit + gates.sample_bias.to(total.dtype))


def sharded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates) -> Mixed:
    """The mixture where the base weight is a DTensor (tensor parallel, in columns or rows); x and y are
    DTensors.

    Every rank computes the low-rank part whole, from the whole x: gates see every feature, and the gradients
    of experts and gates
    come out whole and equal on every rank. That costs an all-gather of x where x is split by features, and no
    division of R·(K+N).
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(x, DTensor):
        raise MoleTypeError(
            "GatedLoRALinear",
            expected="x as a DTensor, as its weight is one",
            got=type(x).__name__,
            hint="parallelize_module with ColwiseParallel or RowwiseParallel makes x one",
        )
    base = F.linear(x, weight, bias)
    everywhere = [Replicate()] * x.device_mesh.ndim
    own_tokens = x.redistribute(placements=everywhere).to_local()
    mixed = low_rank(as_samples(own_tokens), experts, gates)
    y = DTensor.from_local(
        mixed.y.reshape(*own_tokens.shape[:-1], -1), x.device_mesh, everywhere, run_check=False
    )
    return mixed._replace(y=base + y)


def is_sharded(tensor: Tensor) -> bool:
    """A DTensor, told without importing torch.distributed."""
    return hasattr(tensor, "device_mesh")


def reason_against_sharded(layer: nn.Module) -> str | None:
    """Why a layer whose weight is a DTensor takes no experts, or None."""
    if not isinstance(layer, nn.Linear):
        return "its weight is a DTensor, which only linear layers may have"
    # parallelize_module's mark; gathered for the forward (FSDP), later parameters would get no gradient of
    # the other ranks
    if not getattr(layer, "_distribute_module_applied", False):
        return "its weight is sharded, and not by parallelize_module; patch first, then fully_shard"
    return None


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a DTensor the whole one, for which every rank must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def pool_over(group: ProcessGroup, x: Tensor, experts: Experts, gates: Gates) -> Gates:
    """The same gates with G made from the tokens of all ranks of `group`: one all-reduce of [B,R] and a
    count, with its gradient.

    x [B,T,K]: this rank's tokens, any number of them
    """
    from torch.distributed.nn.functional import all_reduce  # type: ignore[attr-defined]

    x = as_samples(x)
    dtype = gate_dtype(x.dtype)
    down, _, _, ranks, _ = sets_of(experts)
    total = torch.einsum(
        "bk,srk->br" if down.shape[0] == 1 else "bk,brk->br", x.sum(1, dtype=dtype), down.to(dtype)
    )
    count = total.new_full((x.shape[0], 1), x.shape[1])
    total, count = all_reduce(torch.cat([total, count], 1), group=group).split([total.shape[1], 1], 1)
    if experts.assignment is not None:
        assert gates.sample_weight is not None
        gates = gates._replace(sample_weight=gates.sample_weight[experts.assignment.clamp_min(0)])
    G = sample_gate(total, count, gates, ranks)[:, None]
    product = G if gates.gate is None else G * gates.gate.to(dtype)
    return gates._replace(gate=product, sample_weight=None, sample_bias=None)
