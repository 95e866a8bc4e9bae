"""Learned gates over layer and timestep: how much of each expert a layer takes at each noise level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate
from mole_kernels.operands import Gates


class Timestep:
    """The noise level of the call that runs, shared by all gates of a model.

    Args:
        largest: The scheduler's largest timestep: 1000 for Stable Diffusion and for flow matching in
            diffusers, 1 where the transformer is told t in 0..1 (FLUX).

    Raises:
        MoleValueError: A largest timestep that is not above 0.
    """

    def __init__(self, largest: float = 1000.0) -> None:
        if not 0 < largest < float("inf"):
            raise MoleValueError("Timestep: largest", expected="above 0", got=largest)
        self.largest, self.value = float(largest), torch.zeros(1)

    def set(self, timestep: Tensor | float) -> None:
        """The timestep of all samples, or of each [B]."""
        value = torch.as_tensor(timestep, dtype=torch.float32).detach().reshape(-1)
        self.value = (value / self.largest).clamp(0, 1)

    @contextmanager
    def watching(self, denoiser: nn.Module) -> Iterator[None]:
        """While it lasts, every forward of the denoiser sets the timestep that it is called with."""

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            if timestep is None:
                raise MoleShapeError("Timestep", expected="a denoiser called with timestep", got="none")
            self.set(timestep)

        hook = denoiser.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


class TimeGate(Gate):
    """g_e(t) = 2 σ(w_e · φ(t) + b_e),  φ(t) = [cos πkt, sin πkt] for k = 1 … F, t in 0..1 by `Timestep`.

    Fresh gates are 1 at every t. A layer has a gate of its own, so that a patch learns a table over
    layers and timesteps, smooth in t.

    Args:
        num_experts: E.
        time: Shared by the gates of a model.
        frequencies: F.
        device: Of the parameters.

    Raises:
        MoleValueError: Fewer than one frequency.

    Example:
        time = Timestep()
        gates = lambda path, module, experts: TimeGate(len(experts.names), time, device=experts.scale.device)
        with mk.patch(pipe, experts, gates=gates) as handle, time.watching(pipe.unet):
            image = pipe(prompt).images[0]

    Source: gates over blocks and steps as T-LoRA and timestep-aware mixtures have them; this form is ours.
    """

    def __init__(self, num_experts: int, time: Timestep, frequencies: int = 4, device: Any = None) -> None:
        super().__init__()
        if frequencies < 1:
            raise MoleValueError("TimeGate: frequencies", expected="at least 1", got=frequencies)
        self.time, self.frequencies = time, frequencies
        self.weight = nn.Parameter(torch.zeros(num_experts, 2 * frequencies, device=device))
        self.bias = nn.Parameter(torch.zeros(num_experts, device=device))

    def at(self, t: Tensor) -> Tensor:
        """[n,E] float32 of noise levels t [n] in 0..1."""
        angle = (
            torch.pi
            * t.to(self.weight.device)[:, None]
            * torch.arange(1, self.frequencies + 1, device=self.weight.device)
        )
        features = torch.cat([angle.cos(), angle.sin()], 1)
        return 2 * torch.sigmoid(features @ self.weight.float().mT + self.bias.float())

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.at(self.time.value)[:, None])
