"""Experts by region in a transformer: gates of its layers by place, and by the text that a token is of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleStateError
from mole_kernels.gates.softmax import GivenGate
from mole_kernels.layers.linear import Gated
from mole_kernels.methods.mix_of_show.regions import Region
from mole_kernels.patching.handle import Handle


class RegionLayout(Protocol):
    """What the weights ask of the open `regional_transformer`.

    Attributes:
        table: [prompts,1+S,places]: what each place takes of each text.
        lengths: Tokens of each text.
        order: "text first", "places first" or "cross".
        part: "text" or "places" where the layers that run see one alone, else "".
        by_prompt: Regions of each prompt.
    """

    table: Tensor
    lengths: list[int]
    order: str
    part: str
    by_prompt: list[list[Region]]

    def prompt_of(self, B: int) -> list[int]: ...

    def filling(self) -> tuple[int, int]: ...


class TransformerWeights:
    """Gates of a patched transformer by region: places by their shares, text tokens by the text they are
    of.
    """

    def __init__(self, state: RegionLayout, handle: Handle, elsewhere: Mapping[str, float] | None) -> None:
        self.state, self.names = state, handle.names
        self.layers = {
            path: module
            for path, module in handle.layers.items()
            if isinstance(module, Gated) and isinstance(module.gate, GivenGate)
        }
        if not self.layers:
            raise MoleStateError(
                "regional_transformer",
                "the patch has no region gates",
                hint="mk.patch(pipe, experts, gates=region_gates)",
            )
        rows = [
            torch.stack([self._row(weights) for weights in (elsewhere, *(r.experts for r in own))])
            for own in state.by_prompt
        ]
        # [prompts,1+S,E]
        self.rows = torch.stack(rows)

    def _row(self, weights: Mapping[str, float] | None) -> Tensor:
        for name in weights or {}:
            if name not in self.names:
                raise MoleKeyError(
                    "regional_transformer", expected=f"experts among {', '.join(self.names)}", got=repr(name)
                )
        return torch.tensor(
            [1.0 if weights is None else float(weights.get(name, 0.0)) for name in self.names]
        )

    def hooks(self) -> list[Any]:
        return [m.register_forward_pre_hook(partial(self._fill, m)) for m in self.layers.values()]

    def _fill(self, module: Any, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, state = args[0], self.state
        gate: Any = module.gate
        columns = [self.names.index(name) for name in module.experts.names]
        rows = self._rows_of(x.shape[1]) if x.dim() == 3 else None
        if rows is None:
            gate.set(torch.ones(1, 1, len(columns), device=x.device))
            return
        gate.set(rows[state.prompt_of(x.shape[0])][..., columns].to(x.device))

    def _rows_of(self, T: int) -> Tensor | None:
        """[prompts,T,E] of a layer with T tokens; None where they are neither places nor texts."""
        state = self.state
        more_places, more_text = state.filling()
        owners = torch.cat([torch.full((n,), s) for s, n in enumerate(state.lengths)])
        places = [torch.einsum("psn,pse->pne", state.table, self.rows), self._whole(more_places)]
        text = [self.rows[:, owners], self._whole(more_text)]
        joint = [*text, *places] if state.order == "text first" else [*places, *text]
        by_part = {"text": [text], "places": [places]}
        for parts in by_part.get(state.part, [joint, places, text]):
            if sum(part.shape[1] for part in parts) == T:
                return torch.cat(parts, 1)
        return None

    def _whole(self, count: int) -> Tensor:
        return self.rows[:, :1].expand(-1, count, -1)

    def clear(self) -> None:
        for module in self.layers.values():
            gate: Any = module.gate
            gate.set(torch.ones(1, 1, gate.num_experts, device=gate.given.device))
