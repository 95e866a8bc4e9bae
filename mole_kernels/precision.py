"""Which dtype computes what, and autocast's say in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates live in float32, or in float64 where the layer does."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype autocast computes products in on this device type, None where it is off."""
    # asked of a device that knows no autocast (meta), torch raises
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(device: str) -> AbstractContextManager:
    """Products inside keep their operands' dtype."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)
