"""What a call asks of a GPU: its sizes as the kernels see them, and the loops (tile sizes) that could do
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from mole_kernels.dispatch.device import Device
from mole_kernels.kernels.triton.tiles import (
    fitted,
    for_dense,
    for_recompute,
    next_power,
    rows_of_h,
    tile_for,
)
from mole_kernels.problem import Problem


@dataclass(frozen=True)
class Use:
    """What a Problem leaves open.

    backward   the gradients of everything but W, instead of y
    save       forward: h is kept for a backward
    by_token, by_sample  how the given gate varies, if there is one
    tf32       float32 products on tensor cores (torch's switch)
    """

    backward: bool = False
    save: bool = False
    by_token: bool = True
    by_sample: bool = True
    tf32: bool = False

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "training" if self.save else "forward"


# the stretched tiles are what libraries have and powers of two do not
LIBRARY_TILES = (
    (256, 128),
    (256, 160),
    (128, 256),
    (128, 192),
    (128, 160),
    (128, 128),
    (128, 96),
    (128, 64),
    (64, 256),
    (64, 192),
    (64, 160),
    (64, 128),
    (64, 64),
)


@dataclass(frozen=True)
class Loop:
    """The main loops a candidate may choose from: tiles of y, the widest tile of h and its rows (0: y's), the
    splits of K.
    """

    tiles: tuple[tuple[int, int], ...] = LIBRARY_TILES
    columns: int = 256
    splits: tuple[int, ...] = (1, 2, 3, 4)
    h_splits: tuple[int, ...] = (1, 2, 4)
    ticket: bool = False
    h_rows: int = 0


LIBRARY = Loop()


def ours(problem: Problem, device: Device, use: Use, candidate: str = "persistent") -> Loop:
    """The one tile that our kernel takes for this call (`kernels/triton/tiles.py`); K is never split."""
    K, N = (problem.N, problem.K) if use.backward else (problem.K, problem.N)
    gates = problem.token_gate + problem.sample_gate + problem.given_gate + use.backward
    tile = tile_for(
        problem.M,
        K,
        N,
        problem.R,
        problem.dtype,
        device.capability,
        device.processors,
        candidate == "recompute",
    )
    tile = fitted(tile, device.capability, use.backward, gates)
    if candidate == "recompute":
        tile = for_recompute(tile, device.capability, problem.token_gate + problem.given_gate)
    if candidate == "dense":
        tile = for_dense(tile, device.capability)
    if candidate == "persistent":
        alone = problem.S > 1 or problem.assigned or problem.sample_gate
        n_m = problem.B * ceil(problem.T / tile.BM) if alone else ceil(problem.M / tile.BM)
        tile = rows_of_h(tile, n_m, ceil(N / tile.width), problem.R, device.processors)
    return Loop(((tile.BM, tile.width),), tile.BR, (1,), (1,), ticket=True, h_rows=tile.BH)


@dataclass(frozen=True)
class Work:
    """One fused product on one device; the backward's is the forward's with its roles swapped.

    groups, span  tiles do not straddle groups of `span` rows (samples, where each has its own experts or
                  sample gate)
    many          sets of merged weights that merging would have to make
    token         columns that the token gate's logits add to every tile of h (0: no token gate)
    per_us        floating-point operations a microsecond of one multiprocessor; l2, hbm bytes a microsecond
    """

    M: int
    K: int
    N: int
    R: int
    E: int
    groups: int
    span: int
    many: int
    token: int
    sample_gated: bool
    size: int
    per_us: float
    processors: int
    l2: float
    hbm: float
    cache: float
    pdl: bool

    def us(self, macs: float, rate: float = 1.0) -> float:
        """Time of so many multiply-adds on one multiprocessor at a part of its rate."""
        return 2 * macs / (self.per_us * rate)

    def move(self, size: float) -> float:
        """Time to move bytes that were touched a moment ago: from the cache where they fit."""
        return size / (self.l2 if size <= 0.8 * self.cache else self.hbm)


def work(problem: Problem, device: Device, use: Use) -> Work:
    K, N = (problem.N, problem.K) if use.backward else (problem.K, problem.N)
    alone = problem.S > 1 or problem.assigned or problem.sample_gate
    many = problem.B if problem.S > 1 or problem.assigned or (problem.given_gate and use.by_sample) else 1
    return Work(
        M=problem.M,
        K=K,
        N=N,
        R=problem.R,
        E=problem.E,
        groups=problem.B if alone else 1,
        span=problem.T if alone else problem.M,
        many=many,
        token=next_power(problem.E) if problem.token_gate and not use.backward else 0,
        sample_gated=problem.sample_gate,
        size=torch.empty((), dtype=problem.dtype).element_size(),
        per_us=device.rate(problem.dtype, use.tf32) / device.processors,
        processors=device.processors,
        l2=device.l2 * 1e6,
        hbm=device.hbm * device.hbm_reach * 1e6,
        cache=device.cache * 1e6,
        pdl=device.capability[0] >= 9,
    )
