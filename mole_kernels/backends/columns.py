"""Between experts and rank columns: widen [.., E] to [.., R], and sum [.., R] to [.., E]."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=512)
def _expert_of_column(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    index = [e for e, rank in enumerate(ranks) for _ in range(rank)]
    # kept for calls that train, whoever makes it first
    with torch.inference_mode(False):
        return torch.tensor(index, dtype=torch.int64).to(device)


def widen(per_expert: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """[..., E] -> [..., R]: each expert's value, once for every one of its rank columns."""
    if len(ranks) == 1:
        return per_expert
    return per_expert.index_select(-1, _expert_of_column(ranks, per_expert.device))


def sum_columns(columns: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """[..., R] -> [..., E]: the sum over each expert's rank columns."""
    if len(set(ranks)) == 1:
        return columns.unflatten(-1, (len(ranks), ranks[0])).sum(-1)
    return torch.stack([part.sum(-1) for part in columns.split(ranks, -1)], -1)


def sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of a broadcast: `grad` summed down to the shape and dtype of `like`."""
    return grad.sum_to_size(like.shape).to(like.dtype)
