"""Layers whose tensors accelerate's or diffusers' hooks bring for each forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError


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
    for inner in getattr(hook, "hooks", (hook,)):
        if getattr(inner, "offload", False) and inner.weights_map is not None:
            tables = (module._parameters, module._buffers) if inner.offload_buffers else (module._parameters,)
            yield from (
                (inner.weights_map, name, t) for table in tables for name, t in table.items() if t is not None
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
        home = table[name]
        if not tensor.is_meta and home.data_ptr() != tensor.data_ptr():
            home.copy_(tensor)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the layer will compute, as its hooks say, while its weight is on meta; None where nobody says."""
    hook = module.__dict__.get("_hf_hook")
    for inner in getattr(hook, "hooks", (hook,)):
        device = getattr(inner, "execution_device", None)
        if device is not None and torch.device(device).type != "meta":
            return torch.device(device)
    return None


def offload_like(new: nn.Module, old: nn.Module) -> None:
    """Put the offload hook of `old` on the module that comes into its place."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook: Any = old._hf_hook
    for inner in getattr(hook, "hooks", (hook,)):
        if isinstance(inner, AlignDevicesHook) and inner.offload:
            add_hook_to_module(
                new,
                AlignDevicesHook(inner.execution_device, offload=True, offload_buffers=inner.offload_buffers),
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
