"""Functions of single elements in a forward that mixes the samples of several jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mole_kernels.training.many.layers import MixedLayers

# what applies exp, tanh, erf or sin to each element, of torch and of diffusers
_ACTIVATIONS = (nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Mish, nn.Softplus, nn.ELU)
_ACTIVATION_NAMES = {"GELU", "ApproximateGELU", "FP32SiLU", "LinearActivation", "Timesteps"}
# elements that torch's loops take at a time at most, and from how many on threads share them
_STRIDE, _GRAIN = 64, 32768


def is_activation(module: nn.Module) -> bool:
    """Whether a module applies such a function."""
    return isinstance(module, _ACTIVATIONS) or type(module).__name__ in _ACTIVATION_NAMES


class MixedActivation:
    """A function of each element, which torch computes in vectors and, at their end, one by one.

    The two differ in the last bit, so it matters where a job's elements lie. In one call they lie as they do
    alone only where every job's elements fill whole vectors.
    """

    def __init__(self, module: nn.Module, owner: MixedLayers) -> None:
        self.module, self.owner = module, owner
        module.__dict__["forward"] = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The function of all parts' elements."""
        parts, own = self.owner.parts, type(self.module).forward
        total = sum(part.rows for part in parts)
        if len(parts) <= 1 or x.dim() == 0 or x.shape[0] % total or self._fills_vectors(x):
            return own(self.module, x, *args, **kwargs)  # type: ignore[no-any-return]
        pieces = []
        for part, piece in zip(parts, x.split([part.rows * (x.shape[0] // total) for part in parts])):
            with self.owner.running([part]):
                pieces.append(own(self.module, piece, *args, **kwargs))
        return torch.cat(pieces)

    def _fills_vectors(self, x: Tensor) -> bool:
        each = x[0].numel()
        projection = getattr(self.module, "proj", None)
        after = each if projection is None else each // x.shape[-1] * projection.out_features
        whole = each % _STRIDE == 0 and after % _STRIDE == 0
        alone = torch.get_num_threads() == 1 or x.shape[0] * max(each, after) < _GRAIN
        return whole and x.is_contiguous() and (alone or x.device.type != "cpu")
