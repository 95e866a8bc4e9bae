"""Record the gates while a pipeline samples: how much of each expert each layer uses, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.patching.handle import Handle
from mole_kernels.patching.patched import GateMap


def whole_gate(gates: GateMap) -> Tensor:
    """gate = given · token · sample: what an expert is multiplied by beside its scale.

    Args:
        gates: The gates of one layer's last forward.

    Returns:
        [B|1,T|1,E] float32 on the CPU.
    """
    gate = torch.ones(1, 1, len(gates.names))
    for part in (gates.given, gates.token, None if gates.sample is None else gates.sample[:, None]):
        if part is not None:
            gate = gate * part.detach().float().cpu()
    return gate


def latent_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid that a layer's tokens form: the latents' size, halved until it fits.

    Args:
        tokens: Number of tokens.
        height: Height of the latents.
        width: Width of the latents.

    Returns:
        (height, width) of the grid, or None where the tokens are no such grid (words).
    """
    h, w = height, width
    while h * w > tokens:
        h, w = -(-h // 2), -(-w // 2)
        if h == w == 1:
            break
    return (h, w) if h * w == tokens and tokens > 1 else None


def layer_kind(path: str) -> str:
    """Name a layer without its block: "…transformer_blocks.0.attn1.to_q" -> "attn1.to_q"."""
    after = path.rpartition("blocks.")[2].partition(".")[2] or path
    return after if "attentions" not in after else after.rpartition(".")[2]


@dataclass
class Recorder:
    """Reads the gates of a patched pipeline after each step.

    Only eager forwards leave gates to read. The recorder keeps one number per layer, step and expert, and the
    maps.

    Args:
        handle: The patched pipeline.
        height: Height of the latents.
        width: Width of the latents. Layers whose tokens are no such grid (words) have no map.
        sample: Which sample of the batch to read. −1, the last, is a prompt's conditional half under
            classifier-free guidance.
        by_layer: Keep a map for every layer instead of one for each kind: layers × steps × experts × height ×
            width numbers.

    Raises:
        MoleValueError: A height or width below 1.

    Example:
        >>> recorder = Recorder(handle, height=64, width=64)
        >>> images = pipe(prompt, callback_on_step_end=recorder.callback).images
        >>> rows, usage = recorder.usage()  # [kinds of layer, steps, experts]
        >>> maps = recorder.maps()  # [steps, experts, height, width]
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
        """The experts, in the order of the maps."""
        return self.handle.names

    def callback(self, pipeline: object, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Record a step; pass it to a pipeline as `callback_on_step_end`."""
        self.take(int(timestep))
        return kwargs

    def take(self, timestep: int) -> None:
        """Record the gates of the forward that has just run, under its timestep."""
        means: dict[str, Tensor] = {}
        sums: dict[str, tuple[Tensor, int]] = {}
        for path, gates in self.handle.gate_maps().items():
            gate = whole_gate(gates)
            whole = self._spread(gate[self.sample if gate.shape[0] > 1 else 0], gates.names)
            means[path] = whole.mean(0)
            place = latent_grid(whole.shape[0], self.height, self.width)
            if place is not None:
                spread = F.interpolate(
                    whole.mT.unflatten(1, place)[None], (self.height, self.width), mode="nearest"
                )[0]
                where = path if self.by_layer else layer_kind(path)
                before, count = sums.get(where, (torch.zeros_like(spread), 0))
                sums[where] = before + spread, count + 1
        self.steps.append(timestep)
        self._means.append(means)
        self._maps.append({kind: total / count for kind, (total, count) in sums.items()})

    def _spread(self, gate: Tensor, names: Sequence[str]) -> Tensor:
        """[T,E of the layer] -> [T,E of the handle], 0 for experts that the layer lacks."""
        whole = torch.zeros(gate.shape[0], len(self.names))
        whole[:, [self.names.index(name) for name in names]] = gate
        return whole

    def usage(self, by: Literal["kind", "layer", "all"] = "kind") -> tuple[list[str], Tensor]:
        """Mean gate of each group of layers at each step.

        Args:
            by: "kind" of layer, each "layer", or "all" of them together.

        Returns:
            The groups' names, and the means [groups,steps,E].

        Raises:
            MoleStateError: Nothing is recorded.
            MoleValueError: An unknown `by`.
        """
        self._check_recorded()
        group: dict[str, Callable[[str], str]] = {
            "kind": layer_kind,
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
        """Where in the picture each expert is used, at each step.

        Args:
            kind: One kind of layer (or one layer, with `by_layer`). Default: the mean over all with maps.

        Returns:
            [steps,E,height,width].

        Raises:
            MoleStateError: Nothing is recorded, or no layer has a map.
            MoleValueError: An unknown `kind`.
        """
        self._check_recorded()
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
        """The kinds of layers (or the layers, with `by_layer`) that have maps."""
        self._check_recorded()
        return list(self._maps[0])

    def _check_recorded(self) -> None:
        if not self._means:
            raise MoleStateError(
                "Recorder", "nothing is recorded yet", hint="pipe(…, callback_on_step_end=recorder.callback)"
            )
