"""Tile sizes: which, and why. A choice here is a prediction from a cost model until a table of measurements
replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from math import ceil

import torch


def _prefetches() -> bool:
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 9)


# from 3.9 on Triton loads a product's next operands into registers while this one's are multiplied, and
# Hopper's epilogues need more too
PREFETCHES = _prefetches()


def next_power(n: int, low: int = 16) -> int:
    """The smallest power of two that is at least n and at least `low`."""
    return max(low, 1 << max(n - 1, 0).bit_length())


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch.

    BM, BN, BK  rows, columns and depth of a base tile
    BX          columns beside the BN, in a second accumulator: tiles of 160 and 192 columns, which powers of
                two do not have
    BR          most columns of h in one tile; BZ depth of a step of the expand
    BH          rows of a tile of h in the persistent kernel, 0: BM
    BS          rows of a tile of the shrink kernel, where it is a launch of its own
    group       row tiles that share columns of W in time
    tma         load x and w by tensor descriptors (Hopper and later) where their layout allows
    pdl         programmatic dependent launch between shrink and expand (Hopper and later)
    programs    of the persistent kernel; 0: eight warps of them for each multiprocessor
    """

    BM: int = 128
    BN: int = 128
    BX: int = 0
    BK: int = 64
    BR: int = 64
    BZ: int = 64
    BH: int = 0
    BS: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8
    tma: bool = False
    pdl: bool = False
    programs: int = 0

    @property
    def width(self) -> int:
        """Columns of one tile of y."""
        return self.BN + self.BX


# relative rate of the tensor cores at a tile's size, from published H100 GEMMs; a start for the tables
_RATE = {
    (128, 256): 1.0,
    (128, 192): 0.97,
    (128, 160): 0.95,
    (128, 128): 0.9,
    (128, 64): 0.7,
    (64, 128): 0.7,
    (64, 64): 0.5,
}


@lru_cache(maxsize=4096)
def tile_for(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    processors: int,
    even: bool = False,
) -> Tile:
    """The tile with the least predicted time: waves of tiles over the multiprocessors, at the tile's rate.
    even: a power of two wide.
    """
    if dtype == torch.float32:
        # tf32, or no tensor cores at all
        small = 64 * 64 * processors >= M * N
        return Tile(BM=32 if small else 64, BN=64, BK=32, BR=32, BZ=32, BS=32, warps=4, stages=2)
    hopper = capability[0] in (9, 10)
    fits = [t for t in _RATE if (hopper or t[1] <= 128) and not (even and t[1] in (160, 192))]

    def predicted(t: tuple[int, int]) -> float:
        return ceil(ceil(M / t[0]) * ceil(N / t[1]) / processors) * t[0] * t[1] / _RATE[t]

    BM, columns = min(fits, key=predicted)
    BN = 128 if columns in (160, 192) else columns
    warps = 4 if BM * BN <= 64 * 128 else 8
    # consumer Ampere, Ada and Blackwell have 100 KB of shared memory, the data-centre parts 160 or more
    stages = 3 if roomy(capability) else 2
    # not on consumer Blackwell: as compiled there, descriptors make the main loop longer (207 instructions,
    # 185 by pointers)
    return Tile(
        BM=BM,
        BN=BN,
        BX=columns - BN,
        BR=64 if BM == 128 else 32,
        BS=32 if 64 * processors > M else 64,
        warps=warps,
        stages=stages,
        tma=capability[0] in (9, 10),
        pdl=capability[0] >= 9,
    )


def roomy(capability: tuple[int, int]) -> bool:
    """Whether a multiprocessor has 160 KB of shared memory or more: the data-centre parts."""
    return capability == (8, 0) or capability[0] in (9, 10)


def fitted(
    tile: Tile, capability: tuple[int, int], backward: bool, gates: int, softmax: bool = False
) -> Tile:
    """`tile` narrowed until the kernel's registers hold it, as the compiler reports them (`make aot` shows no
    spill at these).

    gates: how many kinds of gate the call has, one more in the backward. Their epilogues add tiles of h and
    its gates: half as many columns
    of h at a time (Hopper's forward excepted, which holds them); and where the accumulators are in the
    threads' own registers and not
    a warp group's (all but Hopper and Blackwell's data-centre parts), half as many columns of y; with a
    softmax there, half as many
    rows of the shrink. Consumer Ampere's and Ada's backward takes z in steps of 16 columns with two kinds of
    gate; Hopper's backward holds
    160 columns of y with two kinds of gate, 128 with three. Where Triton prefetches operands into registers,
    steps are half as deep and
    one more of them is on its way, so the shared memory is the same.
    """
    own = capability[0] not in (9, 10)
    if PREFETCHES and own and tile.BK > 32:
        tile = replace(tile, BK=32, stages=tile.stages + 1)
    if not gates:
        return tile
    narrow = own and (backward or gates > 2) and tile.BM * tile.BN >= 128 * 128
    wide = capability[0] == 9 and not backward
    BR, BZ = (n if wide else min(n, 32) for n in (tile.BR, tile.BZ))
    BN, BX = 64 if narrow else tile.BN, tile.BX
    if not own and backward and gates > 1 and tile.width > 128:
        BN, BX = 128, 32 if gates < 4 else 0
    if capability[0] == 8 and not roomy(capability) and backward and gates > 2:
        BZ = 16
    # without descriptors data-centre Blackwell holds the addresses in registers too
    pointers = capability[0] == 10 and backward and gates > 1 and not tile.tma
    BS = min(tile.BS, 32) if own and softmax else tile.BS
    if PREFETCHES:
        BZ = min(BZ, 16 if backward and capability != (8, 0) else 32)
    return replace(tile, BR=BR, BZ=BZ if own or pointers or PREFETCHES else tile.BZ, BN=BN, BX=BX, BS=BS)


def for_recompute(tile: Tile, capability: tuple[int, int], gates: int) -> Tile:
    """`tile` for a kernel that holds y's and h's accumulators at once, narrowed as `fitted` does."""
    narrow = capability[0] not in (9, 10) and gates > 0
    return replace(tile, BN=min(tile.BN, 64) if narrow else tile.BN, BX=0)


def for_dense(tile: Tile, capability: tuple[int, int]) -> Tile:
    """`tile` for a kernel that holds two accumulators of y: 160 columns at most, 64 where they are in the
    threads' own registers.
    """
    if capability[0] not in (9, 10):
        return replace(tile, BN=min(tile.BN, 64), BX=0)
    return tile if tile.width <= 160 else replace(tile, BN=128, BX=0)


def two_phases(n_h: int, h: float, n_y: int, y: float, programs: int) -> float:
    """Tiles of h, then tiles of y, each program its share; those that made one h more get no tile of the
    ragged last wave.
    """
    rounds, late = divmod(n_h, programs)
    waves, ragged = divmod(n_y, programs)
    early = programs - late
    if ragged <= early:
        return max(rounds * h + (waves + (ragged > 0)) * y, (rounds + (late > 0)) * h + waves * y)
    return (rounds + (late > 0)) * h + (waves + 1) * y


def rows_of_h(tile: Tile, n_m: int, n_n: int, R: int, processors: int) -> Tile:
    """`tile` with tiles of h of 64 rows where that is predicted to shorten the persistent kernel: the first
    wave waits less for them.

    n_m, n_n: row and column tiles of y. Not shorter: 64 rows are the least of Hopper's tensor-core
    instruction
    """
    BR = min(tile.BR, next_power(R))
    rate = {128: 0.7, 64: 0.5} if BR >= 64 else {128: 0.35, 64: 0.35}

    def span(rows: int) -> float:
        n_h, h = n_m * tile.BM // rows * ceil(R / BR), rows * max(32, BR) / rate[rows]
        return two_phases(n_h, h, n_m * n_n, tile.BM * tile.width / _RATE[tile.BM, tile.width], processors)

    return replace(tile, BH=64 if tile.BM == 128 and span(64) < span(128) else 0)


def for_sums(R: int, dtype: torch.dtype, capability: tuple[int, int], busy: bool) -> tuple[int, int, int]:
    """Tokens of a step, columns of K or N and columns of h of one job of the sums over tokens.

    busy: sets by assignment, or a given gate beside others; half as many columns where accumulators are in
    the threads' own registers
    or Triton prefetches. Where both hold, half as many columns of h as well, or when not busy half as many
    tokens
    """
    BT, BC, BR = (32, 32, 32) if dtype == torch.float32 else (64, 128, 64)
    own = capability[0] not in (9, 10)
    if PREFETCHES and own:
        BT, BR = (BT, 32) if busy else (32, BR)
    return BT, min(BC, 64) if busy and (own or PREFETCHES) else BC, min(BR, next_power(R))
