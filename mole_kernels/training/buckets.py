"""Sizes that pictures are trained at: many aspect ratios, about one area."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mole_kernels.errors import MoleValueError

# (height, width) in pixels
Size = tuple[int, int]


def make_buckets(resolution: int, multiple: int = 64, most_ratio: float = 2.0) -> tuple[Size, ...]:
    """Every (h, w) of multiples of `multiple` with h·w ≤ resolution², h as large as it can be for each w, and
    ratio ≤ most_ratio.

    The square is always among them. As in Novel AI's aspect-ratio bucketing (2022), with the area bound to
    the resolution.
    """
    if resolution < multiple or resolution % multiple:
        raise MoleValueError("buckets: resolution", expected=f"a multiple of {multiple}", got=resolution)
    sizes = {(resolution, resolution)}
    for w in range(multiple, int(resolution * math.sqrt(most_ratio)) + multiple, multiple):
        h = resolution * resolution // w // multiple * multiple
        if h >= multiple and max(h, w) <= most_ratio * min(h, w):
            sizes |= {(h, w), (w, h)}
    return tuple(sorted(sizes))


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size` in the logarithm; of equals the larger, then
    the first.
    """
    wanted = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - wanted), -b[0] * b[1]))


def cover(size: Size, bucket: Size) -> tuple[Size, tuple[int, int]]:
    """((h, w) after scaling `size` until it covers the bucket, (top, left) of the centred crop)."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    h, w = (max(b, round(s * scale)) for s, b in zip(size, bucket))
    return (h, w), ((h - bucket[0]) // 2, (w - bucket[1]) // 2)
