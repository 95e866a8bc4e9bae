"""The ways to compute one forward call, what each refuses, and which is taken where nothing has been measured.

This is where a dispatcher with tables comes in: `default` is a rule of thumb from the cost model, `WAYS` what it may choose from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.fused import Buffers, Fused
from mole_kernels.kernels.triton.tiles import Tile

WAYS: dict[str, Callable[[Fused, Tile], Buffers]] = {
    "persistent": launch.persistent,
    "two_pass": launch.two_pass,
    "recompute": launch.recompute,
    "added": launch.added,
    "merge": launch.merge,
}
# launches of each: ours and torch's
LAUNCHES = {"persistent": 1, "two_pass": 2, "recompute": 1, "added": 3, "merge": 2}
RECOMPUTE_LIMIT = 32


def refusal(way: str, f: Fused) -> str | None:
    """Why `way` cannot compute the call, or None."""
    if way == "recompute" and f.pool is not None:
        return "the sample gate needs every token of a sample before the first output"
    if way == "recompute" and f.R > RECOMPUTE_LIMIT:
        return f"R = {f.R} > {RECOMPUTE_LIMIT}: every output tile would make too much of h"
    if way == "merge" and (f.phi is not None or f.pool is not None):
        return "the gates depend on x"
    if way == "merge" and f.gate is not None and f.gate.shape[1] != 1:
        return "the gate varies by token"
    if way == "merge" and f.save:
        return "h is to be saved, and merging makes none"
    return None


def default(f: Fused, tile: Tile, processors: int) -> str:
    """A prediction: added for IEEE float32, recompute for small R on at most one wave of tiles, else persistent."""
    if f.x.dtype == torch.float32 and f.precision == "ieee":
        # no tensor cores there: a library's product is hard to beat
        return "added"
    tiles = -(-f.M // tile.BM) * -(-f.N // tile.BN)
    if refusal("recompute", f) is None and tiles <= processors:
        return "recompute"
    return "persistent"
