"""One adapter as one flat vector: the factors of all layers in a row, each padded to the pool's rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.patching.pack import check_narrowing

# elements; 128 bytes in 16 bits, the alignment that the widest loads and tensor descriptors ask for
ALIGN = 64


@dataclass(frozen=True)
class FactorPlace:
    """Where the factors of one layer begin in the vector.

    Args:
        K: Input width of the layer.
        N: Output width of the layer.
        down: First element of A [R,K].
        up: First element of B [N,R].
    """

    K: int
    N: int
    down: int
    up: int


@dataclass(frozen=True)
class AdapterLayout:
    """The layers of a pool, in the model's order.

    Args:
        rank: Rank R that every layer has room for.
        places: path -> where the factors of that layer lie.
        size: Number of elements of one adapter.
    """

    rank: int
    places: Mapping[str, FactorPlace]
    size: int

    @classmethod
    def of(cls, sizes: Mapping[str, tuple[int, int]], rank: int) -> AdapterLayout:
        """Lay the layers out one after the other.

        Args:
            sizes: path -> (N, K).
            rank: Rank of the pool.
        """
        places, start = {}, 0
        for path, (N, K) in sizes.items():
            up = start + _aligned(rank * K)
            places[path] = FactorPlace(K, N, start, up)
            start = up + _aligned(N * rank)
        return cls(rank, places, start)

    def views(self, sets: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """Views down [S,R,K] and up [S,N,R] of one layer inside a pool `sets` [S,size]; nothing is copied."""
        place, S, R = self.places[path], sets.shape[0], self.rank
        down = sets.as_strided((S, R, place.K), (self.size, place.K, 1), sets.storage_offset() + place.down)
        up = sets.as_strided((S, place.N, R), (self.size, R, 1), sets.storage_offset() + place.up)
        return down, up

    def flatten(self, name: str, factors: Mapping[str, LowRank], out: Tensor) -> None:
        """Write an adapter's factors into a vector; B takes the scale, absent layers and ranks are zero.

        Args:
            name: The adapter, for messages.
            factors: path -> its factors on that layer.
            out: [size], any floating dtype.

        Raises:
            MoleShapeError: A rank is larger than the pool's.
            MoleValueError: A value does not fit the dtype of `out`.
        """
        for path, factor in factors.items():
            if factor.rank > self.rank:
                raise MoleShapeError(
                    f"adapter {name!r}, layer {path}",
                    expected=f"a rank of at most the pool's {self.rank}",
                    got=factor.rank,
                    hint="serve(…, rank=…) makes a pool of a larger rank",
                )
        out.zero_()
        for path, factor in factors.items():
            down, up = (view[0] for view in self.views(out[None], path))
            down[: factor.rank] = factor.down.detach()
            # multiply in float32, so that the scale costs B no second rounding
            wide = factor.up.detach().to(torch.promote_types(torch.float32, factor.up.dtype))
            up[:, : factor.rank] = wide * factor.scale
            check_narrowing(name, path, factor, down, up)

    def scaled(self, name: str, vector: Tensor, strengths: Mapping[str, float]) -> Tensor:
        """A copy of an adapter's vector whose B of each layer is multiplied.

        Args:
            name: The adapter, for messages.
            vector: [size].
            strengths: path -> the number that multiplies B there.

        Raises:
            MoleValueError: A product does not fit the vector's dtype.
        """
        out = torch.empty_like(vector).copy_(vector)
        for path, strength in strengths.items():
            up = self.views(out[None], path)[1][0]
            up.copy_(up.to(torch.promote_types(torch.float32, up.dtype)) * strength)
            if not bool(up.isfinite().all()):
                raise MoleValueError(
                    f"scale of {name!r}, layer {path}",
                    expected=f"a product that fits {up.dtype}",
                    got=strength,
                )
        return out


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
