"""What one call of a PEFT LoRA layer computes with: its tensors, or the reason against computing it here.

Hot-swapping and merging write through `.data`, which changes neither identity nor version, and offloading,
casting and quantising replace tensors at any time. So nothing derived from PEFT's tensors is kept between two
calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from mole_kernels.peft.hooks import ModuleHooks, fetched_dtype, fetching_hooks, is_hooked
from mole_kernels.peft.status import (
    ADAPTER_NAMES,
    DISABLED,
    GLOBAL_HOOKS,
    MERGED,
    NONE_ACTIVE,
    TRACING,
    TRANSFORMS,
)
from mole_kernels.precision import autocast_dtype

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TENSORS = (nn.Parameter, Tensor)
# packages whose layers return a new tensor at every call, which may be added to in place
QUANTISED_BY = ("bitsandbytes", "torchao", "optimum", "diffusers")
DTYPES_DIFFER = "weights and input of different dtypes"
ADAPTER_HOOKS = "hooks on lora_A, lora_B or lora_dropout"
FETCHED = "hooks fetch lora_A and lora_B"
FETCHED_GRADIENT = "hooks fetch lora_A and lora_B, and a gradient is wanted"


class Factors(NamedTuple):
    """The active adapters of one layer.

    Attributes:
        reason: Why this layer cannot be computed here, or None. If it is set, the lists are incomplete.
        down: A_a [r,K] of each adapter.
        up: B_a [N,r] of each adapter.
        scaling: PEFT's scaling of each adapter; a tensor after `enable_lora_hotswap`.
        hooks: The hooks that bring A_a and B_a, in the order in which PEFT would call these modules.
    """

    reason: str | None
    down: list[Tensor]
    up: list[Tensor]
    scaling: list[float | Tensor]
    hooks: list[ModuleHooks]


class Operands(NamedTuple):
    """The operands of one call.

    Attributes:
        reason: Why PEFT's own forward must compute the call, or None. If it is set, the rest is meaningless.
        factors: The active adapters.
        base: The base layer.
        base_called: Why the base must be called as a module; None if its weight [N,K] and bias [N] can be
        read.
    """

    reason: str | None
    factors: Factors
    base: nn.Module
    base_called: str | None


def reason_against_layer(layer: lora.LoraLayer) -> str | None:
    """Why the state of this layer sends every call through PEFT's own forward, or None."""
    factors = read_factors(layer)
    return factors.reason or _reason_against_dtypes(factors, autocast=False)


def read_operands(layer: lora.LoraLayer, x: Tensor, args: tuple, kwargs: dict) -> Operands:
    """Read the operands of one call.

    Args:
        layer: A PEFT layer whose forward is that of `lora.Linear`.
        x: Its input [..., K].
        args: Further positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The operands, or the reason against computing this call here.
    """
    # the dictionary behind the attribute: nn.Module's own look-up is several times dearer
    base: nn.Module = layer._modules["base_layer"]  # type: ignore[attr-defined, assignment]
    factors = read_factors(layer)
    reason = factors.reason
    if args or kwargs:
        named = kwargs.get("adapter_names") is not None
        reason = reason or (ADAPTER_NAMES if named else "extra arguments were given")
    if reason is not None:
        return Operands(reason, factors, base, None)
    autocast = x.dtype != torch.float64 and autocast_dtype(x.device.type) is not None
    reason = _reason_against_input(x, factors, autocast) or _reason_against_mode()
    if reason is not None:
        return Operands(reason, factors, base, None)
    base_called = _reason_against_base(base, x, autocast)
    if factors.hooks:
        base_called = base_called or FETCHED
    elif factors.down[0].dtype != x.dtype and not autocast:
        # PEFT casts the input to the adapter's dtype, unless it was told not to
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return Operands(DTYPES_DIFFER, factors, base, None)
        base_called = base_called or DTYPES_DIFFER
    return Operands(None, factors, base, base_called)


def read_factors(layer: lora.LoraLayer) -> Factors:
    """Read the active adapters of a layer, or the reason in its state against computing it here."""
    down: list[Tensor] = []
    up: list[Tensor] = []
    scaling: list[float | Tensor] = []
    hooks: list[ModuleHooks] = []
    # PEFT's properties over these attributes would be half of the Python calls of a forward
    active = layer._active_adapter
    reason = DISABLED if layer._disable_adapters else MERGED if layer.merged_adapters else None
    if reason is None:
        modules: Any = layer._modules  # type: ignore[attr-defined]
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts = modules["lora_dropout"]._modules
        for name in (active,) if isinstance(active, str) else active:
            if name not in downs:
                continue
            if name in layer.lora_variant or layer.use_dora.get(name):
                reason = "a LoRA variant (DoRA and its like)"
                break
            reason = _append_adapter(downs[name], ups[name], dropouts[name], down, up, hooks)
            if reason is not None:
                break
            scaling.append(layer.scaling[name])
        else:
            reason = None if down else NONE_ACTIVE
    return Factors(reason, down, up, scaling, hooks)


def _append_adapter(
    down_module: nn.Module,
    up_module: nn.Module,
    dropout: nn.Module,
    down: list[Tensor],
    up: list[Tensor],
    hooks: list[ModuleHooks],
) -> str | None:
    """Append the tensors of one adapter; the reason where its modules do more than multiply by them."""
    if type(down_module) is not nn.Linear or type(up_module) is not nn.Linear:
        return "lora_A or lora_B is not a plain nn.Linear"
    if type(dropout) is not nn.Identity and (
        type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
    ):
        return "dropout in training"
    if is_hooked(dropout):
        return ADAPTER_HOOKS
    for module, tensors in ((down_module, down), (up_module, up)):
        # the same test as `is_hooked`, without a call for each of the many modules that have no hooks
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ) and is_hooked(module):
            fetching = fetching_hooks(module)
            if fetching is None:
                return ADAPTER_HOOKS
            hooks.append(fetching)
        parameters = module._parameters
        if parameters["bias"] is not None:
            return "lora_bias"
        weight = parameters.get("weight")
        if weight is None:
            return "the weight of lora_A or lora_B is not one of its parameters"
        tensors.append(weight)
    return None


def _reason_against_input(x: Tensor, factors: Factors, autocast: bool) -> str | None:
    """Why this input and these factors are no operands of the operator, or None."""
    if type(x) not in PLAIN_TENSORS or x.dtype not in COMPUTE_DTYPES:
        return "the input is not a plain float tensor"
    K = x.shape[-1] if x.dim() else None
    device = x.device
    for tensor in factors.down:
        if tensor.dim() != 2 or tensor.shape[-1] != K:
            return "the input's shape does not fit"
    if factors.hooks:
        if torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for t in (*factors.down, *factors.up))
        ):
            return FETCHED_GRADIENT
    else:
        for tensor in (*factors.down, *factors.up):
            if tensor.device != device:
                return "weights and input on different devices"
    return _reason_against_dtypes(factors, autocast)


def _reason_against_dtypes(factors: Factors, autocast: bool) -> str | None:
    """Why the factors cannot stand one beneath the other, or None."""
    first = None
    for tensor in (*factors.down, *factors.up):
        if type(tensor) not in PLAIN_TENSORS:
            return "lora_A or lora_B holds a tensor subclass"
        dtype = tensor.dtype
        if factors.hooks:
            dtype = fetched_dtype(tensor, factors.hooks)
        if dtype not in COMPUTE_DTYPES or (autocast and dtype == torch.float64):
            return DTYPES_DIFFER
        first = first or dtype
        if dtype != first and not autocast:
            return "adapters of different dtypes"
    return None


def _reason_against_mode() -> str | None:
    """Why the process or the thread wants every module to be called, or None."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return GLOBAL_HOOKS
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return TRANSFORMS
    return None if torch._C._get_tracing_state() is None else TRACING


def _reason_against_base(base: nn.Module, x: Tensor, autocast: bool) -> str | None:
    """Why y = x Wᵀ + b is not all that the base does, or not what its tensors say; None if W can be read."""
    if type(base) is not nn.Linear:
        return f"the base layer is a {_name(type(base))}"
    if is_hooked(base):
        return "hooks on the base layer"
    parameters = base._parameters
    if parameters.get("weight") is None or "bias" not in parameters:
        return "the base layer's weight is not one of its parameters"
    grad = torch.is_grad_enabled()
    for tensor in parameters.values():
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"the base layer's weight is a {_name(type(tensor))}"
        if grad and tensor.requires_grad:
            return "the base layer wants a gradient"
        if tensor.device != x.device:
            return "the base layer is on another device than its input"
        if tensor.dtype != x.dtype and not (autocast and tensor.dtype in COMPUTE_DTYPES[:3]):
            return DTYPES_DIFFER
    return None


def _name(kind: type) -> str:
    # nothing is counted while compiling, and a compiler cannot trace the name of a tensor's class
    return "" if torch.compiler.is_compiling() else f"{package_of(kind)}.{kind.__name__}"


def package_of(kind: type) -> str:
    """The top-level package that a class comes from."""
    return kind.__module__.partition(".")[0]


def is_quantised(base: nn.Module) -> bool:
    """Whether a layer, or its weight, was quantised by one of the packages known here."""
    weight = base._parameters.get("weight")
    return package_of(type(base)) in QUANTISED_BY or package_of(type(weight)) in QUANTISED_BY
