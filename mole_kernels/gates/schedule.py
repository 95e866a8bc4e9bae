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
    """The current denoising step, shared by all gates of a model.

    The step is a tensor, so that nothing recompiles as it changes.

    Args:
        steps: Number of denoising steps of one picture.
        device: Device of the step.

    Raises:
        MoleValueError: Fewer than one step.

    Example:
        clock = mk.gates.Clock(30)
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
        """Set the current step.

        Args:
            step: Counted from 0; a number past the last step means the last.

        Raises:
            MoleValueError: A negative step.
        """
        if step < 0:
            raise MoleValueError("Clock.set", expected="a step >= 0", got=step)
        self.step.fill_(min(step, self.steps - 1))

    def callback(
        self, pipeline: object, step: int, timestep: object, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Advance one step, and from the last to the first: for a pipeline's `callback_on_step_end`.

        Args:
            pipeline: Not used.
            step: The step that has ended, counted from 0.
            timestep: Not used.
            kwargs: The pipeline's tensors, returned unchanged.
        """
        self.set((step + 1) % self.steps)
        return kwargs


class ScheduleGate(Gate):
    """gate_e = table[step, e], the same for every token and sample.

    Args:
        table: [steps,E]; copied as float32.
        clock: Says which step it is.

    Raises:
        MoleShapeError: The table is not [steps,E] with the clock's number of steps.
    """

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
    """Gates from a table of weights over the steps, for `patch(gates=…)`.

    Args:
        clock: Says which step it is.
        table: {expert: its weight at each step}, each of the clock's length.

    Returns:
        A maker of gates, for `mk.patch(gates=…)`.

    Raises:
        MoleKeyError: At patching, an expert that the table leaves out.
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
    """One expert at a time: gate_e(i) = 1 where e = (i // every) mod E, else 0.

    Args:
        clock: Says which step it is.
        every: Number of steps before the next expert's turn.
        order: The experts' names in order of their turns. None: the patch's own order.

    Returns:
        A maker of gates, for `mk.patch(gates=…)`.

    Raises:
        MoleValueError: `every` below 1.
        MoleKeyError: At patching, an expert that `order` leaves out.

    Source: LoRA Switch (Zhong et al., 2024).
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
    """The sum of the `count` largest entries of |ΔW|, ΔW = scale · up · down.

    Args:
        factors: down [R,K] and up [N,R] of one layer.
        count: Number of entries; all N·K if there are fewer.
    """
    delta = (factors.up.detach().float() @ factors.down.detach().float()).abs().flatten() * abs(factors.scale)
    return delta.topk(min(count, delta.numel())).values.sum(dtype=torch.float64).item()


def k_lora(
    clock: Clock, bank: ExpertBank, content: str, style: str, *, alpha: float = 1.5, beta: float = 0.5
) -> Maker:
    """In each layer and step either the content expert or the style expert, whichever weighs more.

    With S_e the sum of the r_c·r_s largest |ΔW_e| of the layer and
    γ = Σ_layers Σ|ΔW_content| / Σ_layers Σ|ΔW_style|, step i of n takes the style expert where
    S_style · γ · (alpha·i/n + beta) > S_content, else the content expert; so style comes late. The sums are
    computed once, at patching. A layer that only one of the two has always takes that one.

    Args:
        clock: Says which step it is.
        bank: Holds both experts.
        content: Name of the content expert.
        style: Name of the style expert.
        alpha: Growth of the style's weight over the steps.
        beta: The style's weight at the first step.

    Returns:
        A maker of gates, for `mk.patch(gates=…)`.

    Raises:
        MoleKeyError: The bank lacks one of the two; at patching, a third expert.
        MoleValueError: The style expert is zero everywhere.

    Source: K-LoRA (Ouyang et al., 2025), its element selection and scaling factor; the variant s* is not
    implemented.
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
