"""What one call of a PEFT layer is made of, read afresh each time, or why the call must go through PEFT's own
forward.

Hot-swapping and merging write through `.data`, which changes neither identity nor version, and offloading,
casting and quantising replace
tensors at any time: nothing derived from PEFT's tensors is kept from one call to the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from mole_kernels.precision import autocast_dtype

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TENSORS = (nn.Parameter, Tensor)
# packages whose layers give a new tensor at every call, which may be added to in place
QUANTISED_BY = ("bitsandbytes", "torchao", "optimum", "diffusers")
DTYPES_DIFFER = "weights and input of different dtypes"


class Read(NamedTuple):
    """One layer's tensors at one call: A_a [r,K], B_a [N,r], scaling of each active adapter, and the base
    layer.

    called  why the base must be called as it is, None where its weight [N,K] and bias [N] can be read
    fresh   a called base's output is nobody else's
    """

    base: nn.Module
    called: str | None
    fresh: bool
    down: list[Tensor]
    up: list[Tensor]
    scaling: list[Any]


def read(layer: lora.LoraLayer, x: Tensor, args: tuple, kwargs: dict) -> Read | str:
    """The tensors of this call, or why it must go through PEFT's forward."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the weight"
    if args or kwargs:
        return (
            "adapter_names were given"
            if kwargs.get("adapter_names") is not None
            else "extra arguments were given"
        )
    # the dictionaries behind the attributes: nn.Module's own look-up is several times dearer, and this runs
    # at every call
    modules: Any = layer._modules  # type: ignore[attr-defined]
    base, downs, ups = modules["base_layer"], modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    down, up, scaling = [], [], []
    for name in layer.active_adapters:
        if name not in downs:
            continue
        reason = _adapter_refusal(downs[name], ups[name], dropouts[name])
        if name in layer.lora_variant or layer.use_dora.get(name):
            reason = "a LoRA variant (DoRA and its like)"
        if reason is not None:
            return reason
        down.append(downs[name]._parameters["weight"])
        up.append(ups[name]._parameters["weight"])
        scaling.append(layer.scaling[name])
    if not down:
        return "no adapter is active"
    autocast = x.dtype != torch.float64 and autocast_dtype(x.device.type) is not None
    reason = _input_refusal(x, down[0]) or _factor_refusal(x, down, up, autocast) or _mode_refusal()
    if reason is not None:
        return reason
    called = _must_be_called(base, x, autocast)
    if down[0].dtype != x.dtype and not autocast:
        # PEFT casts the input to the adapter's dtype, unless it was told not to
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return DTYPES_DIFFER
        called = called or DTYPES_DIFFER
    return Read(base, called, called is not None and _fresh(base), down, up, scaling)


def _adapter_refusal(down: nn.Module, up: nn.Module, dropout: nn.Module) -> str | None:
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return "lora_A or lora_B is not a plain nn.Linear"
    if hooked(down) or hooked(up) or hooked(dropout):
        return "hooks on lora_A, lora_B or lora_dropout"
    if down._parameters["bias"] is not None or up._parameters["bias"] is not None:
        return "lora_bias"
    if type(dropout) is not nn.Identity and (
        type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)
    ):
        return "dropout in training"
    return None


def hooked(module: nn.Module) -> bool:
    """Calling this module does more than its class's forward."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return True
    # accelerate and diffusers hook by replacing forward on the instance; on removal they leave the bound
    # original there
    own = module.__dict__.get("forward")
    return own is not None and (
        getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module
    )


def _input_refusal(x: Tensor, down: Tensor) -> str | None:
    if type(x) not in PLAIN_TENSORS or x.dtype not in COMPUTE_DTYPES:
        return "the input is not a plain float tensor"
    if x.dim() == 0 or x.shape[-1] != down.shape[-1]:
        return "the input's shape does not fit"
    return None


def _factor_refusal(x: Tensor, down: list[Tensor], up: list[Tensor], autocast: bool) -> str | None:
    first = down[0].dtype
    for tensor in (*down, *up):
        if type(tensor) not in PLAIN_TENSORS:
            return "lora_A or lora_B holds a tensor subclass"
        if tensor.device != x.device:
            return "weights and input on different devices"
        if tensor.dtype not in COMPUTE_DTYPES or (autocast and tensor.dtype == torch.float64):
            return DTYPES_DIFFER
        if tensor.dtype != first and not autocast:
            return "adapters of different dtypes"
    return None


def _mode_refusal() -> str | None:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "global module hooks"
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "global module hooks"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "function transforms or forward-mode derivatives"
    return "tracing" if torch.jit.is_tracing() else None


def _must_be_called(base: nn.Module, x: Tensor, autocast: bool) -> str | None:
    """Why y = x Wᵀ + b is not all that the base does, or not what its tensors say."""
    if type(base) is not nn.Linear:
        return f"the base layer is a {_name(type(base))}"
    if hooked(base):
        return "hooks on the base layer"
    grad = torch.is_grad_enabled()
    for tensor in base._parameters.values():
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
    return "" if torch.compiler.is_compiling() else f"{package(kind)}.{kind.__name__}"


def package(kind: type) -> str:
    """The top-level package that a class comes from."""
    return kind.__module__.partition(".")[0]


def is_quantised(base: nn.Module) -> bool:
    """A layer, or the weight of one, that one of the packages known here quantised."""
    return (
        package(type(base)) in QUANTISED_BY or package(type(base._parameters.get("weight"))) in QUANTISED_BY
    )


def _fresh(base: nn.Module) -> bool:
    return not torch.compiler.is_compiling() and not hooked(base) and is_quantised(base)
