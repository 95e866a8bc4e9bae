"""The tensors of one call: the experts of a layer, and its gates."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Experts(NamedTuple):
    """E low-rank experts of one layer, packed: A_e one under the other, B_e side by side.

    down   [S,R,K]  the A_e, R = Σ ranks; S = 1 (shared by the batch) or B (one set per sample)
    up     [S,N,R]  the B_e
    scale  [E] float32  s_e, the convention's scale times the adapter's weight
    ranks  R_e of each expert, in order
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    ranks: tuple[int, ...]


class Gates(NamedTuple):
    """The gates of one call; each part may be absent, and those present multiply.

    gate       broadcastable to [B,T,E]  a given gate: constants, masks, one-hot per sample
    phi        [E,K], phi_bias [E]       token gate sigmoid(x phiᵀ + phi_bias)
    pool       [S,R] float32, pool_bias [E]  sample gate sigmoid(Σ_{r∈e} pool_r · mean_t h_r + pool_bias_e)
    """

    gate: Tensor | None = None
    phi: Tensor | None = None
    phi_bias: Tensor | None = None
    pool: Tensor | None = None
    pool_bias: Tensor | None = None
