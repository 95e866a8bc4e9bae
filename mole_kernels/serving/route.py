"""From a batch of prompts to the samples a model really sees: guidance doubles them, pictures per prompt repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError


class Route:
    """The assignment of one component: what its layers read, made anew when the batch or the assignment changes.

    current  [B] int64, the set of each sample of the forward that is running; None outside: then B is unknown and every sample has none
    """

    def __init__(self, component: str, module: nn.Module, pipeline: object | None) -> None:
        self.component, self.module, self.pipeline = component, module, pipeline
        self.sets: list[int] = []
        self.parts: int | None = None
        self.current: Tensor | None = None
        self._made: tuple[object, ...] | None = None
        self._hook = module.register_forward_pre_hook(self._before, with_kwargs=True)

    def assign(self, sets: list[int], parts: int | None) -> None:
        """The set of each prompt; parts: how often the pipeline lays the whole batch behind itself (2 under classifier-free guidance)."""
        self.sets, self.parts = list(sets), parts

    def remove(self) -> None:
        self._hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 0), None)
        if first is None:
            raise MoleShapeError(f"serve, {self.component}", expected="a tensor among the inputs, to know the batch", got="none")
        self.set_batch(first.shape[0], first.device)

    def set_batch(self, B: int, device: torch.device) -> None:
        """Make `current` for a batch of B samples on `device`; written in place where only the sets changed, so that nothing recompiles."""
        parts = self._parts(B)
        key = (B, device, parts, tuple(self.sets))
        if key == self._made and self.current is not None:
            return
        rows = torch.tensor(self._rows(B, parts), dtype=torch.int64)
        if self.current is not None and self.current.shape == rows.shape and self.current.device == device:
            self.current.copy_(rows)
        else:
            with torch.inference_mode(False):
                self.current = rows.to(device)
        self._made = key

    def _rows(self, B: int, parts: int) -> list[int]:
        """Pipelines repeat each prompt for its pictures, then lay the conditional batch behind the unconditional one."""
        each = B // (len(self.sets) * parts) if self.sets else 0
        return [place for place in self.sets for _ in range(each)] * parts if self.sets else [-1] * B

    def _parts(self, B: int) -> int:
        if not self.sets:
            return 1
        parts = self.parts
        if parts is None:
            guided = not self.component.startswith("text_encoder") and getattr(self.pipeline, "do_classifier_free_guidance", False)
            # some pipelines guide by two calls instead of one of twice the size
            parts = 2 if guided and B % (2 * len(self.sets)) == 0 else 1
        if B % (len(self.sets) * parts):
            raise MoleShapeError(
                f"serve, {self.component}", expected=f"a batch that is a multiple of the {len(self.sets)} prompts assigned (times {parts})",
                got=B,
                hint="assign one identity, or None, to every prompt of the call",
            )  # fmt: skip
        return parts
