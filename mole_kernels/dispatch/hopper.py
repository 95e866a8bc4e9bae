"""Predicted time of the compiled Hopper kernels: csrc/cuda/sm90/tile.h's own formulas, so that what runs can
be asked without it. Pure.
"""

from __future__ import annotations

from math import ceil, inf

from mole_kernels.dispatch.work import Work
from mole_kernels.kernels.sm90 import CLUSTERS, LOGITS, SHAPES

# microseconds: launch, first loads and last stores; an exchange in a cluster; the last flag; the ticket; a
# sample gate. Estimates from
# the latency of the second-level cache
RAMP, EXCHANGE, FLAG, TICKET, SAMPLE = 3.0, 0.6, 0.8, 0.7, 1.0
SHARED = 232_448
# backward: columns that a copy of W brings at once; depth of the product that adds dlogit·Φ
BOX, LOGIT_DEPTH = 32, 16
# clusters of so many CTAs that are resident at once on 132 multiprocessors: some parts of the chip hold no
# whole number of them
RESIDENT = {1: 132, 2: 66, 4: 32, 8: 16}


def hopper_rate(rows: int, columns: int) -> float:
    """Part of the tensor cores' rate that a main loop with such tiles reaches (published products on an
    H100).
    """
    area = rows * columns
    steps = ((32768, 1.0), (24576, 0.97), (20480, 0.95), (16384, 0.9), (8192, 0.7))
    return next((rate for least, rate in steps if area >= least), 0.5)


def _stages(
    way: str, groups: int, columns: int, extra: int, z_columns: int, padded: int, back: bool, parts: int
) -> int:
    """Stages that fit in shared memory, at most six. parts: shares of D of one row that lie there."""
    rows = 64 * groups
    wide = ceil(extra / BOX) * BOX if back else extra
    loaded = max(columns, wide) if way == "persistent" else columns + wide
    rest = (
        rows * parts * 4
        + rows * columns * 2
        + (rows * (z_columns * 2 + 16) if z_columns else 0)
        + rows * 17 * 4
    )
    rest += rows // 16 * extra * 4 + (padded + 3) // 4 * 16 + 256
    return min(6, (SHARED - rest) // ((rows + loaded) * 128))


def _resident(w: Work, cluster: int) -> int:
    return RESIDENT[cluster] * w.processors // 132


def _tile(
    way: str, w: Work, groups: int, columns: int, extra: int, cluster: int, back: bool, token: bool
) -> float:
    """Microseconds of the whole launch with one tile, infinite where it cannot be."""
    rows, slice_ = 64 * groups, extra - (LOGITS if token and not back else 0)
    row_tiles, column_tiles = w.groups * ceil(w.span / rows), ceil(w.N / columns)
    slices = cluster if way == "cluster" else ceil(w.R / slice_)
    if way != "persistent" and slices * slice_ < w.R:
        return inf
    if (way == "recompute" and slices > 1) or (way == "cluster" and column_tiles < cluster):
        return inf
    parts = cluster * w.E if back and token and way != "persistent" else 0
    if (
        _stages(
            way,
            groups,
            columns,
            extra,
            slices * slice_ if way == "cluster" else 0,
            slices * slice_ + LOGITS,
            back,
            parts,
        )
        < 3
    ):
        return inf
    clusters = row_tiles * ceil(column_tiles / cluster)
    if way == "cluster" and w.sample_gated and clusters > _resident(w, cluster):
        return inf
    stacked = 0 if way == "persistent" else extra
    inner = w.R + (LOGIT_DEPTH if back and token else 0)
    y = w.us(rows * ((columns + stacked) * w.K + columns * inner), hopper_rate(rows, columns))
    sample = SAMPLE if w.sample_gated else 0
    if way != "persistent":
        return RAMP + ceil(clusters / _resident(w, cluster)) * y + (EXCHANGE if cluster > 1 else 0) + sample
    h = w.us(rows * extra * w.K, max(0.35, hopper_rate(rows, extra)))
    (rounds, late), (waves, ragged) = (
        divmod(row_tiles * slices, w.processors),
        divmod(row_tiles * column_tiles, w.processors),
    )
    if ragged <= w.processors - late:
        span = max(rounds * h + (waves + (ragged > 0)) * y, (rounds + (late > 0)) * h + waves * y)
    else:
        span = (rounds + (late > 0)) * h + (waves + 1) * y
    return RAMP + span + FLAG + TICKET + sample


def predict_us(way: str, w: Work, token: bool, back: bool = False) -> float:
    """Microseconds of cluster, persistent or recompute with its best tile; infinite where none fits.

    back: of its dX alone, the first launch of a backward, w in the swapped roles; token: there is a token
    gate
    """
    clusters = CLUSTERS if way == "cluster" else (1,)
    shapes = SHAPES[f"{way}_dx" if back else way]
    return min(
        _tile(way, w, groups, columns, extra, c, back, token)
        for groups, columns, extra in shapes
        for c in clusters
    )
