"""Gates recorded as a pipeline samples: how much of each expert every layer used at every step, and where in
the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.patching.handle import GateMap, Handle


def whole_gate(said: GateMap) -> Tensor:
    """given · token · sample, [B|1,T|1,E] float32: what an expert is multiplied by beside its scale."""
    gate = torch.ones(1, 1, len(said.names))
    for part in (said.given, said.token, None if said.sample is None else said.sample[:, None]):
        if part is not None:
            gate = gate * part.detach().float().cpu()
    return gate


def grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Height and width of `tokens` that are places of a picture whose latents are height x width, halved some
    times; None for words.
    """
    h, w = height, width
    while h * w > tokens:
        h, w = -(-h // 2), -(-w // 2)
        if h == w == 1:
            break
    return (h, w) if h * w == tokens and tokens > 1 else None


def kind_of(path: str) -> str:
    """The kind of a layer: "…transformer_blocks.0.attn1.to_q" -> "attn1.to_q"; "…proj_in" -> "proj_in"."""
    after = path.rpartition("blocks.")[2].partition(".")[2] or path
    return after if "attentions" not in after else after.rpartition(".")[2]


@dataclass
class Recorder:
    """Reads the gates of a patched pipeline after each step.

        seen = Recorder(handle, height=64, width=64)
        pipe(prompt, callback_on_step_end=seen.callback)
        seen.usage()     how much of each expert, by step and kind of layer
        seen.maps()      where, by step

    height, width  of the latents; layers whose tokens are no such grid (words) have no map
    by_layer       keep a map for every layer, not one for each kind: layers x steps x experts x height x
                   width numbers
    sample         which sample of the batch; −1, the last, is a prompt's conditional half under
                   classifier-free guidance

    Only eager forwards leave gates to read. Kept are one number per layer, step and expert, and the maps.
    """

    handle: Handle
    height: int
    width: int
    sample: int = -1
    by_layer: bool = False
    steps: list[int] = field(default_factory=list)
    _means: list[dict[str, Tensor]] = field(default_factory=list)
    _maps: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise MoleValueError(
                "Recorder",
                expected="the latents' height and width, at least 1",
                got=f"{self.height} x {self.width}",
            )

    @property
    def names(self) -> tuple[str, ...]:
        return self.handle.names

    def callback(self, pipeline: object, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For a pipeline's `callback_on_step_end`."""
        self.take(int(timestep))
        return kwargs

    def take(self, timestep: int) -> None:
        """Record what the gates said in the forward that just ran."""
        means: dict[str, Tensor] = {}
        sums: dict[str, tuple[Tensor, int]] = {}
        for path, said in self.handle.gate_maps().items():
            gate = whole_gate(said)
            one = self._spread(gate[self.sample if gate.shape[0] > 1 else 0], said.names)
            means[path] = one.mean(0)
            place = grid(one.shape[0], self.height, self.width)
            if place is not None:
                found = F.interpolate(
                    one.mT.unflatten(1, place)[None], (self.height, self.width), mode="nearest"
                )[0]
                where = path if self.by_layer else kind_of(path)
                before, count = sums.get(where, (torch.zeros_like(found), 0))
                sums[where] = before + found, count + 1
        self.steps.append(timestep)
        self._means.append(means)
        self._maps.append({kind: total / count for kind, (total, count) in sums.items()})

    def _spread(self, gate: Tensor, names: Sequence[str]) -> Tensor:
        """[T,E of the layer] -> [T,E of the handle], 0 for experts that the layer lacks."""
        whole = torch.zeros(gate.shape[0], len(self.names))
        whole[:, [self.names.index(name) for name in names]] = gate
        return whole

    def usage(self, by: str = "kind") -> tuple[list[str], Tensor]:
        """Mean gate by step: the rows' names and [rows,steps,E].  by: "kind" of layer, "layer", or "all"
        together.
        """
        self._check_any()
        group: dict[str, Callable[[str], str]] = {
            "kind": kind_of,
            "layer": str,
            "all": lambda path: "all layers",
        }
        if by not in group:
            raise MoleValueError("usage", expected=f"by one of {', '.join(group)}", got=repr(by))
        rows: dict[str, list[str]] = {}
        for path in self._means[0]:
            rows.setdefault(group[by](path), []).append(path)
        values = [
            torch.stack([torch.stack([at[path] for path in paths]).mean(0) for at in self._means])
            for paths in rows.values()
        ]
        return list(rows), torch.stack(values)

    def maps(self, kind: str | None = None) -> Tensor:
        """Where, by step: [steps,E,height,width], of one kind of layer (one layer, by_layer), or the mean
        over all with maps.
        """
        self._check_any()
        kinds = list(self._maps[0])
        if not kinds:
            raise MoleStateError(
                "maps", f"no patched layer has {self.height} x {self.width} tokens, nor a halving of that"
            )
        if kind is not None and kind not in kinds:
            raise MoleValueError("maps", expected=f"one of {', '.join(kinds)}", got=repr(kind))
        return torch.stack(
            [at[kind] if kind else torch.stack(list(at.values())).mean(0) for at in self._maps]
        )

    def kinds(self) -> list[str]:
        """The kinds of layers (the layers, by_layer) that have maps."""
        self._check_any()
        return list(self._maps[0])

    def _check_any(self) -> None:
        if not self._means:
            raise MoleStateError(
                "Recorder", "nothing is recorded", hint="pipe(…, callback_on_step_end=recorder.callback)"
            )
