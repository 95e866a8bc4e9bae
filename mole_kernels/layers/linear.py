"""A frozen linear layer plus E gated low-rank experts, and what it shares with the convolution; they hold tensors and do no arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.errors import MoleShapeError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.functional import NO_GATES, gated_lora_linear_with_gates
from mole_kernels.gates.gate import Gate
from mole_kernels.operands import Experts, Gates


class LastGates(NamedTuple):
    """What the gates of the last eager forward said: token [B,T,E], sample [B,E], given (broadcastable to [B,T,E]); None where absent."""

    token: Tensor | None
    sample: Tensor | None
    given: Tensor | None


class Gated(nn.Module):
    """What the linear layer and its convolutional twin share: experts, a gate, a backend, and whether they are on."""

    experts: LayerExperts
    gate: Gate | None
    backend: str
    experts_on: bool
    last_gates: LastGates | None
    # layers with the same input, whose outputs one of them makes for all: `Handle.group`
    group: Any = None

    def mixture(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x Wᵀ + b + Σ_e s_e·g_e·(x A_eᵀ) B_eᵀ for tokens x [...,K] and weight [N,K]."""
        return self.mixture_of(x, weight, bias, self.experts.operands(), self.operands_of_gate())

    def operands_of_gate(self) -> Gates:
        return NO_GATES if self.gate is None else self.gate.operands(self.experts)

    def mixture_of(self, x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates) -> Tensor:
        """`mixture` of operands given; what the gates said is kept."""
        y, token, sample = gated_lora_linear_with_gates(x, weight, bias, experts, gates, backend=self.backend)
        if not torch.compiler.is_compiling():
            # past nn.Module's search for parameters and modules, which costs more than the tuple
            object.__setattr__(self, "last_gates", LastGates(token, sample, None if gates.gate is None else gates.gate.detach()))
        return y

    def attach_experts(self, experts: LayerExperts, gate: Gate | None, backend: str) -> None:
        self.experts, self.gate, self.backend = experts, gate, backend
        self.experts_on, self.last_gates = True, None

    def __getstate__(self):
        # the last call's activations are no part of the layer
        return {**self.__dict__, "last_gates": None}


class GatedLoRALinear(Gated, nn.Linear):
    """y = x Wᵀ + b + Σ_e s_e·g_e(token, sample)·(x A_eᵀ) B_eᵀ; W and b are frozen.

    x [...,K] -> [...,N]; the first dimension is the sample, all between are tokens ([M,K] is one sample).
    """

    @classmethod
    def from_linear(cls, base: nn.Linear, experts: LayerExperts, gate: Gate | None = None, *, backend: str = "auto") -> GatedLoRALinear:
        """A new layer that shares base's weight and bias (which it freezes); base itself is left alone otherwise."""
        check_fit("GatedLoRALinear", base.in_features, base.out_features, experts)
        layer = cls(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        base.requires_grad_(False)
        layer.weight, layer.bias = base.weight, base.bias
        layer.attach_experts(experts, gate, backend)
        return layer.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.group is not None and (y := self.group.take(self, x)) is not None:
            return y
        return self.mixture(x, self.weight, self.bias) if self.experts_on else F.linear(x, self.weight, self.bias)


def check_fit(where: str, K: int, N: int, experts: LayerExperts) -> None:
    """The experts' K and N are the layer's."""
    got = (experts.down.shape[2], experts.up.shape[1])
    if got != (K, N):
        raise MoleShapeError(where, expected=f"experts of K, N = {K}, {N}", got=f"{got[0]}, {got[1]}")
