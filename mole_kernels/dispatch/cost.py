"""Predicted time of each candidate, in microseconds inside a captured graph: waves of tiles, bytes, launches.
Pure functions.

A prediction, not a measurement: where a table of measurements covers a call, it is asked instead. The
formulas and the reasons for
the constants: docs/kernels/dispatch.md. Constants in microseconds unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf

from mole_kernels.dispatch.device import Device
from mole_kernels.dispatch.work import LIBRARY, Loop, Use, Work, ours, work
from mole_kernels.kernels.triton.tiles import next_power, two_phases
from mole_kernels.problem import Problem

# a product's first loads and last stores, launch included: smallest cuBLAS products on Hopper take about this
RAMP = 3.0
# between two kernels of a captured graph; and where the second is already resident (programmatic dependent
# launch)
GAP, PDL_GAP = 1.0, 0.3
# a kernel that hardly computes: its start and end, without the gap
SHRINK, SMALL, ELEMENTWISE, SUMS = 2.2, 1.6, 2.5, 2.5
# the last wait for a flag; an atomic that something waits for; a sample gate awaited in the first wave:
# estimates from the latency
# of the second-level cache
FLAG, ATOMIC, SAMPLE_WAIT = 0.8, 0.7, 1.0
# adding the parts of a product whose K was split
SPLIT = 1.2
# of K, for which a tile computes nothing while one accumulator is gated and the next product's first loads
# arrive
REFILL = 64
# accumulators of one tile in 32-bit registers: what a multiprocessor's 65,536 leave for them
REGISTERS = 51_200


def tile_rate(rows: int, columns: int) -> float:
    """Part of the full rate that a tile of this size reaches (published products on an H100; assumed for
    other GPUs).
    """
    area = rows * columns
    steps = (
        (32768, 1.0),
        (24576, 0.97),
        (20480, 0.95),
        (16384, 0.9),
        (12288, 0.82),
        (10240, 0.78),
        (8192, 0.7),
    )
    return next((rate for least, rate in steps if area >= least), 0.5)


def skinny_rate(R: int) -> float:
    """Part of the full rate of a product with R columns."""
    return 0.35 if R <= 32 else 0.5 if R <= 128 else 0.7


def _row_tiles(w: Work, rows: int) -> int:
    return w.groups * ceil(w.span / rows)


def _floor(w: Work, K: int, N: int) -> float:
    return RAMP / 2 + (w.M * K + N * K + w.M * N) * w.size / w.hbm


def product(w: Work, loop: Loop, K: int, N: int, extra: float = 0) -> float:
    """M×K times K×N, `extra` added to K in every tile: the best of the loop's tiles, in whole waves."""
    best = inf
    for rows, columns in loop.tiles:
        tiles = (ceil(w.M / rows) if loop is LIBRARY else _row_tiles(w, rows)) * ceil(N / columns)
        for s in loop.splits:
            if s > 1 and (tiles * s > 2 * w.processors or K / s < 256):
                continue
            waves = ceil(tiles * s / w.processors)
            time = (
                RAMP
                + waves * w.us(rows * columns * (K / s + extra), tile_rate(rows, columns))
                + (SPLIT if s > 1 else 0)
            )
            best = min(best, time)
    return max(best, _floor(w, K, N))


def plain(w: Work, loop: Loop = LIBRARY) -> float:
    """The layer without experts, by a library."""
    return product(w, LIBRARY, w.K, w.N)


def shrink_us(w: Work, loop: Loop) -> float:
    """h and what follows from it, as a launch of its own: x from the cache once for each column tile of h."""
    width = max(16, w.R)
    tiles = ceil(width / min(loop.columns, next_power(width)))
    macs = w.M * w.K * (width + tiles * w.token) / w.processors
    last = ATOMIC if w.sample_gated else 0
    return SHRINK + last + max(tiles * w.M * w.K * w.size / w.l2, w.us(macs, skinny_rate(w.R)))


def _after(w: Work) -> float:
    return PDL_GAP if w.pdl else GAP


def two_pass_us(w: Work, loop: Loop) -> float:
    return shrink_us(w, loop) + _after(w) + product(w, loop, w.K, w.N, extra=max(16, w.R))


def recompute_us(w: Work, loop: Loop) -> float:
    """Every tile of y makes all of its rows' h: R more columns; infinite where no tile has the registers for
    them.
    """
    best, wide = inf, (next_power(w.R) if loop.ticket else w.R) + w.token
    for rows, columns in loop.tiles:
        if rows * (columns + wide) > REGISTERS:
            continue
        tiles = _row_tiles(w, rows) * ceil(w.N / columns)
        for s in loop.splits:
            if s > 1 and (tiles * s > 2 * w.processors or w.K / s < 256):
                continue
            macs = rows * ((columns + wide) * w.K / s + w.R * columns)
            waves = ceil(tiles * s / w.processors)
            best = min(best, RAMP + waves * w.us(macs, tile_rate(rows, columns)) + (SPLIT if s > 1 else 0))
    return max(best, _floor(w, w.K, w.N))


def persistent_us(w: Work, loop: Loop) -> float:
    """Tiles of h first, tiles of y after, one launch; the ragged last wave takes what h cost where there is
    one.
    """
    best = inf
    width = min(loop.columns, next_power(w.R) if loop.ticket else max(16, w.R))
    for rows, columns in loop.tiles:
        n_m = _row_tiles(w, rows)
        tall = loop.h_rows or rows
        n_h, n_y = _row_tiles(w, tall) * ceil(w.R / width), n_m * ceil(w.N / columns)
        rate = max(0.35, tile_rate(tall, width)) if width >= 64 else 0.35
        h = w.us(tall * (max(32, width) + w.token) * w.K, rate)
        for s in loop.splits:
            if s == 3 or (s > 1 and (n_y * s > w.processors or w.K / s < 256)):
                continue
            y = w.us(rows * columns * (w.K / s + w.R), tile_rate(rows, columns)) + (SPLIT if s > 1 else 0)
            for k in loop.h_splits:
                if k > 1 and w.K / k < 128:
                    continue
                span = two_phases(n_h * k, h / k, n_y * s, y, w.processors)
                best = min(best, max(span, h / k + w.us(rows * columns * w.R, tile_rate(rows, columns))))
    waits = FLAG + (ATOMIC if loop.ticket else 0) + (SAMPLE_WAIT if w.sample_gated else 0)
    return max(RAMP + best + waits, _floor(w, w.K, w.N))


def _expand(w: Work) -> float:
    """y += z·Bᵀ by itself: y read and written once more."""
    return ELEMENTWISE + max(
        w.move(2 * w.M * w.N * w.size), w.us(w.M * w.N * max(32, w.R) / w.processors, 0.5)
    )


def added_us(w: Work, loop: Loop) -> float:
    """Shrink, the base by a library, and our expand on top."""
    return plain(w) + GAP + shrink_us(w, loop) + GAP + _expand(w)


def merge_us(w: Work, loop: Loop) -> float:
    """W with the experts in it, for each sample where they differ, then a library's product."""
    move = w.move(w.N * w.K * w.size * (1 + w.many))
    return (
        plain(w)
        + (GAP if loop.ticket else _after(w))
        + SHRINK
        + max(move, w.us(w.N * w.K * w.R * w.many / w.processors, 0.6))
    )


def dense_us(w: Work, loop: Loop) -> float:
    """Each ΔW made anew (and the token gate), then the base and E products more, each in an accumulator of
    its own, gated and added.
    """
    gathered = max(w.move(w.N * w.K * w.size * w.E), w.us(w.N * w.K * w.R / w.processors, 0.6))
    logits = w.M * w.K * w.size / w.l2 if w.token else 0.0
    return SHRINK + gathered + logits + _after(w) + product(w, loop, w.K * (1 + w.E), w.N, extra=w.E * REFILL)


def small_launches(problem: Problem, use: Use) -> int:
    """Element-wise launches that the stacked backend makes beside its products (counted in
    backends/stacked.py).
    """
    token, sample, given = problem.token_gate, problem.sample_gate, problem.given_gate
    if use.backward:
        return 11 + given + 7 * token + 11 * sample
    return 3 + 2 * given + 5 * token + 8 * sample + (use.save and token)


def _torch_shrink(w: Work) -> float:
    columns = max(16, w.R + w.token)
    return SHRINK + max(w.M * w.K * w.size / w.l2, w.us(w.M * w.K * columns / w.processors, skinny_rate(w.R)))


def stacked(w: Work, small: int) -> float:
    """Plain torch: shrink, `small` element-wise launches for the gates, the base, and addmm."""
    return _torch_shrink(w) + small * (GAP + SMALL) + GAP + plain(w) + GAP + _expand(w)


def sums(w: Work) -> float:
    """dA and dB (and the gates' sums): x and dY once more for 64 columns at a time, partial sums written and
    read.
    """
    rate = 0.3 if w.R <= 32 else 0.45 if w.R <= 128 else 0.65
    read = ceil(w.R / 64) * w.M * (w.K + w.N) * w.size / w.l2
    return (
        SUMS
        + max(read, w.us(w.M * max(16, w.R) * (w.K + w.N) / w.processors, rate))
        + 8 * w.R * (w.K + w.N) / w.l2
    )


def stacked_sums(w: Work) -> float:
    """dA and dB by two products of a library."""
    return sums(w) + GAP + SUMS


WAYS: dict[str, Callable[[Work, Loop], float]] = {
    "persistent": persistent_us,
    "recompute": recompute_us,
    "two_pass": two_pass_us,
    "merge": merge_us,
    "added": added_us,
    "dense": dense_us,
}


def predict(
    candidate: str,
    problem: Problem,
    device: Device,
    use: Use = Use(),  # noqa: B008
    loop: Loop | None = None,
) -> float:
    """Microseconds of a candidate ("plain" is the layer without experts); `loop` overrides our kernels' own
    tiles.
    """
    w = work(problem, device, use)
    if candidate == "plain":
        return plain(w)
    if candidate == "stacked":
        time = stacked(w, small_launches(problem, use))
        return time + GAP + stacked_sums(w) if use.backward else time
    time = WAYS[candidate](w, loop or ours(problem, device, use, candidate))
    return time + GAP + sums(w) if use.backward else time
