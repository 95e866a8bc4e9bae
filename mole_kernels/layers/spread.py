"""Layers whose tensors are not simply here: fetched by offload hooks, sharded over ranks, or a batch whose
tokens are split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.backends.columns import sum_columns, widen
from mole_kernels.errors import MoleStateError, MoleTypeError
from mole_kernels.operands import Experts, Gates
from mole_kernels.precision import gate_dtype
from mole_kernels.reference import sets_of, token_gate_ref

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# offloaded


def offloaded(module: nn.Module) -> bool:
    """accelerate's hooks sit on the module itself."""
    return "_hf_hook" in module.__dict__


@contextmanager
def loaded(*roots: nn.Module | None, write: bool = False) -> Iterator[None]:
    """Inside the block the tensors below `roots` are where accelerate's hooks bring them for a forward.

    Experts and gates are read by their layer and not called, so that the hooks on them do not run by
    themselves.
    write  what the block wrote into the tensors is carried to where the hooks keep them; refused for tensors
           kept on the disk
    """
    modules = {id(m): m for root in roots if root is not None for m in root.modules()}.values()
    hooked: list[tuple[nn.Module, Any]] = [(m, m._hf_hook) for m in modules if offloaded(m)]
    if write:
        for module, hook in hooked:
            _check_writable(module, hook)
    begun: list[tuple[nn.Module, Any]] = []
    try:
        for module, hook in hooked:
            hook.pre_forward(module)
            begun.append((module, hook))
        yield
        if write:
            for module, hook in hooked:
                _carry_back(module, hook)
    finally:
        for module, hook in reversed(begun):
            hook.post_forward(module, None)


def _kept(module: nn.Module, hook: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """(the hook's map, name, the module's tensor) of each tensor that the hook takes away between calls."""
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and one.weights_map is not None:
            tables = (module._parameters, module._buffers) if one.offload_buffers else (module._parameters,)
            yield from (
                (one.weights_map, name, t) for table in tables for name, t in table.items() if t is not None
            )


def _check_writable(module: nn.Module, hook: Any) -> None:
    for table, name, _ in _kept(module, hook):
        # a map that reads its file makes a new tensor at each look
        if table[name] is not table[name]:
            raise MoleStateError(
                "write to offloaded experts",
                f"{name} of a {type(module).__name__} is kept on the disk",
                hint="take the offload hooks off, change, and put them on again",
            )


@torch.no_grad()
def _carry_back(module: nn.Module, hook: Any) -> None:
    for table, name, tensor in _kept(module, hook):
        kept = table[name]
        if not tensor.is_meta and kept.data_ptr() != tensor.data_ptr():
            kept.copy_(tensor)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the layer will compute, as its hooks say, while its weight is on meta; None where nobody says."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None and torch.device(device).type != "meta":
            return torch.device(device)
    return None


def offload_like(new: nn.Module, old: nn.Module) -> None:
    """Put the offload hook of `old` on the module that comes into its place."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook: Any = old._hf_hook
    for one in getattr(hook, "hooks", (hook,)):
        if isinstance(one, AlignDevicesHook) and one.offload:
            add_hook_to_module(
                new, AlignDevicesHook(one.execution_device, offload=True, offload_buffers=one.offload_buffers)
            )


def stay(module: nn.Module) -> None:
    """Take accelerate's hook off a module that is to stay where it computes, and bring it there."""
    if offloaded(module):
        from accelerate.hooks import remove_hook_from_module

        device = execution_device(module)
        remove_hook_from_module(module)
        module.to(device)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """What the layer computes in: its weight's dtype, or what diffusers' layerwise casting makes of it for
    each forward.
    """
    hook = getattr(layer.__dict__.get("_diffusers_hook"), "hooks", {}).get("layerwise_casting")
    return layer.weight.dtype if hook is None else hook.compute_dtype  # type: ignore[union-attr, return-value]


# sharded


class Mixed(NamedTuple):
    """The low-rank part [B,T,N] of one call, and what its gates said."""

    y: Tensor
    token: Tensor | None
    sample: Tensor | None


def low_rank(x: Tensor, experts: Experts, gates: Gates) -> Mixed:
    """Σ_e s_e·gate_e·l_e·G_e·(x A_eᵀ) B_eᵀ without the base, in plain torch.  x [B,T,K] -> y [B,T,N]"""
    dtype = gate_dtype(x.dtype)
    if experts.assignment is not None and gates.pool is not None:
        gates = gates._replace(pool=gates.pool[experts.assignment.clamp_min(0)])
    down, up, scale, ranks, _ = sets_of(experts)
    h = x @ down.to(x.dtype).mT
    gamma = scale.to(dtype)[None, None]
    token = token_gate_ref(x.to(dtype), gates)
    sample = (
        None
        if gates.pool is None
        else sample_gate(h.sum(1, dtype=dtype), h.new_tensor(h.shape[1], dtype=dtype), gates, ranks)
    )
    for factor in (gates.gate, token, None if sample is None else sample[:, None]):
        gamma = gamma if factor is None else gamma * factor.to(dtype)
    return Mixed((h * widen(gamma, ranks)).to(x.dtype) @ up.to(x.dtype).mT, token, sample)


def sample_gate(total: Tensor, count: Tensor, gates: Gates, ranks: tuple[int, ...]) -> Tensor:
    """G [B,E] = sigmoid(p · total/count + c).  total [B,R]: Σ_t h, count []: T"""
    assert gates.pool is not None
    logit = sum_columns(total / count.clamp_min(1) * gates.pool.to(total.dtype), ranks)
    return torch.sigmoid(logit if gates.pool_bias is None else logit + gates.pool_bias.to(total.dtype))


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
    local = x.redistribute(placements=everywhere).to_local()
    mixed = low_rank(_as_samples(local), experts, gates)
    y = DTensor.from_local(mixed.y.reshape(*local.shape[:-1], -1), x.device_mesh, everywhere, run_check=False)
    return mixed._replace(y=base + y)


def is_sharded(tensor: Tensor) -> bool:
    """A DTensor, told without importing torch.distributed."""
    return hasattr(tensor, "device_mesh")


def reject_sharded(layer: nn.Module) -> str | None:
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


def _as_samples(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.flatten(1, -2)


# tokens split


def pool_over(group: ProcessGroup, x: Tensor, experts: Experts, gates: Gates) -> Gates:
    """The same gates with G made from the tokens of all ranks of `group`: one all-reduce of [B,R] and a
    count, with its gradient.

    x [B,T,K]: this rank's tokens, any number of them
    """
    from torch.distributed.nn.functional import all_reduce  # type: ignore[attr-defined]

    x = _as_samples(x)
    dtype = gate_dtype(x.dtype)
    down, _, _, ranks, _ = sets_of(experts)
    total = torch.einsum(
        "bk,srk->br" if down.shape[0] == 1 else "bk,brk->br", x.sum(1, dtype=dtype), down.to(dtype)
    )
    count = total.new_full((x.shape[0], 1), x.shape[1])
    total, count = all_reduce(torch.cat([total, count], 1), group=group).split([total.shape[1], 1], 1)
    if experts.assignment is not None:
        assert gates.pool is not None
        gates = gates._replace(pool=gates.pool[experts.assignment.clamp_min(0)])
    G = sample_gate(total, count, gates, ranks)[:, None]
    given = G if gates.gate is None else G * gates.gate.to(dtype)
    return gates._replace(gate=given, pool=None, pool_bias=None)
