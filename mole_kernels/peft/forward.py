"""PEFT's LoRA layers computed by our operator where that is exact, by PEFT's own forward everywhere else.

A base whose weight can be read is one operand of the operator. A base that cannot (quantised, hooked,
trained, a class of its own) is
called as it is, and the adapters are added to what it says by two products, however many there are.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.backends.columns import widen
from mole_kernels.errors import MoleBackendError
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts
from mole_kernels.peft import status
from mole_kernels.peft.read import PLAIN_TENSORS, Read, is_quantised, package, read
from mole_kernels.precision import gate_dtype

# PEFT's layers over quantised bases whose forward is lora.Linear's, and where they live; classes for them are
# made on demand
QUANTISED = {
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "Linear4bit": "peft.tuners.lora.bnb",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao",
}


class Accelerated:
    """Put before one of PEFT's classes: y = base(x) + Σ_a scaling_a (x A_aᵀ) B_aᵀ over the active adapters;
    state and tensors stay.
    """

    plain: type[nn.Module]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # a hook put on while accelerated keeps this function after `remove` has given the class back
        if not isinstance(self, Accelerated):
            return type(self).forward(self, x, *args, **kwargs)
        found = read(self, x, args, kwargs)  # type: ignore[arg-type]
        if not isinstance(found, str):
            if found.called is not None:
                y = _added(x, found)
                _count(status.accelerated, f"{status.CALLED}{found.called}")
                return y
            try:
                y = _mixture(x, found)
            except MoleBackendError:
                found = "no backend takes the problem"
            else:
                _count(status.accelerated, "linear")
                return y
        _count(status.fallbacks, found)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _get_name(self) -> str:
        return self.plain.__name__


class AcceleratedLoraLinear(Accelerated, lora.Linear):  # type: ignore[misc]
    """PEFT's lora.Linear, accelerated."""

    plain = lora.Linear


@lru_cache
def accelerated_class(plain: type) -> type[Accelerated] | None:
    """The accelerated class for one of PEFT's, None where we have none."""
    if plain is lora.Linear:
        return AcceleratedLoraLinear
    if QUANTISED.get(plain.__name__) != plain.__module__:
        return None
    return type(
        f"Accelerated{plain.__name__}",
        (Accelerated, plain),
        {"plain": plain, "__module__": __name__, "__doc__": plain.__doc__},
    )


def __getattr__(name: str) -> type[Accelerated]:
    """Where pickle finds the classes that are made on demand."""
    peft_name = name.removeprefix("Accelerated")
    if peft_name == name or peft_name not in QUANTISED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = accelerated_class(getattr(importlib.import_module(QUANTISED[peft_name]), peft_name))
    assert made is not None
    return made


def is_peft_layer(module: nn.Module) -> bool:
    """Any of PEFT's LoRA layers, accelerated or not."""
    return isinstance(module, lora.LoraLayer)


def swap(layer: nn.Module) -> str | None:
    """Give the layer its accelerated class; the reason where it keeps its own. Doing it twice changes
    nothing.
    """
    if isinstance(layer, Accelerated):
        return None
    plain: Any = type(layer)
    ours = accelerated_class(plain)
    if ours is None:
        return f"{plain.__name__} has a forward of its own"
    own = layer.__dict__.get("forward")
    if own is not None:
        if getattr(own, "__func__", None) not in (plain.forward, ours.forward) or own.__self__ is not layer:  # type: ignore[attr-defined]
            return "its forward was replaced on the instance (an offload or casting hook); accelerate first, then hook"
        # left behind by a hook that is gone: the class's own forward, bound, which would hide ours
        del layer.__dict__["forward"]
    layer.__class__ = ours  # type: ignore[assignment]
    return None


def restore(layer: nn.Module) -> None:
    """PEFT's class back."""
    if isinstance(layer, Accelerated):
        layer.__class__ = layer.plain  # type: ignore[assignment]


def _count(counter: Any, key: str) -> None:
    # a compiler would turn the counter's old value into a guard and recompile at each call
    if not torch.compiler.is_compiling():
        counter[key] += 1


def _kept(found: Read) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """A, B and scaling of the adapters that count: one of weight zero costs nothing; while it trains, it
    still gets its zero gradients.
    """
    down, up, scaling = found.down, found.up, found.scaling
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*down, *up)):
        kept = [i for i, s in enumerate(scaling) if isinstance(s, Tensor) or s != 0]
        if len(kept) < len(scaling):
            return [down[i] for i in kept], [up[i] for i in kept], [scaling[i] for i in kept]
    return down, up, scaling


def _stacked(down: list[Tensor], up: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A_a one under the other [R,K], B_a side by side [N,R]"""
    return (down[0], up[0]) if len(down) == 1 else (torch.cat(down), torch.cat(up, 1))


def _mixture(x: Tensor, found: Read) -> Tensor:
    """The whole layer in one call of the operator."""
    weight: Any = found.base._parameters["weight"]
    bias: Any = found.base._parameters["bias"]
    down, up, scaling = _kept(found)
    if not down:
        return F.linear(x, weight, bias)
    ranks = tuple([d.shape[0] for d in down])
    stacked, beside = _stacked(down, up)
    return gated_lora_linear(x, weight, bias, Experts(stacked[None], beside[None], _scale(scaling, x), ranks))


def _added(x: Tensor, found: Read) -> Tensor:
    """base(x) + (scaling ⊙ x Aᵀ) Bᵀ: one shrink and one expand for all adapters, added where the base's
    output lies if that is ours.
    """
    y = _call(found.base, x)
    down, up, scaling = _kept(found)
    if not down:
        return y
    stacked, beside = _stacked(down, up)
    # as PEFT does: the adapters compute in their own dtype, or autocast's
    h = F.linear(x if x.dtype == stacked.dtype else x.to(stacked.dtype), stacked)
    z = (h * widen(_scale(scaling, h), tuple([d.shape[0] for d in down]))).to(h.dtype)
    if type(y) not in PLAIN_TENSORS or y.dtype != h.dtype or y.shape[:-1] != h.shape[:-1]:
        return (y + F.linear(z, beside)).to(y.dtype)
    flat, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    beside = beside.to(h.dtype).mT
    if found.fresh and not torch.is_grad_enabled() and y.is_contiguous():
        return torch.addmm(flat, z, beside, out=flat).view(y.shape)
    return torch.addmm(flat, z, beside).view(y.shape)


def _call(base: nn.Module, x: Tensor) -> Tensor:
    """base(x); where its package has nothing to compute it with, an error that says so."""
    if torch.compiler.is_compiling():
        return base(x)
    try:
        return base(x)
    # a table without the format raises KeyError, which of another layer could mean anything
    except (NotImplementedError, ImportError, KeyError) as error:
        if isinstance(error, KeyError) and not is_quantised(base):
            raise
        kind, weight = type(base), base._parameters.get("weight")
        of = (
            ""
            if weight is None or type(weight) in PLAIN_TENSORS
            else f" with a {package(type(weight))}.{type(weight).__name__}"
        )
        raise MoleBackendError(
            f"{package(kind)}.{kind.__name__}{of}",
            f"this base layer has no kernel for a {x.dtype} input on {x.device.type}: {str(error) or type(error).__name__}",
            hint="without adapters it fails alike; another format, dtype, device or build of that package may have one",
        ) from error


def _scale(scaling: list[float | Tensor], x: Tensor) -> Tensor:
    """[E] in the gates' dtype, from Python numbers or from the tensors that `enable_lora_hotswap` makes of
    them.
    """
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
