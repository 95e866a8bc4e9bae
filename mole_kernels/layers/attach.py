"""Turn a layer into its gated class in place, and back.

The module object, its Parameters, hooks, buffers and every reference to it stay: only its class and three
attributes change.
Whoever holds the layer (a processor's list, an optimiser, an offload hook) keeps holding the right thing;
`detach` has nothing to rebuild.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from mole_kernels.errors import MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate
from mole_kernels.layers.conv import GatedLoRAConv2d, conv_sizes, reason_against_conv
from mole_kernels.layers.linear import Gated, GatedLoRALinear, check_fit

GATED_CLASS: dict[type, type] = {nn.Linear: GatedLoRALinear, nn.Conv2d: GatedLoRAConv2d}
PLAIN_CLASS: dict[type, type] = {gated: plain for plain, gated in GATED_CLASS.items()}
ATTRIBUTES = ("experts", "gate", "backend", "experts_on", "_last_gates", "experts_in_state")


def reason_against_attaching(module: nn.Module) -> str | None:
    """Why this module cannot be turned into its gated class; None where it can."""
    if isinstance(module, Gated):
        return "it already holds experts"
    if type(module) not in GATED_CLASS:
        return (
            f"{type(module).__name__} has a forward of its own; "
            "only nn.Linear and nn.Conv2d themselves are replaced"
        )
    if isinstance(module, nn.Conv2d) and (reason := reason_against_conv(module)):
        return reason
    assert isinstance(module, nn.Linear | nn.Conv2d)
    if not module.weight.is_floating_point():
        return f"its weight is stored as {module.weight.dtype}"
    if "forward" in module.__dict__ and not follows_class(module):
        return "its forward has been replaced on the instance"
    occupied = [name for name in ATTRIBUTES if hasattr(module, name)]
    return f"it already has an attribute {occupied[0]!r}" if occupied else None


def attach(
    module: nn.Module, experts: LayerExperts, gate: Gate | None = None, backend: str = "auto"
) -> Gated:
    """Make `module` compute y = x Wᵀ + b + Σ_e s_e·g_e·(x A_eᵀ) B_eᵀ, in place. Raises and changes nothing
    where it cannot.

    Freezing W and b is the caller's: the operator refuses a base that asks for a gradient.
    """
    reason = reason_against_attaching(module)
    if reason is not None:
        raise MoleStateError(f"attach to {type(module).__name__}", reason)
    if isinstance(module, nn.Linear):
        check_fit("attach", module.in_features, module.out_features, experts)
    else:
        check_fit("attach", *conv_sizes(module), experts)  # type: ignore[arg-type]
    before, module.__class__ = type(module), GATED_CLASS[type(module)]
    follow_class(module, before)
    module.attach_experts(experts, gate, backend, in_state=False)  # type: ignore[operator]
    return module  # type: ignore[return-value]


def detach(module: nn.Module) -> None:
    """Undo `attach`: the class and the attributes go, the rest was never touched."""
    if type(module) not in PLAIN_CLASS:
        raise MoleStateError(f"detach from {type(module).__name__}", "it holds no experts of ours")
    for name in ATTRIBUTES:
        if hasattr(module, name):
            delattr(module, name)
    module.__dict__.pop("tokens_group", None)
    before, module.__class__ = type(module), PLAIN_CLASS[type(module)]
    follow_class(module, before)


def follows_class(module: nn.Module) -> bool:
    """Whatever stands for the module's forward on the instance calls its class's in the end, in a place that
    can be given another.
    """
    return "_old_forward" in module.__dict__ or any(True for _ in _captured(module, type(module)))


def _captured(module: nn.Module, cls: type) -> Iterator[tuple[Any, str]]:
    """(object, attribute) of each place where a hook of accelerate or diffusers keeps the forward of `cls`
    that it found on the module.
    """
    registry = module.__dict__.get("_diffusers_hook")
    places = [(module, "forward")]
    places += [
        (ref, name) for ref in getattr(registry, "_fn_refs", ()) for name in ("forward", "original_forward")
    ]
    for holder, name in places:
        value = vars(holder).get(name)
        if getattr(value, "__func__", None) is cls.forward and value.__self__ is module:  # type: ignore[attr-defined, union-attr]
            yield holder, name


def follow_class(module: nn.Module, before: type) -> None:
    """Hooks call the forward that they found on the instance when they came, that of the class `before`: give
    them the new class's.
    """
    forward = types.MethodType(type(module).forward, module)
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = forward
    for holder, name in list(_captured(module, before)):
        vars(holder)[name] = forward
