"""Experts whose ΔW depends on the base, completed by the weights of a model.

Each becomes the A and B of its whole ΔW, one of them the identity, so that gates, masks, regions, grouping
and compilation take it as they take a LoRA. It costs a second product of the base's size on its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleStateError, printable
from mole_kernels.experts.families.family import AdapterFamily
from mole_kernels.experts.families.scalings import NOTHING, Difference
from mole_kernels.experts.lowrank import Expert, LowRank, canonical_path
from mole_kernels.modules.names import Names
from mole_kernels.modules.scan import scan


class AtStrength(NamedTuple):
    """ΔW of one expert on one layer at any strength, where that is no multiple of ΔW at 1.

    Attributes:
        family: The expert.
        module: The layer, whose weight it reads anew.
    """

    family: AdapterFamily
    module: nn.Module

    def factors(self, strength: float) -> tuple[Tensor, Tensor]:
        """A and B at a strength, on the weight's device.

        Args:
            strength: The adapter's scale.
        """
        delta = self.family.weight_delta(self.module.weight, strength)  # type: ignore[arg-type]
        assert delta is not None
        return dense_factors(delta.flatten(1))


@dataclass(frozen=True, eq=False)
class OnBase(LowRank):
    """A and B of an expert that was completed by a base.

    Attributes:
        at_strength: ΔW at another strength; None where strength multiplies it.
        bias: β [N] float32 that it adds to the bias, or None.
    """

    at_strength: AtStrength | None = None
    bias: Tensor | None = None


def dense_factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW [N,K] as A [R,K] and B [N,R], R = min(N,K), one of them the identity."""
    N, K = delta.shape
    eye = torch.eye(min(N, K), dtype=delta.dtype, device=delta.device)
    return (delta, eye) if N <= K else (eye, delta)


def completed(expert: Expert, model: object) -> Expert:
    """The expert with A and B for each of its families, from the model's weights; itself where it has none.

    Args:
        expert: The expert.
        model: A module or a pipeline.

    Raises:
        MoleShapeError: Parts of another layer.
        MoleStateError: A weight that is not in memory.
    """
    if not expert.families:
        return expert
    scanned = scan(model)
    names = Names(scanned)
    layers: dict[str, LowRank] = dict(expert.layers)
    for key, family in expert.families.items():
        path = names.find(key)
        module = None if path is None else scanned.layers.get(path) or scanned.patched.get(path)
        if module is not None and not isinstance(family, Difference):
            layers[key] = _completed(f"{printable(expert.source)}, {printable(key)}", family, module)
        elif path is None or path not in scanned.others:
            # matches no layer, or one that takes no experts: `plan` says so
            layers[key] = NOTHING
    return replace(expert, layers=layers)


def _completed(where: str, family: AdapterFamily, module: nn.Module) -> OnBase:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise MoleStateError(
            where,
            f"its {family.kind} depends on the base's weight, which is not in memory",
            hint="patch before offloading the model",
        )
    with torch.no_grad():
        try:
            delta = family.weight_delta(weight)
        except MoleShapeError as error:
            raise MoleShapeError(where, str(error).splitlines()[0], hint=error.hint) from error
        beta = family.bias_delta(bias if isinstance(bias, Tensor) else None)
    N, K = weight.shape[0], weight[0].numel()
    conv: bool | tuple[int, int] = False
    if isinstance(module, nn.Conv2d):
        kernel = (int(module.kernel_size[0]), int(module.kernel_size[1]))
        conv = kernel if kernel != (1, 1) else True
    if delta is None:
        down, up = weight.new_zeros(1, K, dtype=torch.float32), weight.new_zeros(N, 1, dtype=torch.float32)
    else:
        down, up = dense_factors(delta.flatten(1))
    at_strength = None if family.linear or delta is None else AtStrength(family, module)
    return OnBase(down, up, 1.0, conv, at_strength, None if beta is None else beta.float())


class PlannedDifference(NamedTuple):
    """A difference of a norm's or an embedding's own parameters.

    Attributes:
        path: The module's path.
        module: The module.
        differences: Expert's name -> its difference.
    """

    path: str
    module: nn.Module
    differences: dict[str, Difference]


def planned_differences(experts: Mapping[str, Expert], model: object) -> list[PlannedDifference]:
    """The differences of norms and embeddings that experts bring, with their modules.

    Args:
        experts: The experts by name.
        model: A module or a pipeline.

    Raises:
        MoleShapeError: A difference of another shape than the module's parameter.
    """
    if not any(expert.families for expert in experts.values()):
        return []
    scanned = scan(model)
    names = Names(scanned)
    by_path: dict[str, PlannedDifference] = {}
    for name, expert in experts.items():
        for key, family in expert.families.items():
            path = names.find(key)
            if path is None or path not in scanned.others or not isinstance(family, Difference):
                continue
            module = scanned.others[path]
            for word, difference in _tensors(family):
                parameter = getattr(module, word, None)
                shape = list(parameter.shape) if isinstance(parameter, Tensor) else None
                if shape != list(difference.shape):
                    raise MoleShapeError(
                        f"expert {name!r}, {printable(key)}",
                        expected=f"a difference of the {word} of {path}, {shape or 'which has none'}",
                        got=list(difference.shape),
                    )
            by_path.setdefault(path, PlannedDifference(path, module, {})).differences[name] = family
    return list(by_path.values())


def _tensors(difference: Difference) -> Iterator[tuple[str, Tensor]]:
    for word, tensor in (("weight", difference.weight), ("bias", difference.bias)):
        if tensor is not None:
            yield word, tensor


class AppliedDifferences:
    """Differences added to the parameters of norms and embeddings, and taken off bit for bit.

    parameter = original + Σ_e scale_e · difference_e, in float32, rounded once. No gate reaches them.
    """

    def __init__(self, planned: list[PlannedDifference]) -> None:
        self._planned = planned
        self._originals: list[dict[str, Tensor]] = [
            {
                word: getattr(entry.module, word).detach().clone()
                for difference in entry.differences.values()
                for word, _ in _tensors(difference)
            }
            for entry in planned
        ]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that change."""
        return [entry.module for entry in self._planned]

    @torch.no_grad()
    def write(self, scale: Mapping[str, float]) -> None:
        """Add each expert's difference, times its scale.

        Args:
            scale: Expert's name -> its scale.
        """
        for entry, originals in zip(self._planned, self._originals):
            for word, original in originals.items():
                parameter = getattr(entry.module, word)
                total = original.to(parameter.device, torch.float32)
                for name, difference in entry.differences.items():
                    tensor = getattr(difference, word)
                    if tensor is not None and scale[name]:
                        total = total + scale[name] * tensor.to(total.device, torch.float32)
                changed = any(scale[name] for name in entry.differences)
                parameter.copy_(total if changed else original)

    @torch.no_grad()
    def restore(self) -> None:
        """Every parameter as it was, bit for bit."""
        for entry, originals in zip(self._planned, self._originals):
            for word, original in originals.items():
                getattr(entry.module, word).copy_(original)


def completed_by_base(expert: Expert, path: str) -> bool:
    """Whether the expert's A and B on a layer were made of a family and the base.

    Args:
        expert: The expert, completed.
        path: The layer's path in the model.
    """
    own = canonical_path(path)
    return any(canonical_path(key) == own for key in expert.families)


def reason_against_serving(expert: Expert) -> str | None:
    """Why an expert cannot be one of several in a batch, or None.

    Args:
        expert: The expert, completed.
    """
    for layer in expert.layers.values():
        if isinstance(layer, OnBase) and layer.bias is not None:
            return "it changes biases, of which a batch has one for all"
    for family in expert.families.values():
        if isinstance(family, Difference):
            return "it changes norms, of which a batch has one for all"
    return None
