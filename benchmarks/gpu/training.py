"""A training step of one layer by every method: forward, then gradients of the input, the experts and the
gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.gpu.methods import AGAIN, PLAIN, layer_of, peft_of
from benchmarks.layer import Layer
from benchmarks.peers import Eager, Stacked


@dataclass
class Step:
    """run() -> gradients, the input's first; truth() -> float64 of those that are checked (the first
    ones).
    """

    run: Callable[[], tuple[Tensor, ...]]
    truth: Callable[[], list[Tensor]]


def step_of(name: str, case: Case, device: str) -> Step:
    """The method on a layer of its own with the same numbers: what it trains are its own leaves."""
    with torch.no_grad():
        layer = Layer.make(case, device=device)
        dy = torch.randn(
            layer.x.shape[:2] + (case.N,), generator=torch.Generator(device).manual_seed(7), device=device
        ).to(layer.x.dtype)
    x = layer.x.requires_grad_(True)
    module, leaves = trained(name, layer)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), [x, *leaves], dy, allow_unused=True)

    # the pooled vector is a function of up here and a given operand for stacked, so up's gradients differ: dx
    # and dA are checked
    return Step(run, lambda: truth(layer, dy, name))


def trained(name: str, layer: Layer) -> tuple[nn.Module, list[Tensor]]:
    """The module and its leaves."""
    experts, gate = layer.experts, layer.gate
    if name in (PLAIN, AGAIN):
        return layer.base, []
    if name == "peft":
        module = peft_of(layer)
        adapters = [p for n, p in module.named_parameters() if "lora_" in n]
        return module, [p.requires_grad_(True) for p in adapters]
    gates = [] if gate is None else list(gate.requires_grad_(True).parameters())
    if name == "eager":
        eager = Eager(layer)
        eager.factors = [
            (down.detach().requires_grad_(True), up.detach().requires_grad_(True), s)
            for down, up, s in eager.factors
        ]
        return eager, [t for down, up, _ in eager.factors for t in (down, up)] + gates
    if name == "stacked":
        with torch.no_grad():
            stacked = Stacked(layer)
        stacked.down, stacked.up_t = (t.detach().requires_grad_(True) for t in (stacked.down, stacked.up_t))
        leaves = [stacked.down, stacked.up_t]
        if stacked.sample_weight is not None:
            stacked.sample_weight = stacked.sample_weight.detach().requires_grad_(True)
            leaves += [stacked.sample_weight, stacked.token_weight, stacked.token_bias, stacked.sample_bias]  # type: ignore[list-item]
        return stacked, leaves
    experts.requires_grad_(True)
    return layer_of(layer), [experts.down, experts.up, *gates]


def truth(layer: Layer, dy: Tensor, name: str) -> list[Tensor]:
    """dx in float64; for ours dA too."""
    if name in (PLAIN, AGAIN):
        return [dy.double() @ layer.base.weight.double()]
    experts, x = layer.experts.operands(), layer.x.detach().double().requires_grad_(True)
    down = experts.down.detach().double().requires_grad_(True)
    up, w = experts.up.detach().double(), layer.base.weight.double()
    with torch.enable_grad():
        if name == "peft":
            gamma = experts.scale.double().repeat_interleave(torch.tensor(experts.ranks, device=x.device))
            y = x @ w.mT + ((x @ down[0].mT) * gamma) @ up[0].mT
        else:
            from mole_kernels.reference import gated_lora_ref

            with torch.no_grad():
                gates = layer.gates().map(lambda t: t.detach().double())
            y = gated_lora_ref(
                x, w, None, experts._replace(down=down, up=up, scale=experts.scale.double()), gates
            )[0]
        dx, ddown = torch.autograd.grad(y, [x, down], dy.double())
    return [dx, ddown] if name == "ours" else [dx]
