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
from mole_kernels.operands import Call, Need, Outputs, Saved
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
    # first, for a compiler must not look at the rest
    return not torch.compiler.is_compiling() and unobserved_eager(tensors, ignore_profiler=ignore_profiler)


def unobserved_eager(tensors: Sequence[Tensor | None], *, ignore_profiler: bool = False) -> bool:
    """`unobserved`, for a caller that knows already that no compiler traces the call."""
    return (
        PLAIN.issuperset(map(type, tensors))
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


def forward(backend: backends.Backend, call: Call, autocast: bool) -> Outputs:
    """What `torch.ops.mole.gated_lora_fwd` gives for the call and the backend's name.

    Args:
        backend: The backend that computes the call.
        call: The call; autograd records it where it is to be saved.
        autocast: Whether autocast is on; products keep their operands' dtype all the same.
    """
    if call.save:
        return Direct.apply(*call.flat(), backend.name)  # type: ignore[no-any-return, no-untyped-call]
    if not autocast:
        return backend.forward(call)
    with no_autocast(call.x.device.type):
        return backend.forward(call)


class Direct(torch.autograd.Function):
    """`mole::gated_lora_fwd` and its gradient, on the backend whose name is the last argument."""

    # with a separate setup_context torch would inspect the signature at every call: 20 µs
    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Outputs:
        *operands, name = flat
        call = Call.of_flat(operands)
        with no_autocast(call.x.device.type):
            out = backends.BACKENDS[name].forward(call)
        schema.setup(ctx, call, name, out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        return schema.grad(ctx, dy, run=_backward)


def _backward(dy: Tensor, call: Call, saved: Saved, need: Need, backend: str) -> tuple[Tensor | None, ...]:
    if not unobserved((dy, *call.tensors(), *saved)):
        return schema.backward_call(dy, call, saved, need, backend)
    with no_autocast(call.x.device.type):
        return backends.BACKENDS[backend].backward(call, saved, dy, need)
