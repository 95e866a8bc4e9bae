"""The factors of one layer packed in the layer's dtype and on its device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.files.limits import finite
from mole_kernels.layers.offload import compute_dtype, execution_device
from mole_kernels.patching.families import OnBase


def pack(path: str, factors: Mapping[str, LowRank], module: nn.Module) -> LayerExperts:
    """The experts of one layer, in its dtype and on its device; while it is on meta on that of its offload
    hook, or on their own.
    """
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    device = (
        weight.device
        if not weight.is_meta
        else execution_device(module) or next(iter(factors.values())).down.device
    )
    experts = LayerExperts.from_factors(factors, dtype=compute_dtype(module), device=device)
    for name, factor in factors.items():
        span = experts.span(name)
        check_narrowing(name, path, factor, experts.down[:, span], experts.up[:, :, span])
    attach_families(experts, factors)
    return experts


def attach_families(experts: LayerExperts, factors: Mapping[str, LowRank]) -> None:
    """What experts that were completed by the base add beside A and B."""
    completed = {name: factor for name, factor in factors.items() if isinstance(factor, OnBase)}
    experts.strengths = {n: f.at_strength for n, f in completed.items() if f.at_strength is not None}
    if any(factor.bias is not None for factor in completed.values()):
        bias_delta = torch.zeros(len(factors), experts.up.shape[1], device=experts.up.device)
        for row, name in zip(bias_delta, factors):
            bias = completed[name].bias if name in completed else None
            if bias is not None:
                row.copy_(bias)
        experts.register_buffer("bias_delta", bias_delta)


def check_narrowing(name: str, path: str, factor: LowRank, down: Tensor, up: Tensor) -> None:
    """Values that a smaller dtype (float16, above all) cannot hold are an error, not an infinity in every
    picture.

    down, up  the factors after the cast
    """
    if not finite(factor.scale, torch.float32):
        raise MoleValueError(
            f"expert {name!r}, layer {path}",
            expected="a finite scale that float32 holds",
            got=factor.scale,
            hint="scales are kept in float32 whatever the layer's dtype",
        )
    # twice: float32 and bfloat16 end at nearly the same number, and a pass over every bfloat16 expert would
    # be for nothing
    limit = 2 * torch.finfo(down.dtype).max
    if max(torch.finfo(factor.down.dtype).max, torch.finfo(factor.up.dtype).max) <= limit:
        return
    if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
        raise MoleValueError(
            f"expert {name!r}, layer {path}",
            f"its values do not fit the layer's {str(down.dtype)[6:]}",
            hint="run the model in bfloat16 or float32",
        )
