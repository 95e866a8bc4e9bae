"""The weights and the input of one case, the same for every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, Case
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import MoLEGate
from mole_kernels.operands import Gates
from mole_kernels.reference import gated_lora_ref


@dataclass
class Layer:
    """Base, experts, gates (None where the case has none) and an input x [B,T,K]; nothing needs a
    gradient.
    """

    case: Case
    x: Tensor
    base: nn.Linear
    experts: LayerExperts
    gate: MoLEGate | None

    @classmethod
    def make(cls, case: Case, seed: int = 0, device: str = "cpu") -> Layer:
        draw = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[case.dtype]

        def new(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=draw, device=device) * scale).to(dtype)

        base = nn.Linear(case.K, case.N, bias=case.bias, device=device, dtype=dtype).requires_grad_(False)
        base.weight.copy_(new(case.N, case.K, scale=case.K**-0.5))
        if base.bias is not None:
            base.bias.copy_(new(case.N))
        down, up = new(1, case.R, case.K, scale=case.K**-0.5), new(1, case.N, case.R, scale=case.R**-0.5)
        names = tuple(f"e{i}" for i in range(case.E))
        scale = torch.linspace(0.25, 0.5, case.E, device=device)
        experts = LayerExperts(down, up, scale, names, (case.r,) * case.E)
        gate = cls.new_gate(case, draw, device).to(dtype) if case.gate == "mole" else None
        return cls(case, new(case.B, case.T, case.K), base, experts, gate)

    @staticmethod
    def new_gate(case: Case, draw: torch.Generator, device: str) -> MoLEGate:
        """Logits of size one, so that a wrong gate is far from a right one."""
        gate = MoLEGate(case.K, case.N, case.E, device=device).requires_grad_(False)
        for weight in (gate.phi, gate.head):
            weight.copy_(torch.randn(weight.shape, generator=draw, device=device) / weight.shape[1] ** 0.5)  # type: ignore[union-attr]
        return gate

    def gates(self) -> Gates:
        return Gates() if self.gate is None else self.gate.operands(self.experts)

    def truth(self) -> Tensor:
        """y in float64, from the reference."""
        e = self.experts.operands()
        wide = e._replace(down=e.down.double(), up=e.up.double(), scale=e.scale.double())
        bias = None if self.base.bias is None else self.base.bias.double()
        return gated_lora_ref(
            self.x.double(), self.base.weight.double(), bias, wide, self.gates().map(torch.Tensor.double)
        )[0]

    def plain_truth(self) -> Tensor:
        """The layer without experts in float64."""
        return nn.functional.linear(
            *(None if t is None else t.double() for t in (self.x, self.base.weight, self.base.bias))
        )  # type: ignore[arg-type]

    def ungated_truth(self) -> Tensor:
        """What PEFT computes, in float64: the same experts without gates."""
        y, x = self.plain_truth(), self.x.double()
        for i in range(self.case.E):
            down, up, scale = self.factors(i)
            y = y + scale * (x @ down.double().mT @ up.double().mT)
        return y

    def factors(self, i: int) -> tuple[Tensor, Tensor, float]:
        """A_e [r,K], B_e [N,r] and s_e of expert i, contiguous as if read from its own file."""
        span = slice(i * self.case.r, (i + 1) * self.case.r)
        return (
            self.experts.down[0, span].contiguous(),
            self.experts.up[0, :, span].contiguous(),
            float(self.experts.scale[i]),
        )
