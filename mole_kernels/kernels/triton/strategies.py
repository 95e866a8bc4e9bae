"""The ways to compute one forward call, and what each refuses. Which one is taken:
`mole_kernels/dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable

from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.fused import Buffers, Fused
from mole_kernels.kernels.triton.limits import reason_against_shapes
from mole_kernels.kernels.triton.tiles import Tile

WAYS: dict[str, Callable[[Fused, Tile], Buffers]] = {
    "persistent": launch.persistent,
    "two_pass": launch.two_pass,
    "recompute": launch.recompute,
    "added": launch.added,
    "merge": launch.merged_weight,
    "dense": launch.dense,
}


def reason_against_way(way: str, f: Fused) -> str | None:
    """Why `way` cannot compute the call, or None."""
    mask = f.gate is not None and f.gate.shape[1] != 1
    own = f.down.shape[0] > 1 or f.assignment is not None
    return reason_against_shapes(
        way,
        f.R,
        token=f.token_weight is not None,
        sample=f.sample_weight is not None,
        mask=mask,
        save=f.save,
        own=own,
    )
