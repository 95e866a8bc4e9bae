"""The same layer by every method, on the same weights; each is a module x -> y.

plain      nn.Linear: the floor
ours       GatedLoRALinear with MoLEGate: what a user calls, its Python included
operator   the compiled operator alone
stacked    the strongest plain-torch form: A and B stacked, one shrink, gates on h, one addmm into the base's
           output
eager      the MoLE layer as its paper has it, expert by expert on full outputs
peft       PEFT's lora.Linear with the same adapters active (it has no gates: less work than the others do)
merged     W + Σ s_e B_e A_e made beforehand: the plain layer's cost, possible only without gates

LoRAFusion's scheme is in `lorafusion.py`, our ways by name in `ours.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layer import Layer
from mole_kernels.backends import cpu
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.operands import Call


class Stacked(nn.Module):
    """base, h = x Aᵀ, γ from x and h, base += (γ h) Bᵀ; the collapsed global gate as ours has it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.base, e, g = layer.base, layer.experts.operands(), layer.gates()
        self.ranks, self.scale = e.ranks, e.scale
        # contiguous once and outside the clock; beside each other so that neither product copies
        self.down, self.up_t = e.down[0], e.up[0].mT
        self.token_weight, self.token_bias = g.token_weight, g.token_bias
        self.sample_weight, self.sample_bias = (
            None if g.sample_weight is None else g.sample_weight[0],
            g.sample_bias,
        )

    def gated(self, x: Tensor) -> Tensor:
        """γ ⊙ h, [B·T,R]"""
        B, T, _ = x.shape
        E, r = len(self.ranks), self.ranks[0]
        h = F.linear(x, self.down).view(B, T, E, r)
        gamma = self.scale
        if self.token_weight is not None and self.sample_weight is not None:
            local = torch.sigmoid(F.linear(x, self.token_weight, self.token_bias).float())
            pooled = (h.mean(1, dtype=torch.float32) * self.sample_weight.view(E, r)).sum(-1)
            gamma = local * (torch.sigmoid(pooled + self.sample_bias.float()) * self.scale)[:, None]  # type: ignore[union-attr]
        return (h * gamma.to(h.dtype)[..., None]).view(B * T, E * r)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y.view(-1, y.shape[-1]).addmm_(self.gated(x), self.up_t).view(y.shape)


class Eager(nn.Module):
    """The paper's layer: o_e = s_e B_e(A_e x), l = sigmoid(Phi x), g_e = sigmoid(w_e · mean_t o_e + c_e), y =
    base + Σ o_e l_e g_e.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.base, self.gate = layer.base, layer.gate
        self.factors = [layer.factors(i) for i in range(layer.case.E)]

    def forward(self, x: Tensor) -> Tensor:
        local = None if self.gate is None else torch.sigmoid(F.linear(x, self.gate.phi, self.gate.phi_bias))  # type: ignore[arg-type]
        mixed = None
        for e, (down, up, scale) in enumerate(self.factors):
            o = F.linear(F.linear(x, down), up) * scale
            if self.gate is not None and local is not None:
                pooled = F.adaptive_avg_pool1d(o.transpose(1, 2), 1).transpose(1, 2)
                g = torch.sigmoid(F.linear(pooled, self.gate.head[e : e + 1], self.gate.head_bias[e : e + 1]))  # type: ignore[index]
                o = o * local[..., e : e + 1] * g
            mixed = o if mixed is None else mixed + o
        return self.base(x) + mixed


class Merged(nn.Linear):
    """y = x (W + Σ s_e B_e A_e)ᵀ + b, the sum made in float32 before the clock starts; for a case without
    gates.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.case.K, layer.case.N, bias=layer.case.bias, device="meta")
        weight = layer.base.weight.float()
        for i in range(layer.case.E):
            down, up, scale = layer.factors(i)
            weight = weight + scale * (up.float() @ down.float())
        self.weight, self.bias = nn.Parameter(weight.to(layer.x.dtype), requires_grad=False), layer.base.bias


class Operator(nn.Module):
    """torch.ops.mole_cpu.forward, without the layer around it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.call = Call(layer.x, layer.base.weight, layer.base.bias, layer.experts.operands(), layer.gates())

    def forward(self, x: Tensor) -> Tensor:
        return cpu.forward(self.call._replace(x=x)).y


def peft_layer(layer: Layer) -> nn.Module | None:
    """PEFT's own layer with one adapter for each expert, all active; None where PEFT is not installed."""
    try:
        from peft.tuners.lora.config import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError:
        return None
    names, r = list(layer.experts.names), layer.case.r
    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=False)
    base = nn.Linear(layer.case.K, layer.case.N, bias=layer.case.bias, device="meta")
    base.weight, base.bias = layer.base.weight, layer.base.bias
    module = Linear(base, names[0], config=config, r=r, lora_alpha=r)
    for name in names[1:]:
        module.update_layer(name, r=r, lora_alpha=r, config=config)
    for i, name in enumerate(names):
        down, up, _ = layer.factors(i)
        module.lora_A[name].weight.data.copy_(down)
        module.lora_B[name].weight.data.copy_(up)
        module.scaling[name] = float(layer.experts.scale[i])
    module.set_adapter(names)
    return module.to(layer.x.device, layer.x.dtype).requires_grad_(False).eval()


def methods(layer: Layer) -> dict[str, nn.Module]:
    """name -> module, for the CPU's suite."""
    every = {
        "plain": layer.base,
        "ours": GatedLoRALinear.from_linear(layer.base, layer.experts, layer.gate, backend="cpu"),
        "operator": Operator(layer),
        "stacked": Stacked(layer),
        "eager": Eager(layer),
        "peft": peft_layer(layer),
    }
    return {name: module.eval() for name, module in every.items() if module is not None}
