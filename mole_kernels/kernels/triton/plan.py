"""A call seen before, launched again with as little Python as possible: its constants bound, its compiled
kernels at hand.

The first call of a kind (shapes, strides, dtypes, alignment, gates, tile) runs as any other and is written
down: for each launch the
compiled kernel, the grid, and which argument is which tensor. Later calls allocate their buffers, put the
tensors in their places and
launch; Triton's own look-up of what it compiled, which looks at some seventy arguments, is passed by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.fused import OPERANDS, Buffers, Fused
from mole_kernels.kernels.triton.strategies import WAYS
from mole_kernels.kernels.triton.tiles import Tile
from mole_kernels.kernels.triton.workspace import flags
from mole_kernels.operands import Outputs

# the ways that are launches of ours and nothing else
PLANNED = ("persistent", "two_pass", "recompute")
BUFFERS = ("y", "h", "z", "token_gate", "sample_gate", "parts", "flags")
# arguments that are called otherwise than the tensor they are, in a forward
CALLED = {"x2": "x", "w2": "w", "arrived": "flags", "q": "sample_gate", "d": "scale"}
MOST = 4096

_plans: dict[object, LaunchPlan] = {}


@dataclass(frozen=True)
class Step:
    """One launch: `values` with the tensors' places open; places of plain tensors, and of descriptors with
    (shape, strides, block).
    """

    kernel: Any
    compiled: Any
    grid: tuple[int, int, int]
    values: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    described: tuple[tuple[int, int, list[int], list[int], list[int]], ...]


@dataclass(frozen=True)
class LaunchPlan:
    """The launches of one kind of call, and what they need allocated: (shape, dtype) of each buffer but the
    flags, None: not used.
    """

    steps: tuple[Step, ...]
    sizes: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    n_flags: int
    device: torch.device

    def run(self, f: Fused) -> Outputs:
        """y, h, l, G of a call of this kind."""
        device = self.device
        prepared = [
            None if size is None else torch.empty(size[0], dtype=size[1], device=device)
            for size in self.sizes
        ]
        tensors = (*f.operands(), *prepared, flags(device, self.n_flags))
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                self._launch(tensors)
        else:
            self._launch(tensors)
        return Outputs(prepared[0], prepared[1], prepared[3], prepared[4])  # type: ignore[arg-type]

    def _launch(self, tensors: Sequence[Tensor | None]) -> None:
        for step in self.steps:
            values = list(step.values)
            for place, which in step.places:
                values[place] = tensors[which]
            for place, which, shape, strides, block in step.described:
                values[place] = launch.descriptor(tensors[which], shape, strides, block)
            if step.compiled is None:
                # the interpreter compiles nothing
                step.kernel[step.grid](**dict(zip(step.kernel.arg_names, values)))
            else:
                step.compiled[step.grid](*values)


def launch_key(way: str, tile: Tile | None, f: Fused) -> object:
    """What two calls must have in common to be launched alike; Triton compiles anew where a pointer is not
    aligned to 16 bytes.
    """
    kinds = [
        None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in f.operands()
    ]
    return way, tile, f.ranks, f.top_k, f.save, f.precision, f.x.device, *kinds


def known_launch(key: object) -> LaunchPlan | None:
    return _plans.get(key)


def record(key: object, way: str, f: Fused, tile: Tile) -> Buffers:
    """Run the call, and keep how under `key`."""
    with launch.recording() as started:
        b = WAYS[way](f, tile)
    if len(_plans) >= MOST:
        _plans.clear()
    absent = {name for name in OPERANDS if getattr(f, name) is None} | {
        name for name in BUFFERS if getattr(b, name) is f.scale
    }
    names = (*OPERANDS, *BUFFERS)
    steps = []
    for kernel, compiled, grid, arguments in started:
        values, places, described = [], [], []
        for place, name in enumerate(kernel.arg_names):
            value = arguments[name]
            is_tensor = isinstance(value, Tensor) or hasattr(value, "block_shape")
            name = CALLED.get(name, name)
            values.append(None if is_tensor and name in names else value)
            if not is_tensor or name not in names:
                continue
            which = names.index("scale" if name in absent else name)
            if isinstance(value, Tensor):
                places.append((place, which))
            else:
                shape, strides, block = value.shape, value.strides, value.block_shape  # type: ignore[attr-defined]
                described.append((place, which, list(shape), list(strides), list(block)))
        full = grid[0], grid[1] if len(grid) > 1 else 1, 1
        steps.append(Step(kernel, compiled, full, tuple(values), tuple(places), tuple(described)))
    sizes = tuple(
        None if name in absent else (tuple(t.shape), t.dtype)
        for name in BUFFERS[:-1]
        for t in (getattr(b, name),)
    )
    _plans[key] = LaunchPlan(
        tuple(steps),
        sizes,
        2 + f.groups * (f.row_tiles(min(tile.BM, tile.BS, tile.BH or tile.BM)) + 1),
        f.x.device,
    )
    return b
