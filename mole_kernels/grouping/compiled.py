"""A group inside a compiled graph: no addresses, no versions, no numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.functional import as_samples
from mole_kernels.grouping.operands import (
    operands_of_layer,
    pack_operands,
    reason_against_packing,
    split_output,
    wants_gradient,
)
from mole_kernels.grouping.reasons import reason_against_layers
from mole_kernels.operands import Call
from mole_kernels.ops.group import group_forward
from mole_kernels.precision import autocast_dtype

if TYPE_CHECKING:
    from mole_kernels.grouping.group import Group

# of K: the zeros beside each layer's B, in a graph that does not know its number of rows
MOST_EXTRA = 1 / 16
# the attention modules of these packages read their input for the projections and write nothing into it
TRUSTED = ("diffusers.", "transformers.")


class CompiledOutputs(NamedTuple):
    """The outputs for one input, as the compiler sees it."""

    x: Tensor
    ys: list[Tensor | None]


def compiled_output(group: Group, place: int, x: Tensor) -> Tensor | None:
    """`Group.take` as a compiler may see it. Reasons are not counted."""
    outputs = group.compiled
    if outputs is not None and outputs.x is x and outputs.ys[place] is not None:
        y: Tensor | None = outputs.ys[place]
        outputs.ys[place] = None
        return y
    layers = group.layers
    # an exported program has copies of the weights, which do not lie side by side
    if (
        torch.compiler.is_exporting()
        or not group.trusted
        or reason_against_layers(layers)
        or autocast_dtype(x.device.type) is not None
    ):
        return None
    operands = [operands_of_layer(layer) for layer in layers]
    if (
        reason_against_packing(operands)
        or wants_gradient(operands, x)
        or any(layer.weight.dtype != x.dtype for layer in layers)
    ):
        return None
    ranks = [sum(part.experts.ranks) for part in operands]
    extra = sum(ranks) - max(ranks)
    if not group.always and (x.device.type != "cuda" or extra > MOST_EXTRA * x.shape[-1]):
        return None
    packed = pack_operands(operands, False)
    experts, gates = packed.experts, packed.gates
    if gates.token_weight is not None:
        gates = gates._replace(token_weight=gates.token_weight.to(x.dtype))
    experts = experts._replace(down=experts.down.to(x.dtype), up=experts.up.to(x.dtype))
    call = Call(as_samples(x), layers[0].weight, packed.bias, experts, gates)
    y = group_forward(call, [layer.weight for layer in layers], layers[0].backend)
    ys = split_output(y.reshape(*x.shape[:-1], y.shape[-1]), operands)
    own = ys[place]
    ys[place] = None
    group.compiled = CompiledOutputs(x, ys)
    return own


def all_trusted(processors: Sequence[nn.Module]) -> bool:
    """Whether these attention modules, or their processors, are known to leave their input alone."""
    for module in processors:
        processor = getattr(module, "processor", None)
        if not type(module if processor is None else processor).__module__.startswith(TRUSTED):
            return False
    return True
