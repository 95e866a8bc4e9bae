"""Weights that lie one behind the other in memory, so that layers with one input are one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mole_kernels.ops.group import beside


def reason_against_moving(weights: Sequence[Tensor]) -> str | None:
    """Why these weights cannot be laid side by side, or None."""
    first = weights[0]
    for weight in weights:
        if type(weight) is not nn.Parameter:
            return f"a weight is stored as {type(weight).__name__}"
        if weight.is_meta:
            return "a weight is not in memory (an offload hook holds it)"
        if weight.requires_grad:
            return "a base weight wants a gradient"
        if weight.is_inference():
            return "a weight was made under inference_mode"
        if not weight.is_contiguous():
            return "a weight is not contiguous"
        if (weight.dtype, weight.device, weight.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
            return "its weights differ in K, dtype or device"
        if weight.device.type == "cpu" and (weight.is_shared() or weight.is_pinned()):
            return "a weight lies in memory shared with other processes, or pinned"
    return None


def lay_side_by_side(weights: Sequence[Tensor]) -> None:
    """Move the weights [N,K] into one allocation.

    Values and Parameters stay, and their old memory is freed; if memory runs out, everything is as it was.
    """
    if beside(weights) is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, whole.split([weight.shape[0] for weight in weights])):
            weight.data = rows


def take_apart(weights: Iterable[Tensor]) -> None:
    """Give each weight memory of its own again, bit for bit; all copies are made before the first is put in
    place.
    """
    with torch.inference_mode(False), torch.no_grad():
        copies = [
            (weight, weight.detach().clone())
            for weight in weights
            if weight.untyped_storage().nbytes() != weight.nbytes
        ]
        for weight, own in copies:
            weight.data = own


def tied_addresses(modules: Iterable[nn.Module]) -> set[int]:
    """Addresses at which more than one parameter or buffer begins: moving one of them would part it from the
    others.
    """
    objects: dict[int, set[int]] = {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            # a tensor without memory (meta, fetched when needed) has no address that says anything
            if tensor is not None and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                objects.setdefault(tensor.data_ptr(), set()).add(id(tensor))
    return {address for address, ids in objects.items() if len(ids) > 1 and address}
