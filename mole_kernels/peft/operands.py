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
ADAPTERS_DIFFER = "adapters of different dtypes"
SUBCLASS = "lora_A or lora_B holds a tensor subclass"
FETCHED = "hooks fetch lora_A and lora_B"
FETCHED_GRADIENT = "hooks fetch lora_A and lora_B, and a gradient is wanted"


class Operands(NamedTuple):
    """The operands of one call.

    Attributes:
        reason: Why PEFT's own forward must compute the call, or None. If it is set, the rest is meaningless.
        base: The base layer.
        base_called: Why the base must be called as a module; None if its weight [N,K] and bias [N] can be
            read.
        down: A_a [r,K] of each active adapter.
        up: B_a [N,r] of each active adapter.
        scaling: PEFT's scaling of each active adapter; a tensor after `enable_lora_hotswap`.
        hooks: Hooks that bring A_a and B_a, in the order in which PEFT would call these modules.
    """

    reason: str | None
    base: nn.Module
    base_called: str | None
    down: list[Tensor]
    up: list[Tensor]
    scaling: list[float | Tensor]
    hooks: list[ModuleHooks]


def reason_against_peft_layer(layer: lora.LoraLayer) -> str | None:
    """Why the state of this layer sends every call through PEFT's own forward, or None."""
    down: list[Tensor] = []
    up: list[Tensor] = []
    hooks: list[ModuleHooks] = []
    reason = append_factors(layer, down, up, [], hooks)
    return reason or _reason_against_dtypes(down, up, hooks, autocast=False)


def read_operands(
    layer: lora.LoraLayer, x: Tensor, args: tuple, kwargs: dict, compiling: bool = False
) -> Operands:
    """Read the operands of one call. It is short of Python calls on purpose: a model has hundreds of layers.

    Args:
        layer: A PEFT layer whose forward is that of `lora.Linear`.
        x: Its input [..., K].
        args: Further positional arguments of the call.
        kwargs: Keyword arguments of the call.
        compiling: Whether a compiler traces the call.

    Returns:
        The operands, or the reason against computing this call here.
    """
    down: list[Tensor] = []
    up: list[Tensor] = []
    scaling: list[float | Tensor] = []
    hooks: list[ModuleHooks] = []
    # the dictionary behind the attribute: nn.Module's own look-up is several times dearer
    base: nn.Module = layer._modules["base_layer"]  # type: ignore[attr-defined, assignment]
    base_called = None
    reason = append_factors(layer, down, up, scaling, hooks)
    if reason is None and (args or kwargs):
        named = kwargs.get("adapter_names") is not None
        reason = ADAPTER_NAMES if named else "extra arguments were given"
    if reason is None and (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        reason = GLOBAL_HOOKS
    # a compiler must not look at the modes
    if reason is None and not compiling:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            reason = TRANSFORMS
        elif torch._C._get_tracing_state() is not None:
            reason = TRACING
    if reason is None:
        autocast = x.dtype != torch.float64 and autocast_dtype(x.device.type) is not None
        reason = _reason_against_input(x, down, up, hooks, autocast)
        if reason is None:
            base_called = _reason_against_base(base, x, autocast, compiling)
            if hooks:
                base_called = base_called or FETCHED
            elif not autocast and down[0].dtype != x.dtype:
                # PEFT casts the input to the adapter's dtype, unless it was told not to
                if getattr(layer, "cast_input_dtype_enabled", True):
                    base_called = base_called or DTYPES_DIFFER
                else:
                    reason = DTYPES_DIFFER
    return Operands(reason, base, base_called, down, up, scaling, hooks)


def append_factors(
    layer: lora.LoraLayer,
    down: list[Tensor],
    up: list[Tensor],
    scaling: list[float | Tensor],
    hooks: list[ModuleHooks],
) -> str | None:
    """Append the tensors of the active adapters to the four lists of `Operands`.

    Returns:
        None, or the reason in the layer's state against computing it here; the lists are then incomplete.
    """
    # PEFT's properties over these attributes would be as many Python calls as all the rest
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    modules: Any = layer._modules  # type: ignore[attr-defined]
    downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    active = layer._active_adapter
    for name in (active,) if isinstance(active, str) else active:
        if name not in downs:
            continue
        if name in layer.lora_variant or layer.use_dora.get(name):
            return "a LoRA variant (DoRA and its like)"
        dropout = dropouts[name]
        if type(dropout) is not nn.Identity and (
            type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
        ):
            return "dropout in training"
        for module, tensors in ((dropout, None), (downs[name], down), (ups[name], up)):
            # the same test as `is_hooked`, without a call for each of the many modules that have no hooks
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in module.__dict__
            ) and is_hooked(module):
                fetching = None if tensors is None else fetching_hooks(module)
                if fetching is None:
                    return ADAPTER_HOOKS
                hooks.append(fetching)
            if tensors is None:
                continue
            if type(module) is not nn.Linear:
                return "lora_A or lora_B is not a plain nn.Linear"
            parameters = module._parameters
            if parameters["bias"] is not None:
                return "lora_bias"
            weight = parameters.get("weight")
            if weight is None:
                return "the weight of lora_A or lora_B is not one of its parameters"
            tensors.append(weight)
        scaling.append(layer.scaling[name])
    return None if down else NONE_ACTIVE


def _reason_against_input(
    x: Tensor, down: list[Tensor], up: list[Tensor], hooks: list[ModuleHooks], autocast: bool
) -> str | None:
    """Why this input and these factors are no operands of the operator, or None."""
    if type(x) not in PLAIN_TENSORS or x.dtype not in COMPUTE_DTYPES:
        return "the input is not a plain float tensor"
    K = x.shape[-1] if x.dim() else None
    for tensor in down:
        if tensor.dim() != 2 or tensor.shape[-1] != K:
            return "the input's shape does not fit"
    if hooks:
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in (*down, *up))):
            return FETCHED_GRADIENT
        return _reason_against_dtypes(down, up, hooks, autocast)
    # `_reason_against_dtypes`, in the same loop as the look at the devices
    device, dtype = x.device, down[0].dtype
    for tensor in (*down, *up):
        if type(tensor) not in PLAIN_TENSORS:
            return SUBCLASS
        if tensor.device != device:
            return "weights and input on different devices"
        if tensor.dtype != dtype and not autocast:
            return ADAPTERS_DIFFER
        if tensor.dtype not in COMPUTE_DTYPES or (autocast and tensor.dtype == torch.float64):
            return DTYPES_DIFFER
    return None


def _reason_against_dtypes(
    down: list[Tensor], up: list[Tensor], hooks: list[ModuleHooks], autocast: bool
) -> str | None:
    """Why the factors cannot stand one beneath the other once they were fetched, or None."""
    first = fetched_dtype(down[0], hooks)
    for tensor in (*down, *up):
        if type(tensor) not in PLAIN_TENSORS:
            return SUBCLASS
        dtype = fetched_dtype(tensor, hooks)
        if dtype != first and not autocast:
            return ADAPTERS_DIFFER
        if dtype not in COMPUTE_DTYPES or (autocast and dtype == torch.float64):
            return DTYPES_DIFFER
    return None


def _reason_against_base(base: nn.Module, x: Tensor, autocast: bool, compiling: bool) -> str | None:
    """Why y = x Wᵀ + b is not all that the base does, or not what its tensors say; None if W can be read."""
    if type(base) is not nn.Linear:
        return f"the base layer is a {_name(type(base), compiling)}"
    if (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    ) and is_hooked(base):
        return "hooks on the base layer"
    parameters = base._parameters
    if parameters.get("weight") is None or "bias" not in parameters:
        return "the base layer's weight is not one of its parameters"
    grad = torch.is_grad_enabled()
    for tensor in parameters.values():
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"the base layer's weight is a {_name(type(tensor), compiling)}"
        if grad and tensor.requires_grad:
            return "the base layer wants a gradient"
        if tensor.device != x.device:
            return "the base layer is on another device than its input"
        if tensor.dtype != x.dtype and not (autocast and tensor.dtype in COMPUTE_DTYPES[:3]):
            return DTYPES_DIFFER
    return None


def _name(kind: type, compiling: bool) -> str:
    # nothing is counted while compiling, and a compiler cannot trace the name of a tensor's class
    return "" if compiling else f"{package_of(kind)}.{kind.__name__}"


def package_of(kind: type) -> str:
    """The top-level package that a class comes from."""
    return kind.__module__.partition(".")[0]


def is_quantised(base: nn.Module) -> bool:
    """Whether a layer, or its weight, was quantised by one of the packages known here."""
    weight = base._parameters.get("weight")
    return package_of(type(base)) in QUANTISED_BY or package_of(type(weight)) in QUANTISED_BY
