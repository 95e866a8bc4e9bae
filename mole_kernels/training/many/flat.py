"""An optimiser over many small tensors as over one: the same bits, one call in place of hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mole_kernels.training.config import OPTIMISERS, TrainConfig

# element by element: what comes out for one does not depend on the tensor it is in
_ELEMENTWISE = ("adamw", "lion")


class FlatOptimiser:
    """`OPTIMISERS[config.optimiser]` over parameters, its state as that optimiser's own.

    Parameters become views of one vector. Where one of them gets no gradient, which such an optimiser leaves
    out, it goes on tensor by tensor.

    Args:
        parameters: Of one dtype and device.
        config: Names the optimiser and its settings.
    """

    def __init__(self, parameters: Sequence[Parameter], config: TrainConfig) -> None:
        self.parameters, self._config = list(parameters), config
        self._each = OPTIMISERS[config.optimiser](self.parameters, config)
        self._whole: torch.optim.Optimizer | None = None
        self._vector, self._grads = Parameter(torch.empty(0)), list[Tensor]()
        self._may_flatten = config.optimiser in _ELEMENTWISE and len({p.dtype for p in self.parameters}) == 1

    def step(self, lr: float, clip: float) -> float:
        """One step with gradients of norm at most `clip`; they are gone afterwards.

        Returns:
            Their norm before; where it is not finite, no step was taken.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            return float(norm)
        if self._may_flatten and len(grads) == len(self.parameters):
            optimiser = self._flattened()
            torch._foreach_copy_(self._grads, grads)
        else:
            self._may_flatten, optimiser = False, self._apart()
        trained: Any = self._vector if optimiser is self._whole else self.parameters
        torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        for p in self.parameters:
            p.grad = None
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """As the optimiser over separate tensors has it."""
        if self._whole is not None:
            self._split_state(self._whole)
        return self._each.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A state of `state_dict`, or of the optimiser over separate tensors."""
        self._apart()
        self._each.load_state_dict(state)

    def _flattened(self) -> torch.optim.Optimizer:
        if self._whole is not None:
            return self._whole
        with torch.no_grad():
            self._vector = Parameter(torch.cat([p.flatten() for p in self.parameters]))
            self._vector.grad = torch.zeros_like(self._vector)
            self._grads = self._views(self._vector.grad)
            for p, view in zip(self.parameters, self._views(self._vector.detach())):
                p.data = view
        whole = OPTIMISERS[self._config.optimiser]([self._vector], self._config)
        states = [self._each.state.get(p) for p in self.parameters]
        if all(states):
            whole.state[self._vector] = {
                key: torch.cat([s[key].flatten() for s in states if s is not None])
                if value.shape == self.parameters[0].shape
                else value.clone()
                for key, value in states[0].items()  # type: ignore[union-attr]
            }
        self._whole = whole
        return whole

    def _apart(self) -> torch.optim.Optimizer:
        if self._whole is not None:
            self._split_state(self._whole)
            self._whole = None
        return self._each

    def _split_state(self, whole: torch.optim.Optimizer) -> None:
        for key, value in whole.state[self._vector].items():
            if value.shape == self._vector.shape:
                for p, view in zip(self.parameters, self._views(value)):
                    self._each.state[p][key] = view.clone()
            else:
                for p in self.parameters:
                    self._each.state[p][key] = value.clone()
        for group, new in zip(self._each.param_groups, whole.param_groups):
            group["lr"] = new["lr"]

    def _views(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters)]
