"""One identity as one flat vector: the factors of all layers, one after the other, each padded to the pool's
rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.patching.pack import check_narrowing

# elements; in 16 bits 128 bytes, which is what the widest loads and tensor descriptors ask of a factor's
# first element
ALIGN = 64


@dataclass(frozen=True)
class Place:
    """Where one layer's factors lie in the vector: A [R,K] from `down`, B [N,R] from `up`."""

    K: int
    N: int
    down: int
    up: int


@dataclass(frozen=True)
class Layout:
    """The layers of a pool, in the model's order.  size: elements of one identity"""

    rank: int
    places: Mapping[str, Place]
    size: int

    @classmethod
    def of(cls, sizes: Mapping[str, tuple[int, int]], rank: int) -> Layout:
        """sizes: path -> (N, K)."""
        places, at = {}, 0
        for path, (N, K) in sizes.items():
            up = at + _aligned(rank * K)
            places[path] = Place(K, N, at, up)
            at = up + _aligned(N * rank)
        return cls(rank, places, at)

    def views(self, pool: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """down [S,R,K] and up [S,N,R] of one layer inside a pool [S,size]; no copy."""
        p, S, R = self.places[path], pool.shape[0], self.rank
        down = pool.as_strided((S, R, p.K), (self.size, p.K, 1), pool.storage_offset() + p.down)
        return down, pool.as_strided((S, p.N, R), (self.size, R, 1), pool.storage_offset() + p.up)

    def flatten(self, name: str, factors: Mapping[str, LowRank], out: Tensor) -> None:
        """Write an identity's factors into out [size]: the scale goes into B, layers it lacks and the ranks
        it lacks are zero.

        Raises MoleShapeError where its rank is above the pool's, MoleValueError where a value does not fit
        out's dtype.
        """
        for path, factor in factors.items():
            if factor.rank > self.rank:
                raise MoleShapeError(
                    f"identity {name!r}, layer {path}",
                    expected=f"a rank of at most the pool's {self.rank}",
                    got=factor.rank,
                    hint="serve(…, rank=…) makes a pool of a larger rank",
                )
        out.zero_()
        for path, factor in factors.items():
            down, up = (view[0] for view in self.views(out[None], path))
            down[: factor.rank] = factor.down.detach()
            # in float32, so that the scale costs B no second rounding
            up[:, : factor.rank] = (
                factor.up.detach().to(torch.promote_types(torch.float32, factor.up.dtype)) * factor.scale
            )
            check_narrowing(name, path, factor, down, up)


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
