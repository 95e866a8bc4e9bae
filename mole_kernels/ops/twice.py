"""Gradients that can be differentiated again: what `create_graph=True` asks for.

The kernels' backward is no differentiable program. Where autograd wants a graph of the gradient, the gradient
is therefore taken of the plain torch formula (`reference.gated_lora_ref`), whatever backend computed the
forward. It is exact for every gate, set and dtype, and costs the reference's time and memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mole_kernels.operands import Call, Experts, Gates, Need
from mole_kernels.precision import gate_dtype, no_autocast
from mole_kernels.reference import gated_lora_ref


def differentiable_gradients(dy: Tensor, call: Call, need: Need) -> tuple[Tensor | None, ...]:
    """Gradients of ⟨dy, y⟩ with respect to the operands that `Need` names, as a graph.

    Args:
        dy: [B,T,N], the gradient that reaches y; may itself require a gradient.
        call: The call; its bias is not looked at.
        need: Which gradients are wanted.

    Returns:
        A tensor for each field of `Need`, in its operand's dtype; None where it is not wanted or where the
        call has no such operand.
    """

    # views, so that an operand that was computed from another one counts by itself
    def view(t: Tensor) -> Tensor:
        return t.view_as(t)

    experts, gates = call.experts, call.gates.map(view)
    experts = experts._replace(down=view(experts.down), up=view(experts.up), scale=view(experts.scale))
    x = view(call.x)
    y = plain_forward(x, call.weight, None, experts, gates, rounded=False)[0]
    operands = {"x": x} | experts._asdict() | gates._asdict()
    views = [operands[name] for name in Need._fields]
    with no_autocast(x.device.type):
        wanted = [t for t, wants in zip(views, need) if wants and t is not None]
        gradients = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True, allow_unused=True))
    return tuple(next(gradients) if wants and t is not None else None for t, wants in zip(views, need))


def plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates, *, rounded: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The operator as a program of plain torch operations, computed in float32 (float64 for float64).

    Args:
        x: [B,T,K]; weight: [N,K]; bias: [N] or None; experts and gates as in `operands`.
        rounded: Whether y comes back in x's dtype.

    Returns:
        y [B,T,N], the token gate [B,T,E] and the sample gate [B,E], or None where the call has none.
    """
    wide = gate_dtype(x.dtype)
    with no_autocast(x.device.type):
        y, token_gate, sample_gate = gated_lora_ref(
            x.to(wide),
            weight.to(wide),
            None if bias is None else bias.to(wide),
            experts._replace(
                down=experts.down.to(wide), up=experts.up.to(wide), scale=experts.scale.to(wide)
            ),
            gates.map(lambda t: t.to(wide)),
        )
    return (y.to(x.dtype) if rounded else y), token_gate, sample_gate
