"""What one call is, without its tensors: the question a backend is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """Sizes, ranks, dtype, device and gate kind of one call of the operator.

    B samples of T tokens, K in, N out, S adapter sets (1 or B, any with an assignment); ranks of each expert
    dtype      of x, weight, down and up
    device     the device's type: "cpu", "cuda", …
    token_gate, sample_gate, given_gate  which gates the call has
    top_k      0: the token gate is a sigmoid; k: a softmax over each token's k largest logits
    assigned   the samples name their sets
    """

    B: int
    T: int
    K: int
    N: int
    ranks: tuple[int, ...]
    S: int
    dtype: torch.dtype
    device: str
    token_gate: bool = False
    sample_gate: bool = False
    given_gate: bool = False
    top_k: int = 0
    assigned: bool = False

    @property
    def token_kind(self) -> str:
        return "token" if self.top_k == 0 else "softmax" if self.top_k >= self.E else f"top-{self.top_k}"

    @property
    def M(self) -> int:
        return self.B * self.T

    @property
    def E(self) -> int:
        return len(self.ranks)

    @property
    def R(self) -> int:
        return sum(self.ranks)

    def base_flops(self) -> int:
        """2·M·K·N: the plain layer."""
        return 2 * self.M * self.K * self.N

    def flops(self) -> int:
        """Base, shrink, expand and, with a token gate, its E columns: what the mathematics needs."""
        columns = self.R + (self.E if self.token_gate else 0)
        return self.base_flops() + 2 * self.M * (columns * self.K + self.R * self.N)

    def bytes(self) -> int:
        """Each input read once, the output written once."""
        elements = self.M * (self.K + self.N) + self.N * self.K + self.S * self.R * (self.K + self.N)
        if self.token_gate:
            elements += self.E * self.K
        return elements * torch.empty((), dtype=self.dtype).element_size()

    def __str__(self) -> str:
        kinds = (("given", self.given_gate), (self.token_kind, self.token_gate), ("sample", self.sample_gate))
        gates = "+".join(name for name, on in kinds if on) or "none"
        size = (
            f"x [{self.B},{self.T},{self.K}] → {self.N}, ranks {','.join(map(str, self.ranks))}, S={self.S}"
        )
        assigned = " by assignment" if self.assigned else ""
        return f"{size}{assigned}, gates {gates}, {str(self.dtype)[6:]}, {self.device}"
