"""A frozen linear layer, or 1x1 convolution, plus E gated low-rank experts; they hold tensors and do no arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.errors import MoleShapeError, MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.functional import NO_GATES, gated_lora_linear_with_gates
from mole_kernels.gates.gate import Gate


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

    def mixture(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x Wᵀ + b + Σ_e s_e·g_e·(x A_eᵀ) B_eᵀ for tokens x [...,K] and weight [N,K]."""
        gate, experts = self.gate, self.experts
        gates = NO_GATES if gate is None else gate.operands(experts)
        y, token, sample = gated_lora_linear_with_gates(x, weight, bias, experts.operands(), gates, backend=self.backend)
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
        return self.mixture(x, self.weight, self.bias) if self.experts_on else F.linear(x, self.weight, self.bias)


class GatedLoRAConv2d(Gated, nn.Conv2d):
    """The same for a 1x1 convolution: x [B,K,H,W] -> [B,N,H,W], every pixel a token, any H and W."""

    @classmethod
    def from_conv(cls, base: nn.Conv2d, experts: LayerExperts, gate: Gate | None = None, *, backend: str = "auto") -> GatedLoRAConv2d:
        """A new layer that shares base's weight and bias (which it freezes)."""
        check_pointwise(base)
        check_fit("GatedLoRAConv2d", base.in_channels, base.out_channels, experts)
        layer = cls(base.in_channels, base.out_channels, 1, bias=base.bias is not None, device="meta")
        base.requires_grad_(False)
        layer.weight, layer.bias = base.weight, base.bias
        layer.attach_experts(experts, gate, backend)
        return layer.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.experts_on:
            return nn.Conv2d.forward(self, x)
        if x.dim() not in (3, 4):
            raise MoleShapeError("GatedLoRAConv2d", expected="x [B,K,H,W] or [K,H,W]", got=tuple(x.shape))
        images = x if x.dim() == 4 else x[None]
        y = self.mixture(images.flatten(2).mT, self.weight.flatten(1), self.bias)
        y = y.mT.unflatten(2, images.shape[2:])
        # the tokens' layout is channels-last; answer in the layout that came
        if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous()
        return y if x.dim() == 4 else y[0]


def is_pointwise(conv: nn.Conv2d) -> bool:
    """A convolution that is a linear layer at every pixel: 1x1, stride 1, no padding, one group."""
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1


def check_pointwise(conv: nn.Conv2d) -> None:
    if not is_pointwise(conv):
        raise MoleStateError("GatedLoRAConv2d", expected="a 1x1 convolution with stride 1, no padding and one group", got=str(conv))


def check_fit(where: str, K: int, N: int, experts: LayerExperts) -> None:
    """The experts' K and N are the layer's."""
    got = (experts.down.shape[2], experts.up.shape[1])
    if got != (K, N):
        raise MoleShapeError(where, expected=f"experts of K, N = {K}, {N}", got=f"{got[0]}, {got[1]}")
