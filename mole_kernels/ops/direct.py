"""From the door to a backend without torch's dispatcher, where nobody but autograd would look at the call on
its way.

A call of `torch.ops.mole` costs 15 µs in Python, 25 with a gradient; a UNet has 722 adapted layers.
Compilers, tracers, modes,
subclasses, function transforms and profilers still see the operator by its name: for them the call takes the
dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mole_kernels.backends import select as backends
from mole_kernels.ops import schema
from mole_kernels.precision import no_autocast

# what has no __torch_function__ or __torch_dispatch__ of its own
PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def unobserved(tensors: Sequence[Tensor | None], *, ignore_profiler: bool = False) -> bool:
    """Whether nothing but autograd could observe a call with these tensors.

    Args:
        tensors: The tensors of the call.
        ignore_profiler: A profiler is no reason to compute another way.

    Returns:
        True if they are plain tensors and no compiler, tracer, mode, function transform, dual number or
        profiler is active.
    """
    return (
        # first, for a compiler must not look at the rest
        not torch.compiler.is_compiling()
        and PLAIN.issuperset(map(type, tensors))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and (ignore_profiler or not torch.autograd._profiler_enabled())
    )


def transformed() -> bool:
    """Whether a function transform (torch.func) is at work; false inside a compiler, which must not look."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forward(
    backend: backends.Backend, args: tuple[Any, ...], save: bool, autocast: bool
) -> tuple[Tensor, ...]:
    """What `torch.ops.mole.gated_lora_fwd(*args, backend.name)` gives.

    Args:
        backend: The backend that computes the call.
        args: The arguments of the backend contract (docs/design.md section 3).
        save: Whether autograd records the call.
        autocast: Whether autocast is on; products keep their operands' dtype all the same.
    """
    if save:
        return Direct.apply(*args, backend.name)  # type: ignore[no-untyped-call]
    if not autocast:
        return backend.forward(*args)
    with no_autocast(args[0].device.type):
        return backend.forward(*args)


class Direct(torch.autograd.Function):
    """`mole::gated_lora_fwd` and its gradient, on the backend whose name is the last argument."""

    # with a separate setup_context torch would inspect the signature at every call: 20 µs
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with no_autocast(args[0].device.type):
            out = backends.BACKENDS[args[-1]].forward(*args[:-1])
        schema.setup(ctx, args, out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        return schema.grad(ctx, dy, run=_backward)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    # what is left out is ranks, need, top_k and the name
    if not unobserved(args[:6] + args[7:13] + args[14:15]):
        return schema.backward_op(*args)
    with no_autocast(args[1].device.type):
        return backends.BACKENDS[args[-1]].backward(*args[:-1])
