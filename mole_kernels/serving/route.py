"""From a batch of prompts to the samples a model really sees: guidance doubles them, pictures per prompt
repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError


class Route:
    """The assignment of one component: what its layers read, made anew when the batch changes, written in
    place when the assignment does.

    current  [B] int64, the set of each sample of the forward that is running; None before the first one

    A compiled model sees only the number of prompts, never which sets they take: that is in tensors, so it is
    compiled once.
    """

    def __init__(self, component: str, module: nn.Module, pipeline: object | None) -> None:
        self.component, self.module, self.pipeline = component, module, pipeline
        self.sets = torch.zeros(0, dtype=torch.int64)
        self.parts: int | None = None
        self.current: Tensor | None = None
        # B, device, parts and number of prompts that `current` was made for
        self._made: tuple[int, torch.device, int, int] | None = None
        self._hook = module.register_forward_pre_hook(self._before, with_kwargs=True)

    def assign(self, sets: list[int], parts: int | None) -> None:
        """The set of each prompt; parts: how often the pipeline lays the whole batch behind itself (2 under
        classifier-free guidance).
        """
        new = torch.tensor(sets, dtype=torch.int64)
        self.parts = parts
        if new.shape != self.sets.shape:
            self.sets, self._made = new, None
            return
        self.sets.copy_(new)
        if self._made is not None and self.current is not None:
            self.current.copy_(self._rows(self._made[0], self._made[2]))

    def remove(self) -> None:
        self._hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 0), None)
        if first is None:
            raise MoleShapeError(
                f"serve, {self.component}",
                expected="a tensor among the inputs, to know the batch",
                got="none",
            )
        self.set_batch(first.shape[0], first.device)

    def set_batch(self, B: int, device: torch.device) -> None:
        """Make `current` for a batch of B samples on `device`, where it was made for another."""
        parts = self._parts(B)
        made = (B, device, parts, self.sets.shape[0])
        if made == self._made and self.current is not None:
            return
        rows = self._rows(B, parts)
        if self.current is not None and self.current.shape == rows.shape and self.current.device == device:
            self.current.copy_(rows)
        else:
            with torch.inference_mode(False):
                self.current = rows.to(device)
        self._made = made

    def _rows(self, B: int, parts: int) -> Tensor:
        """Pipelines repeat each prompt for its pictures, then lay the conditional batch behind the
        unconditional one: [B] int64.
        """
        P = self.sets.shape[0]
        return (
            self.sets.repeat_interleave(B // (P * parts)).repeat(parts)
            if P
            else torch.full((B,), -1, dtype=torch.int64)
        )

    def _parts(self, B: int) -> int:
        P, parts = self.sets.shape[0], self.parts
        if not P:
            return 1
        if parts is None:
            guided = not self.component.startswith("text_encoder") and getattr(
                self.pipeline, "do_classifier_free_guidance", False
            )
            # some pipelines guide by two calls instead of one of twice the size
            parts = 2 if guided and B % (2 * P) == 0 else 1
        if B % (P * parts):
            raise MoleShapeError(
                f"serve, {self.component}",
                expected=f"a batch that is a multiple of the {P} prompts assigned (times {parts})",
                got=B,
                hint="assign one identity, or None, to every prompt of the call",
            )
        return parts
