"""Layers for `kernelize`: they hold nothing, and read the tensors of the module whose forward they become."""

from __future__ import annotations

from torch import Tensor, nn

from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts, Gates


class GatedLoRALinear(nn.Module):
    """y = x Wᵀ + b + Σ_e s_e·g_e(token, sample)·(x A_eᵀ) B_eᵀ; x [...,K] -> [...,N].

    The module has weight [N,K], bias [N] or None, down [S,R,K], up [S,N,R], scale [E] and ranks (R_1 … R_E).
    Where it has them, the gates
    are gate [B|1,T|1,E], token_weight [E,K], token_bias [E], pool [S,R], sample_bias [E] and top_k, the samples' sets
    assignment [B].
    """

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: Tensor
    ranks: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        experts = Experts(
            self.down, self.up, self.scale, tuple(self.ranks), getattr(self, "assignment", None)
        )
        given: dict[str, Tensor | None] = {
            name: getattr(self, name, None)
            for name in ("gate", "token_weight", "token_bias", "sample_weight", "sample_bias")
        }
        return gated_lora_linear(
            x, self.weight, self.bias, experts, Gates(**given, top_k=int(getattr(self, "top_k", 0)))
        )


__all__ = ["GatedLoRALinear"]
