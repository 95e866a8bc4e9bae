"""The operator as `torch.ops.mole.*`: schemas, backends behind them, fakes for compilers, and the gradient.

`define` + `impl` in Python costs ~2 µs a call, ~5 µs with autograd (measured with an empty op); `custom_op`
costs ~11. What an eager call does instead is in `direct.py`. This is the only place where a `Call` is taken
apart into the list of operands that torch.library wants, by `operands.FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_kernels.backends.select import select
from mole_kernels.operands import FIELDS, Call, Gradients, Need, Outputs, Saved
from mole_kernels.ops.twice import differentiable_gradients
from mole_kernels.precision import gate_dtype, no_autocast

TYPES = {
    "x": "Tensor",
    "weight": "Tensor",
    "bias": "Tensor?",
    "down": "Tensor",
    "up": "Tensor",
    "scale": "Tensor",
    "ranks": "int[]",
    "assignment": "Tensor?",
    "gate": "Tensor?",
    "token_weight": "Tensor?",
    "token_bias": "Tensor?",
    "sample_weight": "Tensor?",
    "sample_bias": "Tensor?",
    "top_k": "int",
    "save": "bool",
}
CALL = ", ".join(f"{TYPES[name]} {name}" for name in FIELDS)
OUTPUTS = ", ".join(f"Tensor {name}" for name in Outputs._fields)
SAVED = ", ".join(f"Tensor {name}" for name in Saved._fields)
GRADIENTS = ", ".join(f"Tensor d{name}" for name in Gradients._fields)

library = torch.library.Library("mole", "DEF")
library.define(f"gated_lora_fwd({CALL}, str backend) -> ({OUTPUTS})")
library.define(
    f"gated_lora_bwd(Tensor dy, {CALL}, {SAVED}, bool[{len(Need._fields)}] need, str backend)"
    f" -> ({GRADIENTS})"
)

Backward = Callable[[Tensor, Call, Saved, Need, str], tuple[Tensor | None, ...]]


def forward(call: Call, backend: str) -> Outputs:
    """The call on the backend of that name, or on the first that takes it ("auto")."""
    chosen = select(call.problem(), backend)
    # operands are already in the compute dtype, and the gates' float32 must stay float32
    with no_autocast(call.x.device.type):
        return chosen.forward(call)


def forward_fake(call: Call) -> Outputs:
    """Empty outputs of the right shapes and dtypes."""
    x, gates = call.x, call.gates
    B, T, _ = x.shape
    E, wide = len(call.experts.ranks), gate_dtype(x.dtype)
    return Outputs(
        y=x.new_empty(B, T, call.weight.shape[0]),
        h=x.new_empty(B, T, call.experts.down.shape[1]) if call.save else x.new_empty(0),
        token_gate=x.new_empty((B, T, E) if gates.token_weight is not None else 0, dtype=wide),
        sample_gate=x.new_empty((B, E) if gates.sample_weight is not None else 0, dtype=wide),
    )


def _forward(*flat):
    *operands, backend = flat
    return forward(Call.of_flat(operands), backend)


def _forward_fake(*flat):
    *operands, _ = flat
    return forward_fake(Call.of_flat(operands))


def _unflat_backward(flat: Sequence[Any]) -> tuple[Tensor, Call, Saved, Need, str]:
    dy, *rest, need, backend = flat
    operands, saved = rest[: len(FIELDS)], rest[len(FIELDS) :]
    return dy, Call.of_flat(operands), Saved(*saved), Need(*need), backend


def _backward(*flat):
    dy, call, saved, need, backend = _unflat_backward(flat)
    chosen = select(call.problem(), backend)
    with no_autocast(call.x.device.type):
        return chosen.backward(call, saved, dy, need)


def _backward_fake(*flat):
    _, call, _, need, _ = _unflat_backward(flat)
    x, wide, E = call.x, gate_dtype(call.x.dtype), len(call.experts.ranks)
    like = differentiable(call)
    for name in ("token_bias", "sample_bias"):
        # in the gates' dtype, whatever the operand's
        if like[name] is not None:
            like[name] = x.new_empty(E, dtype=wide)
    return Gradients(
        **{
            name: x.new_empty(t.shape, dtype=t.dtype) if wanted and t is not None else x.new_empty(0)
            for (name, t), wanted in zip(like.items(), need)
        }
    )


def backward_call(
    dy: Tensor, call: Call, saved: Saved, need: Need, backend: str
) -> tuple[Tensor | None, ...]:
    """`gated_lora_bwd` through torch's dispatcher."""
    return backward_op(dy, *call.flat(), *saved, list(need), backend)  # type: ignore[no-any-return]


def differentiable(call: Call) -> dict[str, Tensor | None]:
    """The operands that have a gradient, by their names in `Need`."""
    named = dict(zip(FIELDS, call.flat()))
    return {name: named[name] for name in Need._fields}


def setup(ctx: Any, call: Call, backend: str, out: Outputs) -> None:
    """Keep what the gradient needs of a forward's call and outputs."""
    ctx.mark_non_differentiable(out.h, out.token_gate, out.sample_gate)
    ctx.set_materialize_grads(False)
    tensors: list[Tensor | None] = []
    constants: dict[str, Any] = {}
    for name, value in zip(FIELDS, call.flat()):
        is_tensor = isinstance(value, Tensor)
        if not is_tensor and value is not None:
            constants[name] = value
        # the bias has no part in any gradient
        tensors.append(value if is_tensor and name != "bias" else None)
    ctx.save_for_backward(*tensors, out.h, out.token_gate, out.sample_gate)
    ctx.constants, ctx.backend = constants, backend


def _setup(ctx, inputs, output) -> None:
    *operands, backend = inputs
    setup(ctx, Call.of_flat(operands), backend, Outputs(*output))


def grad(ctx: Any, dy: Tensor | None, *_unused: Any, run: Backward = backward_call) -> tuple[Any, ...]:
    """The gradients of a call's operands, in the order of `FIELDS`, and None for the backend.

    With `create_graph=True` the gradients themselves are differentiable: see `ops.twice`.
    """
    none = dict.fromkeys((*FIELDS, "backend"))
    if dy is None:
        return tuple(none.values())
    tensors_saved = ctx.saved_tensors
    constants: dict[str, Any] = ctx.constants
    call = Call.of_flat([constants.get(name, t) for name, t in zip(FIELDS, tensors_saved)])
    saved = Saved(*tensors_saved[len(FIELDS) :])
    wanted = dict(zip(FIELDS, ctx.needs_input_grad))
    need = Need(**{name: bool(wanted[name]) for name in Need._fields})
    if torch.is_grad_enabled():
        grads: Sequence[Tensor | None] = differentiable_gradients(dy, call, need)
    else:
        grads = run(dy, call, saved, need, ctx.backend)
    like = differentiable(call)
    gradients = {
        name: g.to(t.dtype)
        for (name, t), g, wants in zip(like.items(), grads, need)
        if wants and g is not None and t is not None
    }
    return tuple((none | gradients).values())


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    library.impl("gated_lora_fwd", _forward, _key)
    library.impl("gated_lora_bwd", _backward, _key)
torch.library.register_fake("mole::gated_lora_fwd", _forward_fake, lib=library)
torch.library.register_fake("mole::gated_lora_bwd", _backward_fake, lib=library)
torch.library.register_autograd("mole::gated_lora_fwd", grad, setup_context=_setup, lib=library)

forward_op = torch.ops.mole.gated_lora_fwd.default
backward_op = torch.ops.mole.gated_lora_bwd.default
