"""The tensors of one call: the experts of a layer, and its gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Experts(NamedTuple):
    """E low-rank experts of one layer, packed: A_e one under the other, B_e side by side.

    down   [S,R,K]  the A_e, R = Σ ranks; S = 1 (shared by the batch) or B (one set per sample), or any with
           an assignment
    up     [S,N,R]  the B_e
    scale  [E] float32  s_e, the convention's scale times the adapter's weight
    ranks  R_e of each expert, in order
    assignment [B] int64  which of the S sets each sample takes; −1: none, its row of y is the base layer's
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    ranks: tuple[int, ...]
    assignment: Tensor | None = None


class Gates(NamedTuple):
    """The gates of one call; each part may be absent, and those present multiply.

    gate       broadcastable to [B,T,E]  a given gate: constants, masks, one-hot per sample
    phi        [E,K], phi_bias [E]       token gate sigmoid(x phiᵀ + phi_bias), or softmax over the experts by
               `top_k`
    pool       [S,R] float32, pool_bias [E]  sample gate sigmoid(Σ_{r∈e} pool_r · mean_t h_r + pool_bias_e)
    top_k      0: sigmoids, independent of one another; k ≥ 1: softmax over each token's k largest logits, 0
               for the other experts
               (k ≥ E: over all; of equal logits the expert that comes first counts as the larger)
    """

    gate: Tensor | None = None
    phi: Tensor | None = None
    phi_bias: Tensor | None = None
    pool: Tensor | None = None
    pool_bias: Tensor | None = None
    top_k: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        parts = (self.gate, self.phi, self.phi_bias, self.pool, self.pool_bias)
        return {name: t for name, t in zip(self._fields, parts) if t is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Gates:
        """The same gates with every tensor changed."""
        return Gates(**{name: change(t) for name, t in self.tensors().items()}, top_k=self.top_k)
