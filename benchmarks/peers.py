"""The same layer by every method, on the same weights; each is a module x -> y.

plain      nn.Linear: the floor
ours       GatedLoRALinear with MoLEGate: what a user calls, its Python included
operator   the compiled operator alone
stacked    the strongest plain-torch form: A and B stacked, one shrink, gates on h, one addmm into the base's output
eager      the MoLE layer as its paper has it, expert by expert on full outputs
peft       PEFT's lora.Linear with the same two adapters active (it has no gates: less work than the others do)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import DTYPES, Case
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.backends import cpu
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import MoLEGate
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.reference import gated_lora_ref


@dataclass
class Layer:
    """The weights of a case: base, experts and gates, and an input."""

    case: Case
    x: Tensor
    base: nn.Linear
    experts: LayerExperts
    gate: MoLEGate

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> Layer:
        torch.manual_seed(seed)
        dtype = DTYPES[case.dtype]
        base = nn.Linear(case.K, case.N, bias=case.bias).to(dtype).requires_grad_(False)
        down, up = torch.randn(1, case.R, case.K) / case.K**0.5, torch.randn(1, case.N, case.R) / case.R**0.5
        names = tuple(f"e{i}" for i in range(case.E))
        experts = LayerExperts(down.to(dtype), up.to(dtype), torch.linspace(0.25, 0.5, case.E), names, (case.r,) * case.E)
        gate = MoLEGate(case.K, case.N, case.E).to(dtype).requires_grad_(False)
        return cls(case, torch.randn(2, case.M // 2, case.K).to(dtype), base, experts, gate)

    def truth(self) -> Tensor:
        """y in float64, from the reference."""
        gates = self.gate.operands(self.experts).map(torch.Tensor.double)
        e = self.experts.operands()
        wide = e._replace(down=e.down.double(), up=e.up.double(), scale=e.scale.double())
        bias = None if self.base.bias is None else self.base.bias.double()
        return gated_lora_ref(self.x.double(), self.base.weight.double(), bias, wide, gates)[0]


def factors(layer: Layer, i: int) -> tuple[Tensor, Tensor, float]:
    """A_e [r,K], B_e [N,r] and s_e of expert i, contiguous as if read from its own file."""
    span = slice(i * layer.case.r, (i + 1) * layer.case.r)
    return layer.experts.down[0, span].contiguous(), layer.experts.up[0, :, span].contiguous(), float(layer.experts.scale[i])


class Stacked(nn.Module):
    """base, h = x Aᵀ, γ from x and h, base += (γ h) Bᵀ; the collapsed global gate as ours has it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.base, self.e = layer.base, layer.experts.operands()
        self.g = layer.gate.operands(layer.experts)
        # contiguous once and outside the clock; beside each other so that neither product copies
        self.down, self.up_t = self.e.down[0], self.e.up[0].mT

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        E, r = len(self.e.ranks), self.e.ranks[0]
        y = self.base(x)
        h = F.linear(x, self.down)
        local = torch.sigmoid(F.linear(x, self.g.phi, self.g.phi_bias).float())
        pooled = torch.sigmoid((h.mean(1, dtype=torch.float32) * self.g.pool[0]).view(B, E, r).sum(-1) + self.g.pool_bias.float())
        gamma = (local * (pooled * self.e.scale)[:, None]).to(h.dtype)
        h = (h.view(B, T, E, r) * gamma[..., None]).view(B * T, E * r)
        return y.view(B * T, -1).addmm_(h, self.up_t).view(B, T, -1)


class Eager(nn.Module):
    """The paper's layer: o_e = s_e B_e(A_e x), l = sigmoid(Phi x), g_e = sigmoid(w_e · mean_t o_e + c_e), y = base + Σ o_e l_e g_e."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.base, self.gate = layer.base, layer.gate
        self.factors = [factors(layer, i) for i in range(layer.case.E)]

    def forward(self, x: Tensor) -> Tensor:
        local = torch.sigmoid(F.linear(x, self.gate.phi, self.gate.phi_bias))
        mixed = None
        for e, (down, up, scale) in enumerate(self.factors):
            o = F.linear(F.linear(x, down), up) * scale
            pooled = F.adaptive_avg_pool1d(o.transpose(1, 2), 1).transpose(1, 2)
            g = torch.sigmoid(F.linear(pooled, self.gate.head[e : e + 1], self.gate.head_bias[e : e + 1]))
            o = o * local[..., e : e + 1] * g
            mixed = o if mixed is None else mixed + o
        return self.base(x) + mixed


class Operator(nn.Module):
    """torch.ops.mole_cpu.forward, without the layer around it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        e = layer.experts.operands()
        self.args = (layer.base.weight, layer.base.bias, e.down, e.up, e.scale, e.ranks, *layer.gate.operands(layer.experts)[:5], False)

    def forward(self, x: Tensor) -> Tensor:
        return cpu.forward(x, *self.args)[0]


def peft_layer(layer: Layer) -> nn.Module | None:
    """PEFT's own layer with one adapter for each expert, all active; None where PEFT is not installed."""
    try:
        from peft.tuners.lora.config import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError:
        return None
    names, r = list(layer.experts.names), layer.case.r
    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=False)
    base = nn.Linear(layer.case.K, layer.case.N, bias=layer.case.bias, dtype=layer.x.dtype)
    base.load_state_dict(layer.base.state_dict())
    module = Linear(base, names[0], config=config, r=r, lora_alpha=r)
    for name in names[1:]:
        module.update_layer(name, r=r, lora_alpha=r, config=config)
    for i, name in enumerate(names):
        down, up, _ = factors(layer, i)
        module.lora_A[name].weight.data.copy_(down)
        module.lora_B[name].weight.data.copy_(up)
        module.scaling[name] = float(layer.experts.scale[i])
    module.set_adapter(names)
    return module.to(layer.x.dtype).requires_grad_(False).eval()


def methods(layer: Layer) -> dict[str, nn.Module]:
    """name -> module, for the forward."""
    every = {
        "plain": layer.base,
        "ours": GatedLoRALinear.from_linear(layer.base, layer.experts, layer.gate, backend="cpu"),
        "operator": Operator(layer),
        "stacked": Stacked(layer),
        "eager": Eager(layer),
        "peft": peft_layer(layer),
    }
    return {name: module.eval() for name, module in every.items() if module is not None}
