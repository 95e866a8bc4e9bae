"""Layers with one input as one product: `mole::gated_lora_group_fwd`, the operator over weights that are
given one by one.

A compiled graph holds the layers' own weights. Where they lie in memory is seen when the graph runs, never
when it is made, so that a
graph stays right whatever moves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_kernels.ops import schema

schema.library.define(
    "gated_lora_group_fwd(Tensor x, Tensor[] weights, Tensor? bias, Tensor down, Tensor up, Tensor scale, "
    "int[] ranks, Tensor? gate, Tensor? phi, Tensor? phi_bias, Tensor? pool, Tensor? pool_bias, str backend) "
    "-> (Tensor y, Tensor h, Tensor token_gate, Tensor sample_gate)"
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


def _forward(x, weights, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, backend):
    weight = beside(weights)
    # right, and slower: a copy of the weights at each call
    weight = torch.cat(list(weights)) if weight is None else weight
    return schema._forward(
        x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, False, None, 0, backend
    )


def _fake(x, weights, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, backend):
    weight = x.new_empty(sum(weight.shape[0] for weight in weights), x.shape[-1])
    return schema._forward_fake(
        x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, False, None, 0, backend
    )


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    schema.library.impl("gated_lora_group_fwd", _forward, _key)
torch.library.register_fake("mole::gated_lora_group_fwd", _fake, lib=schema.library)

group_op = torch.ops.mole.gated_lora_group_fwd.default
