"""Between a pool of S adapter sets and the batch: each sample's own set, and its gradient back into the
pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mole_kernels.operands import Call, Gradients, Need


def gather(assignment: Tensor, sets: Tensor) -> Tensor:
    """sets [S,...] -> [B,...]: the set that each sample's assignment [B] names, zeros where it is −1."""
    has_set = (assignment >= 0).view(-1, *[1] * (sets.dim() - 1))
    return (
        torch.where(has_set, sets[assignment.clamp_min(0)], 0)
        if sets.shape[0]
        else sets.new_zeros(assignment.shape[0], *sets.shape[1:])
    )


def scatter(assignment: Tensor, grad: Tensor, count: int) -> Tensor:
    """grad [B,...] -> [S,...]: the gradients of the samples that took a set, summed in the batch's order; −1
    goes nowhere.
    """
    has_set = (assignment >= 0).view(-1, *[1] * (grad.dim() - 1))
    out = grad.new_zeros(count, *grad.shape[1:])
    return out.index_add_(0, assignment.clamp_min(0), torch.where(has_set, grad, 0)) if count else out


def own_sets(call: Call) -> Call:
    """The same call without an assignment: every sample's own set, gathered; S = B."""
    experts, gates = call.experts, call.gates
    index = experts.assignment
    if index is None:
        return call
    own = experts._replace(down=gather(index, experts.down), up=gather(index, experts.up), assignment=None)
    if gates.sample_weight is not None:
        gates = gates._replace(sample_weight=gather(index, gates.sample_weight))
    return call._replace(experts=own, gates=gates)


def of_sets(call: Call, grads: Gradients, need: Need) -> Gradients:
    """The gradients of `own_sets(call)`, those of the gathered operands summed back into the sets."""
    index = call.experts.assignment
    if index is None:
        return grads
    count = call.experts.down.shape[0]
    gathered = {
        name: scatter(index, getattr(grads, name), count)
        for name in ("down", "up", "sample_weight")
        if getattr(need, name) and getattr(grads, name).numel()
    }
    return grads._replace(**gathered)
