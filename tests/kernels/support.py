"""Run a kernel in the interpreter on a `Case`, outputs poisoned, and hold it to the float64 truth."""

from __future__ import annotations

import contextlib

import torch

from mole_kernels.kernels.triton.fused import Fused
from mole_kernels.kernels.triton.tiles import Tile

SMALL = Tile(BM=32, BN=32, BK=32, BR=16, BZ=16, BS=16, group=2, programs=3)


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN (the largest number for integers): what a kernel does not write is seen."""
    empty = torch.empty

    def full(*size, **kwargs):
        t = empty(*size, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)

    torch.empty = full
    try:
        yield
    finally:
        torch.empty = empty


def forward_of(call, save: bool = False) -> Fused:
    """The forward product of a `CaseCall`."""
    return Fused.of(call.operands(save))
