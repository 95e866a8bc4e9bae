"""Lion: an optimiser that steps by the sign of its momentum and keeps one state a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """p ← p − lr·(sign(β₁ m + (1−β₁) g) + λ p), then m ← β₂ m + (1−β₂) g.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2.
    Every weight moves by lr,
    so lr wants to be three to ten times smaller than AdamW's, and the weight decay λ as many times larger.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    _step(p, p.grad, state["momentum"], group["lr"], group["betas"], group["weight_decay"])
        return loss


def _step(
    p: Tensor, grad: Tensor, momentum: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    update = torch.lerp(grad, momentum, betas[0]).sign_()
    p.mul_(1.0 - lr * weight_decay).add_(update, alpha=-lr)
    momentum.lerp_(grad, 1.0 - betas[1])
