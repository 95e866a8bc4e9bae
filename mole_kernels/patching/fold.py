"""A static mixture inside the base weights: W' = W + Σ_e s_e g_e B_e A_e, and back out again.

Folded, a layer runs at the plain layer's speed; it can no longer tell one token or sample from another, so
only constant gates fold.
Back out: from a kept copy, bit for bit; or by recomputing the same sum and taking it off, within u(|W'| +
|W''|) of every element for the
W'' that comes out, u half the distance from 1 to the next number of the weight's dtype (two roundings, one
each way).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import ConstantGate
from mole_kernels.layers.linear import Gated
from mole_kernels.layers.sharded import is_sharded
from mole_kernels.modules.scan import roots

if TYPE_CHECKING:
    from mole_kernels.patching.patched import Patched


@dataclass
class _Layer:
    """One folded layer: what it was made of, the versions of those tensors, and the copy of its weight (None:
    recompute).
    """

    path: str
    module: Gated
    original: Tensor | None
    versions: tuple[int, ...]


class Folded:
    """The layers that hold their experts in their weights; `unfold` takes them out again."""

    def __init__(self, layers: list[_Layer]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def unfold(self) -> None:
        """W as it was (see the module's text), experts on again; all or nothing. Refused where somebody wrote
        to what this depends on.
        """
        for target in self._layers:
            if _versions(target.module, target.original is None) != target.versions:
                what = "its weight was" if target.original is not None else "its weight or its experts were"
                raise MoleStateError(
                    "unfold",
                    f"{target.path}: {what} written to while folded",
                    hint="what is in the weight now is unknown",
                )
        try:
            for target in self._layers:
                weight = _weight(target.module)
                weight.copy_(_shifted(target.module, -1.0) if target.original is None else target.original)
                target.module.experts_on = True
            self._layers = []
        # back to folded, in the memory of one layer: the same sum of the same bits
        except BaseException:
            for target in self._layers:
                weight = _weight(target.module)
                if weight._version != target.versions[0]:
                    if target.original is not None:
                        weight.copy_(target.original)
                    weight.copy_(_shifted(target.module, 1.0))
                    target.versions = _versions(target.module, target.original is None)
                target.module.experts_on = False
            raise


@torch.no_grad()
def fold(model: object, patched: Iterable[Patched], *, keep: bool = True) -> Folded:
    """Put every layer's experts into its weight and switch them off; all or nothing.

    keep  copies of the weights are kept, and unfolding is exact; without them it is within the stated
          tolerance, and so is the way
          back from a failure half-way
    A layer whose experts are switched off is left alone. Raises MoleStateError where a gate varies by token,
    sample or step, where every
    sample has experts of its own, and where a weight is shared, not in memory or made under inference_mode.
    """
    chosen = [target for target in patched if cast(Gated, target.module).experts_on]
    owners = _owners(model)
    for target in chosen:
        if reason := reason_against_folding(target, owners):
            raise MoleStateError(f"fold, layer {target.path}", reason)
    done: list[_Layer] = []
    try:
        for target in chosen:
            module = cast(Gated, target.module)
            weight = _weight(module)
            new = _shifted(module, 1.0)
            if not new.isfinite().all() and weight.isfinite().all():
                if new.isnan().any():
                    raise MoleValueError(
                        f"fold, layer {target.path}",
                        "the folded weight would hold NaN",
                        hint="an expert, a scale or a product of theirs is NaN",
                    )
                raise MoleValueError(
                    f"fold, layer {target.path}",
                    f"the folded weight overflows in {weight.dtype}",
                    hint="fold in bfloat16",
                )
            layer = _Layer(target.path, module, weight.detach().clone(), ())
            done.append(layer)
            weight.copy_(new)
            layer.versions = _versions(module, not keep)
            module.experts_on = False
            if not keep:
                layer.original = None
        return Folded(done)
    # Ctrl-C and a full memory must not leave half of it either
    except BaseException:
        for layer in done:
            _weight(layer.module).copy_(
                _shifted(layer.module, -1.0) if layer.original is None else layer.original
            )
            layer.module.experts_on = True
        raise


def reason_against_folding(target: Patched, owners: dict[int, int]) -> str | None:
    """Why a layer's mixture cannot be a part of its weight, or None."""
    weight = _weight(target.module)
    if target.experts.bias_delta is not None:
        return "its experts change the bias too"
    if target.gate is not None and not isinstance(target.gate, ConstantGate):
        kind = type(target.gate).__name__
        return f"its {kind} varies by token, sample or step; only constant gates can be folded"
    if target.experts.down.shape[0] > 1:
        return f"it has {target.experts.down.shape[0]} sets of experts, one for each sample"
    if weight.is_meta:
        return "its weight is not in memory (an offload hook holds it)"
    if is_sharded(weight):
        return "its weight is sharded over ranks"
    if weight.element_size() == 1:
        return f"its weight is stored in 8 bits ({weight.dtype}), which would round the experts away"
    if weight.is_inference():
        return "its weight was made under inference_mode and cannot be written to"
    if owners.get(id(weight), 1) > 1:
        return "its weight is shared with another module, which would change with it"
    return None


def _owners(model: object) -> dict[int, int]:
    """id of a parameter -> how many modules hold it."""
    count: dict[int, int] = {}
    for module in {id(m): m for root in roots(model).values() for m in root.modules()}.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _shifted(module: nn.Module, sign: float) -> Tensor:
    """W ± Σ_e s_e g_e B_e A_e, ΔW made in float32 (float64 for such a weight), added and rounded once."""
    weight, experts = _weight(module), cast(LayerExperts, module.experts)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = experts.scale.to(wide)
    if isinstance(module.gate, ConstantGate):
        gate = module.gate.operands(experts).gate
        assert gate is not None
        scale = scale * gate[0, 0].to(wide)
    ranks = torch.tensor(experts.ranks, device=scale.device)
    up = experts.up[0].to(wide) * torch.repeat_interleave(scale, ranks)
    # ΔW first, by itself: the same bits on the way in and on the way out
    delta = up @ experts.down[0].to(wide)
    return delta.mul_(sign).add_(weight.flatten(1)).to(weight.dtype).view_as(weight)


def _versions(module: nn.Module, recompute: bool) -> tuple[int, ...]:
    tensors = [_weight(module)]
    if recompute:
        experts = cast(LayerExperts, module.experts)
        tensors += [experts.up, experts.down, experts.scale]
        tensors += (
            module.gate.state_dict(keep_vars=True).values() if isinstance(module.gate, ConstantGate) else []
        )
    return tuple(t._version for t in tensors)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)
