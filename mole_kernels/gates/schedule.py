"""Gates that depend on the denoising step alone: LoRA Switch, K-LoRA, any table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.gates.gate import Gate
from mole_kernels.operands import Gates


class Clock(nn.Module):
    """Which denoising step it is, shared by all gates of a model; a tensor, so that nothing recompiles as it
    runs.

    clock = Clock(30)
    handle = mk.patch(pipe, experts, gates=switch(clock, every=5))
    pipe(prompt, num_inference_steps=30, callback_on_step_end=clock.callback)
    """

    step: Tensor

    def __init__(self, steps: int, device=None) -> None:
        super().__init__()
        if steps < 1:
            raise MoleValueError("Clock", expected="at least one step", got=steps)
        self.steps = steps
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)

    def set(self, step: int) -> None:
        """It is this step now, counted from 0; past the last one it stays the last."""
        if step < 0:
            raise MoleValueError("Clock.set", expected="a step >= 0", got=step)
        self.step.fill_(min(step, self.steps - 1))

    def callback(
        self, pipeline: object, step: int, timestep: object, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """For a pipeline's `callback_on_step_end`: on to the next step, and back to the first after the
        last.
        """
        self.set((step + 1) % self.steps)
        return kwargs


class ScheduleGate(Gate):
    """gate_e = table[step, e], the same for every token and sample.  table [steps,E] float32"""

    table: Tensor

    def __init__(self, table: Tensor, clock: Clock) -> None:
        super().__init__()
        if table.dim() != 2 or table.shape[0] != clock.steps:
            raise MoleShapeError(
                "ScheduleGate", expected=f"table [steps,E] with {clock.steps} steps", got=tuple(table.shape)
            )
        self.register_buffer("table", table.detach().to(torch.float32).clone())
        self.clock = clock

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.table.index_select(0, self.clock.step)[None])


Maker = Callable[[str, nn.Module, LayerExperts], Gate]


def scheduled(clock: Clock, table: Mapping[str, Any]) -> Maker:
    """For `patch(gates=…)`: {expert name: its weight at each step}; an expert that the table leaves out
    raises MoleKeyError.
    """
    rows = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in table.items()}

    def make(path: str, module: nn.Module, experts: LayerExperts) -> Gate:
        absent = [name for name in experts.names if name not in rows]
        if absent:
            raise MoleKeyError(
                "scheduled",
                expected=f"weights over the steps for {', '.join(experts.names)}",
                got=f"none for {absent[0]!r}",
            )
        return ScheduleGate(
            torch.stack([rows[name] for name in experts.names], -1).to(experts.scale.device), clock
        )

    return make


def switch(clock: Clock, *, every: int = 5, order: list[str] | None = None) -> Maker:
    """LoRA Switch (Zhong et al., 2024): one expert at a time, the next one after every `every` steps, in
    `order` (the experts' own).

    gate_e(i) = 1 where e = (i // every) mod E, else 0.
    """
    if every < 1:
        raise MoleValueError("switch", expected="every >= 1 step", got=every)

    def make(path: str, module: nn.Module, experts: LayerExperts) -> Gate:
        names = list(order or experts.names)
        if set(experts.names) - set(names):
            raise MoleKeyError(
                "switch", expected=f"an order of {', '.join(experts.names)}", got=", ".join(names)
            )
        turn = torch.arange(clock.steps) // every % len(names)
        table = torch.stack([(turn == names.index(name)).float() for name in experts.names], -1)
        return ScheduleGate(table.to(experts.scale.device), clock)

    return make


def largest_sum(factors: LowRank, count: int) -> float:
    """The sum of the `count` largest |ΔW| entries, ΔW = scale · up · down."""
    delta = (factors.up.detach().float() @ factors.down.detach().float()).abs().flatten() * abs(factors.scale)
    return delta.topk(min(count, delta.numel())).values.sum(dtype=torch.float64).item()


def k_lora(
    clock: Clock, bank: ExpertBank, content: str, style: str, *, alpha: float = 1.5, beta: float = 0.5
) -> Maker:
    """K-LoRA (Ouyang et al., 2025): in each layer and step, the content expert or the style expert, whichever
    weighs more.

    S_e = sum of the r_c·r_s largest |ΔW_e| of the layer;  γ = Σ_layers Σ|ΔW_content| / Σ_layers Σ|ΔW_style|
    style at step i of n where S_style · γ · (alpha·i/n + beta) > S_content, else content; so style comes
    late.
    The sums are made once, when the gates are. A layer that only one of them has takes that one always.
    Source: the paper's element selection and scaling factor with its α and β; its variant s* is not here.
    """
    for name in (content, style):
        if name not in bank.names:
            raise MoleKeyError(
                "k_lora", expected=f"one of the experts {', '.join(bank.names)}", got=repr(name)
            )
    whole = {
        name: sum(largest_sum(f, f.up.shape[0] * f.down.shape[1]) for f in bank.experts[name].layers.values())
        for name in (content, style)
    }
    if not whole[style]:
        raise MoleValueError("k_lora", f"the style expert {style!r} is zero everywhere")
    gamma = whole[content] / whole[style]

    def make(path: str, module: nn.Module, experts: LayerExperts) -> Gate:
        if set(experts.names) - {content, style}:
            raise MoleKeyError(
                "k_lora", expected=f"the experts {content} and {style}", got=", ".join(experts.names)
            )
        if len(experts.names) == 1:
            return ScheduleGate(torch.ones(clock.steps, 1, device=experts.scale.device), clock)
        count = experts.ranks[0] * experts.ranks[1]
        weighs = {name: largest_sum(experts.factor(name), count) for name in experts.names}
        growth = alpha * torch.arange(clock.steps, dtype=torch.float64) / clock.steps + beta
        late = weighs[style] * gamma * growth > weighs[content]
        table = torch.stack([(late if name == style else ~late).float() for name in experts.names], -1)
        return ScheduleGate(table.to(experts.scale.device), clock)

    return make
