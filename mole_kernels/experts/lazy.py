"""Layers that are read when asked for: for experts that are too large to hold in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from mole_kernels.experts.lowrank import LowRank


class Size(NamedTuple):
    """Out, in, rank and dtype of one expert on one layer: what a file's header says before any of its data is
    read.
    """

    N: int
    K: int
    R: int
    dtype: torch.dtype


class LazyLayers(Mapping[str, LowRank]):
    """path -> LowRank, read anew at every look-up and not cached; `sizes` are known without reading."""

    def __init__(self, sizes: Mapping[str, Size], read: Callable[[str], LowRank]) -> None:
        self.sizes = dict(sizes)
        self._read = read

    def __getitem__(self, path: str) -> LowRank:
        if path not in self.sizes:
            raise KeyError(path)
        return self._read(path)

    def __contains__(self, path: object) -> bool:
        return path in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def layer_size(layers: Mapping[str, LowRank], path: str) -> Size:
    """The layer's sizes, without reading it where that is possible."""
    if isinstance(layers, LazyLayers):
        return layers.sizes[path]
    layer = layers[path]
    return Size(
        layer.out_features, layer.in_features, layer.rank, stored_dtype([layer.down.dtype, layer.up.dtype])
    )


def stored_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all of these exactly; of 8 bits, float16, since results are no longer
    what was rounded to 8.
    """
    widest = torch.float16 if dtypes[0].itemsize == 1 else dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, torch.float16 if dtype.itemsize == 1 else dtype)
    return widest
