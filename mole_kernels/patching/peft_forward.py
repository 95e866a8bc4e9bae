"""PEFT's lora.Linear computed by our operator where that is exact, by PEFT's own forward everywhere else.

PEFT's tensors are read afresh at every call: hot-swapping and merging write through `.data`, which changes neither identity nor
version, so nothing derived from them can be kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from mole_kernels.errors import MoleBackendError
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts
from mole_kernels.patching import status
from mole_kernels.precision import autocast_dtype, gate_dtype

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TENSORS = (nn.Parameter, Tensor)


class Read(NamedTuple):
    """One layer's tensors at one call: base weight [N,K], bias [N], and A_a [r,K], B_a [N,r], scaling of each active adapter."""

    weight: Tensor
    bias: Tensor | None
    down: list[Tensor]
    up: list[Tensor]
    scaling: list[Any]


class AcceleratedLoraLinear(lora.Linear):
    """PEFT's lora.Linear with the same state: y = x Wᵀ + b + Σ_a scaling_a (x A_aᵀ) B_aᵀ over the active adapters, in one call."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # a hook put on while accelerated keeps this function after `remove` has given the class back
        if type(self) is not AcceleratedLoraLinear:
            return lora.Linear.forward(self, x, *args, **kwargs)
        read = _read(self, x, args, kwargs)
        if not isinstance(read, str):
            try:
                y = _mixture(x, read)
            except MoleBackendError:
                read = "no backend takes the problem"
            else:
                _count(status.accelerated, "linear")
                return y
        _count(status.fallbacks, read)
        return lora.Linear.forward(self, x, *args, **kwargs)

    def _get_name(self) -> str:
        return "Linear"


def is_peft_layer(module: nn.Module) -> bool:
    """Any of PEFT's LoRA layers, accelerated or not."""
    return isinstance(module, lora.LoraLayer)


def swap(layer: nn.Module) -> str | None:
    """Give the layer its accelerated class; the reason where it keeps its own. Doing it twice changes nothing."""
    if type(layer) is AcceleratedLoraLinear:
        return None
    if type(layer) is not lora.Linear:
        return f"{type(layer).__name__} has a forward of its own"
    own = layer.__dict__.get("forward")
    if own is not None:
        if getattr(own, "__func__", None) not in (lora.Linear.forward, AcceleratedLoraLinear.forward) or own.__self__ is not layer:
            return "its forward was replaced on the instance (an offload or casting hook); accelerate first, then hook"
        # left behind by a hook that is gone: the class's own forward, bound, which would hide ours
        del layer.__dict__["forward"]
    layer.__class__ = AcceleratedLoraLinear
    return None


def restore(layer: nn.Module) -> None:
    """PEFT's class back."""
    if type(layer) is AcceleratedLoraLinear:
        layer.__class__ = lora.Linear  # type: ignore[assignment]


def _count(counter: Any, key: str) -> None:
    # a compiler would turn the counter's old value into a guard and recompile at each call
    if not torch.compiler.is_compiling():
        counter[key] += 1


def _read(layer: lora.Linear, x: Tensor, args: tuple, kwargs: dict) -> Read | str:
    """The tensors of this call, or why it must go through PEFT's forward."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the weight"
    if args or kwargs:
        return "adapter_names were given" if kwargs.get("adapter_names") is not None else "extra arguments were given"
    # the dictionaries behind the attributes: nn.Module's own look-up is several times dearer, and this runs at every call
    modules: Any = layer._modules
    base, downs, ups = modules["base_layer"], modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__module__.partition('.')[0]}.{type(base).__name__}"
    if _hooked(base):
        return "hooks on the base layer"
    own: Any = base._parameters
    read = Read(own["weight"], own["bias"], [], [], [])
    for name in layer.active_adapters:
        if name not in downs:
            continue
        reason = _adapter_refusal(downs[name], ups[name], dropouts[name])
        if name in layer.lora_variant or layer.use_dora.get(name):
            reason = "a LoRA variant (DoRA and its like)"
        if reason is not None:
            return reason
        read.down.append(downs[name]._parameters["weight"])
        read.up.append(ups[name]._parameters["weight"])
        read.scaling.append(layer.scaling[name])
    if not read.down:
        return "no adapter is active"
    return _tensor_refusal(x, read) or _mode_refusal() or read


def _adapter_refusal(down: nn.Module, up: nn.Module, dropout: nn.Module) -> str | None:
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return "lora_A or lora_B is not a plain nn.Linear"
    if _hooked(down) or _hooked(up) or _hooked(dropout):
        return "hooks on lora_A, lora_B or lora_dropout"
    if down._parameters["bias"] is not None or up._parameters["bias"] is not None:
        return "lora_bias"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)):
        return "dropout in training"
    return None


def _hooked(module: nn.Module) -> bool:
    """Calling this module does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # accelerate and diffusers hook by replacing forward on the instance; on removal they leave the bound original there
    own = module.__dict__.get("forward")
    return own is not None and (getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module)


def _tensor_refusal(x: Tensor, read: Read) -> str | None:
    weight, bias, down, up, _ = read
    if type(x) not in _PLAIN_TENSORS or x.dtype not in _COMPUTE_DTYPES:
        return "the input is not a plain float tensor"
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        return "the input's shape does not fit"
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return "the base layer wants a gradient"
    dtype, device = x.dtype, x.device
    autocast = dtype != torch.float64 and autocast_dtype(device.type) is not None
    for tensor in (weight, *down, *up) if bias is None else (weight, bias, *down, *up):
        if type(tensor) not in _PLAIN_TENSORS:
            return "a weight is a tensor subclass"
        if tensor.device != device:
            return "weights and input on different devices"
        if tensor.dtype != dtype and not (autocast and tensor.dtype in _COMPUTE_DTYPES[:3]):
            return "weights and input of different dtypes"
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


def _mixture(x: Tensor, read: Read) -> Tensor:
    weight, bias, down, up, scaling = read
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*down, *up)):
        # an adapter of weight zero costs nothing; while it trains, it still gets its zero gradients
        kept = [i for i, s in enumerate(scaling) if isinstance(s, Tensor) or s != 0]
        if not kept:
            return F.linear(x, weight, bias)
        if len(kept) < len(scaling):
            down, up, scaling = ([values[i] for i in kept] for values in (down, up, scaling))
    ranks = tuple([d.shape[0] for d in down])
    stacked, beside = (down[0], up[0]) if len(down) == 1 else (torch.cat(down), torch.cat(up, 1))
    return gated_lora_linear(x, weight, bias, Experts(stacked[None], beside[None], _scale(scaling, x), ranks))


def _scale(scaling: list[float | Tensor], x: Tensor) -> Tensor:
    """[E] in the gates' dtype, from Python numbers or from the tensors that `enable_lora_hotswap` makes of them."""
    dtype, device = gate_dtype(x.dtype), x.device
    if any(isinstance(s, Tensor) for s in scaling):
        return torch.stack([torch.as_tensor(s, dtype=dtype, device=device).reshape(()) for s in scaling])
    if torch.compiler.is_compiling():
        return torch.tensor(scaling, dtype=dtype, device=device)
    return _constant(tuple(scaling), dtype, device)


@lru_cache(maxsize=1024)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # made under inference_mode it could not be saved for a later backward
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
