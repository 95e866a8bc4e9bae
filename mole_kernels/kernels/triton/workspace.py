"""Flags that are zero before and after every launch, so that none has to be filled with zeros first.

Launches on one stream follow one another and share flags. Launches that may overlap must not, so flags are
kept for each stream; and
a captured launch, which may be replayed on any stream, takes its own slice of an arena that no other launch
ever gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

ARENA = 1 << 20

_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_arena: dict[torch.device, tuple[Tensor, int]] = {}


def flags(device: torch.device, count: int) -> Tensor:
    """`count` or more int32 zeros for one launch on the current stream, which leaves them zero.

    In a graph capture they come from the arena, which is filled before the capture by the first eager call on
    the device; where there
    was none, or it is used up, they are allocated and filled inside the graph (one more node).
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _captured(device, count)
    if device not in _arena:
        _arena[device] = torch.zeros(ARENA, dtype=torch.int32, device=device), 0
    key = device, torch.cuda.current_stream(device).cuda_stream
    held = _by_stream.get(key)
    if held is None or held.numel() < count:
        # a power of two, so that a growing problem does not allocate each time
        _by_stream[key] = held = torch.zeros(
            max(4096, 1 << (count - 1).bit_length()), dtype=torch.int32, device=device
        )
    return held


def _captured(device: torch.device, count: int) -> Tensor:
    # 32 ints are 128 bytes: no two launches' flags in one cache line
    size = -(-count // 32) * 32
    whole, used = _arena.get(device, (None, 0))
    if whole is None or used + size > whole.numel():
        return torch.zeros(count, dtype=torch.int32, device=device)
    _arena[device] = whole, used + size
    return whole[used : used + size]
