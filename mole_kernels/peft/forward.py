"""PEFT's LoRA layers computed by our operator where that is exact, by PEFT's own forward everywhere else.

If the base layer's weight can be read, the whole layer is one call of the operator. If it cannot (a quantised
base, a hooked one, one that trains, another class), the base is called as a module, and the adapters, however
many there are, are added to its output by two products.
"""

from __future__ import annotations

import importlib
from collections import Counter
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
from mole_kernels.peft.hooks import captured_forwards, fetched, is_hooked, redirect_forwards
from mole_kernels.peft.operands import (
    PLAIN_TENSORS,
    Operands,
    append_factors,
    is_quantised,
    package_of,
    read_operands,
)
from mole_kernels.peft.status import OPERATOR, Outcome
from mole_kernels.precision import gate_dtype
from mole_kernels.tally import count

# PEFT's layers over quantised bases whose forward is that of lora.Linear, and their modules; classes for them
# are made on demand
QUANTISED_LAYERS = {
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "Linear4bit": "peft.tuners.lora.bnb",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao",
}
# where `exchange_class` keeps the counts of a layer
COUNTS = "mole_calls"
# counts of a layer that another thread gives its class back in the middle of a call
NOT_KEPT: Counter[Outcome] = Counter()


class Accelerated:
    """Mixed into one of PEFT's classes: y = base(x) + Σ_a scaling_a (x A_aᵀ) B_aᵀ over the active adapters.

    State and tensors of the layer are PEFT's and stay as they are.
    """

    plain: type[nn.Module]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer.

        Args:
            x: Input [..., K].
            *args: Passed on to PEFT's own forward, which computes calls that have any.
            **kwargs: Likewise.

        Returns:
            y [..., N].
        """
        # another thread may exchange the class or take the counts away at any time: both are read once
        cls = type(self)
        # a hook put on while accelerated keeps this function after `remove` has given the class back
        if not issubclass(cls, Accelerated):
            return cls.forward(self, x, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        operands = read_operands(self, x, args, kwargs, compiling)  # type: ignore[arg-type]
        reason, outcome = operands.reason, OPERATOR
        if reason is None and operands.base_called is not None:
            y = _sum(self, x, operands, compiling)
            outcome = Outcome("base called", operands.base_called)
        elif reason is None:
            try:
                y = _mixture(x, operands, compiling)
            except MoleBackendError:
                reason = "no backend takes the problem"
        if reason is not None:
            # a compiler would turn the counter's old value into a guard and recompile at each call
            if not compiling:
                status.count_fallback(reason, self.__dict__.get(COUNTS, NOT_KEPT))
            return cls.plain.forward(self, x, *args, **kwargs)
        if not compiling:
            count(outcome, status.all_calls, self.__dict__.get(COUNTS, NOT_KEPT))
        return y

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _register(self)  # type: ignore[arg-type]

    def _get_name(self) -> str:
        return self.plain.__name__


class AcceleratedLoraLinear(Accelerated, lora.Linear):  # type: ignore[misc]
    """PEFT's lora.Linear, accelerated."""

    plain = lora.Linear


@lru_cache
def accelerated_class(plain: type) -> type[Accelerated] | None:
    """The accelerated class for one of PEFT's classes, or None where there is none."""
    if plain is lora.Linear:
        return AcceleratedLoraLinear
    if QUANTISED_LAYERS.get(plain.__name__) != plain.__module__:
        return None
    return type(
        f"Accelerated{plain.__name__}",
        (Accelerated, plain),
        {"plain": plain, "__module__": __name__, "__doc__": plain.__doc__},
    )


def __getattr__(name: str) -> type[Accelerated]:
    """Where pickle finds the classes that are made on demand."""
    peft_name = name.removeprefix("Accelerated")
    if peft_name == name or peft_name not in QUANTISED_LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls = accelerated_class(getattr(importlib.import_module(QUANTISED_LAYERS[peft_name]), peft_name))
    assert cls is not None
    return cls


def is_lora_layer(module: nn.Module) -> bool:
    """Whether the module is one of PEFT's LoRA layers, accelerated or not."""
    return isinstance(module, lora.LoraLayer)


def exchange_class(layer: nn.Module) -> str | None:
    """Give the layer its accelerated class. The second time changes nothing.

    Args:
        layer: A PEFT LoRA layer of any class.

    Returns:
        None, or the reason why the layer keeps its class.
    """
    plain: Any = type(layer)
    if issubclass(plain, Accelerated):
        return None
    ours = accelerated_class(plain)
    if ours is None:
        return f"{plain.__name__} has a forward of its own"
    if "forward" in layer.__dict__ and not any(captured_forwards(layer, plain)):
        return "its forward was replaced on the instance; accelerate first, then replace it"
    _register(layer)
    layer.__class__ = ours  # type: ignore[assignment]
    redirect_forwards(layer, plain, ours)  # type: ignore[arg-type]
    return None


def restore_class(layer: nn.Module) -> None:
    """Give the layer its PEFT class back."""
    cls = type(layer)
    if issubclass(cls, Accelerated):
        layer.__class__ = cls.plain  # type: ignore[assignment]
        redirect_forwards(layer, cls, cls.plain)  # type: ignore[arg-type]
        layer.__dict__.pop(COUNTS, None)
        status.accelerated_layers.discard(layer)


def calls_of(layer: nn.Module) -> Counter[Outcome]:
    """The counted calls of an accelerated layer; of any other an empty counter."""
    return layer.__dict__.get(COUNTS, Counter())


def _register(layer: nn.Module) -> None:
    # a copy of a layer has not been called yet
    layer.__dict__[COUNTS] = Counter()
    status.accelerated_layers.add(layer)


def _mixture(x: Tensor, operands: Operands, compiling: bool) -> Tensor:
    """Compute the whole layer in one call of the operator."""
    parameters: Any = operands.base._parameters
    _, _, _, down, up, scaling, _ = operands
    constant = not compiling
    for weight in scaling:
        # a tensor is never looked into: on a GPU that would wait for the device
        if isinstance(weight, Tensor):
            constant = False
        elif weight == 0:
            down, up, scaling = _without_zeros(operands)
            break
    if not down:
        return F.linear(x, parameters["weight"], parameters["bias"])
    ranks: tuple[int, ...] = ()
    for factor in down:
        ranks += (factor.shape[0],)
    # made afresh for each call: see the head of `operands`
    stacked, beside = (down[0], up[0]) if len(down) == 1 else (torch.cat(down), torch.cat(up, 1))
    scale = _constant_scale(tuple(scaling), x.dtype, x.device) if constant else _scale(scaling, x, compiling)
    experts = Experts(stacked[None], beside[None], scale, ranks)
    return gated_lora_linear(x, parameters["weight"], parameters["bias"], experts)


def _sum(layer: Any, x: Tensor, operands: Operands, compiling: bool) -> Tensor:
    """Call the base, then add the adapters to its output."""
    y = _call_base(operands.base, x)
    fresh = not compiling and not is_hooked(operands.base) and is_quantised(operands.base)
    if not operands.hooks:
        return _added(y, x, operands, fresh, compiling)
    with fetched(operands.hooks, x) as fetched_x:
        now = operands._replace(down=[], up=[], scaling=[])
        append_factors(layer, now.down, now.up, now.scaling, [])
        return _added(y, fetched_x, now, fresh, compiling)


def _added(y: Tensor, x: Tensor, operands: Operands, fresh: bool, compiling: bool) -> Tensor:
    """y + (scaling ⊙ x Aᵀ) Bᵀ: one shrink and one expand for all adapters.

    In place if `fresh` says that y belongs to this call alone.
    """
    down, up, scaling = _without_zeros(operands)
    if not down:
        return y
    stacked, beside = (down[0], up[0]) if len(down) == 1 else (torch.cat(down), torch.cat(up, 1))
    # as PEFT does: the adapters compute in their own dtype, or autocast's
    h = F.linear(x if x.dtype == stacked.dtype else x.to(stacked.dtype), stacked)
    scale = widen(_scale(scaling, h, compiling), tuple([d.shape[0] for d in down]))
    z = (h * scale).to(h.dtype)
    if type(y) not in PLAIN_TENSORS or y.dtype != h.dtype or y.shape[:-1] != h.shape[:-1]:
        return (y + F.linear(z, beside)).to(y.dtype)
    flat, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    beside = beside.to(h.dtype).mT
    if fresh and not torch.is_grad_enabled() and y.is_contiguous():
        return torch.addmm(flat, z, beside, out=flat).view(y.shape)
    return torch.addmm(flat, z, beside).view(y.shape)


def _without_zeros(operands: Operands) -> tuple[list[Tensor], list[Tensor], list[float | Tensor]]:
    """A, B and scaling of the adapters that count.

    An adapter of weight zero costs nothing. While it trains it stays, for it still gets its zero gradients.
    """
    down, up, scaling = operands.down, operands.up, operands.scaling
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*down, *up)):
        return down, up, scaling
    places = [i for i, s in enumerate(scaling) if isinstance(s, Tensor) or s != 0]
    return [down[i] for i in places], [up[i] for i in places], [scaling[i] for i in places]


def _call_base(base: nn.Module, x: Tensor) -> Tensor:
    """base(x); an error that names the base if its package has no kernel for the call."""
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
            else f" with a {package_of(type(weight))}.{type(weight).__name__}"
        )
        raise MoleBackendError(
            f"{package_of(kind)}.{kind.__name__}{of}",
            f"this base layer has no kernel for a {x.dtype} input on {x.device.type}: "
            f"{str(error) or type(error).__name__}",
            hint="it fails without adapters too; another format, dtype, device or build may have a kernel",
        ) from error


def _scale(scaling: list[float | Tensor], x: Tensor, compiling: bool) -> Tensor:
    """[E] in the gates' dtype, from Python numbers or from tensors (`enable_lora_hotswap`)."""
    dtype, device = gate_dtype(x.dtype), x.device
    if any(isinstance(s, Tensor) for s in scaling):
        return torch.stack([torch.as_tensor(s, dtype=dtype, device=device).reshape(()) for s in scaling])
    if compiling:
        return torch.tensor(scaling, dtype=dtype, device=device)
    return _constant_scale(tuple(scaling), x.dtype, device)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _constant_scale(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # made under inference_mode it could not be saved for a later backward
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=gate_dtype(dtype), device=device)
