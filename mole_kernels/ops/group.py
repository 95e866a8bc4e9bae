"""Layers with one input as one product: `mole::gated_lora_group_fwd`, the operator over weights that are
given one by one.

A compiled graph holds the layers' own weights. Where they lie in memory is seen when the graph runs, never
when it is made, so that a
graph stays right whatever moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_kernels import operands
from mole_kernels.operands import Call
from mole_kernels.ops import schema

# without those operands that a group never has
FIELDS = tuple(name for name in operands.FIELDS if name not in ("assignment", "top_k", "save"))
TYPES = schema.TYPES | {"weight": "Tensor[]"}
schema.library.define(
    f"gated_lora_group_fwd({', '.join(f'{TYPES[name]} {name}' for name in FIELDS)}, str backend) "
    f"-> ({schema.OUTPUTS})"
)


def beside(weights: Sequence[Tensor]) -> Tensor | None:
    """The tensor [ΣN,K] that the weights [N,K] are the parts of; None where they do not lie one behind the
    other in one allocation.
    """
    # an alias: another thread may move the weights while they are looked at
    first = weights[0].detach()
    K, home, place = first.shape[1], first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        if (
            weight.data_ptr() != place
            or weight.untyped_storage().data_ptr() != home
            or weight.dtype != first.dtype
        ):
            return None
        if weight.shape[1] != K or not weight.is_contiguous():
            return None
        place += weight.numel() * weight.element_size()
    return first.as_strided((sum(weight.shape[0] for weight in weights), K), (K, 1))


def _call(flat: Sequence[Any], weight: Tensor) -> Call:
    named = dict.fromkeys(operands.FIELDS) | dict(zip(FIELDS, flat)) | {"top_k": 0, "save": False}
    return Call.of_flat(tuple((named | {"weight": weight}).values()))


def _forward(*flat):
    *values, backend = flat
    weights = values[FIELDS.index("weight")]
    weight = beside(weights)
    # right, and slower: a copy of the weights at each call
    weight = torch.cat(list(weights)) if weight is None else weight
    return schema.forward(_call(values, weight), backend)


def _fake(*flat):
    *values, _ = flat
    x, weights = (values[FIELDS.index(name)] for name in ("x", "weight"))
    weight = x.new_empty(sum(weight.shape[0] for weight in weights), x.shape[-1])
    return schema.forward_fake(_call(values, weight))


def group_forward(call: Call, weights: Sequence[Tensor], backend: str) -> Tensor:
    """y of a call whose weight are these, one under the other; no gradient, no assignment, no softmax.

    Args:
        call: The call; its own `weight` is not looked at.
        weights: [N_i,K] each.
        backend: "auto", or a backend by name.

    Returns:
        y [B,T,ΣN].
    """
    named = dict(zip(operands.FIELDS, call.flat())) | {"weight": list(weights)}
    return group_op(*[named[name] for name in FIELDS], backend)[0]  # type: ignore[no-any-return]


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    schema.library.impl("gated_lora_group_fwd", _forward, _key)
torch.library.register_fake("mole::gated_lora_group_fwd", _fake, lib=schema.library)

group_op = torch.ops.mole.gated_lora_group_fwd.default
