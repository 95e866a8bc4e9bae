"""The scales of a patch, written into every layer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mole_kernels.experts.layer import LayerExperts
from mole_kernels.patching.block_scales import LayerScale, Scale, check_scales, layer_scales, scale_at


class ScaleSettings:
    """The scales of a patch: as they were asked, by layer, and written into the layers."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._writer = ScaleWriter(self._names)
        self.asked: dict[str, Scale] = dict.fromkeys(self._names, 1.0)
        self.by_layer: dict[str, LayerScale] = dict.fromkeys(self._names, 1.0)

    def resolve(
        self, scales: Mapping[str, Scale], model: object, layers: Mapping[str, LayerExperts]
    ) -> tuple[dict[str, Scale], dict[str, LayerScale]]:
        """The scales checked, and what they are for each layer.

        Raises:
            MoleTypeError, MoleValueError: No such adapter, component or block, or no finite number.
        """
        asked = check_scales(scales, self._names)
        held = {name: [path for path, layer in layers.items() if name in layer.names] for name in asked}
        return asked, {name: layer_scales(name, scale, model, held[name]) for name, scale in asked.items()}

    def write(
        self,
        layers: Mapping[str, LayerExperts],
        asked: Mapping[str, Scale],
        by_layer: Mapping[str, LayerScale],
    ) -> None:
        """Set some adapters' scales, all layers or none."""
        try:
            self._write(layers, self.by_layer | dict(by_layer))
            self.asked, self.by_layer = self.asked | dict(asked), self.by_layer | dict(by_layer)
        # layers of one device may have been written, those of another not
        except BaseException:
            self._write(layers, self.by_layer)
            raise

    def _write(self, layers: Mapping[str, LayerExperts], by_layer: Mapping[str, LayerScale]) -> None:
        self._writer.write(layers, by_layer)
        for path, layer in layers.items():
            if layer.strengths:
                layer.set_strengths({name: scale_at(by_layer[name], path) for name in layer.strengths})

    def numbers(self) -> dict[str, float]:
        """Each adapter's number; 1 for a scale by component or block."""
        return {n: 1.0 if isinstance(scale, Mapping) else float(scale) for n, scale in self.asked.items()}

    def forget_staged(self) -> None:
        """What is staged belongs to base scales that a swap replaces."""
        self._writer = ScaleWriter(self._names)


class ScaleWriter:
    """scale_e = base_scale_e · weight_e in all layers, through one staging tensor for each device that is
    kept between calls.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._weights = torch.ones(len(self._names), dtype=torch.float32)
        self._groups: list[_Group] = []
        self._bases: list[Tensor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle would make of the staged tensor's parts tensors of their own
        return ScaleWriter, (self._names,)

    @torch.no_grad()
    def write(self, layers: Mapping[str, LayerExperts], weights: Mapping[str, LayerScale]) -> None:
        """layers: path -> its experts; weights: expert name -> its weight, everywhere or by path."""
        bases = [cast(Tensor, layer._buffers["base_scale"]) for layer in layers.values()]
        # `.to()` and a swap give the layers other buffers: then what is staged is out of date
        if len(bases) != len(self._bases) or any(now is not then for now, then in zip(bases, self._bases)):
            # in this order: a failure in between must not leave old groups for new layers
            self._groups = self._grouped(layers)
            self._bases = bases
        everywhere = all(not isinstance(weights[name], Mapping) for name in self._names)
        if everywhere:
            self._weights.copy_(torch.tensor([weights[name] for name in self._names]))
        for group in self._groups:
            if everywhere:
                group.weights.copy_(self._weights)
                torch.index_select(group.weights, 0, group.rows, out=group.staged)
            else:
                group.staged.copy_(
                    torch.tensor([scale_at(weights[name], path) for path, name in group.places])
                )
            group.staged.mul_(group.base)
            torch._foreach_copy_(
                [cast(Tensor, layer._buffers["scale"]) for layer in group.layers], group.parts
            )

    def _grouped(self, layers: Mapping[str, LayerExperts]) -> list[_Group]:
        by_device: dict[torch.device, dict[str, LayerExperts]] = {}
        for path, layer in layers.items():
            by_device.setdefault(layer.base_scale.device, {})[path] = layer
        return [_Group(members, device, self._names) for device, members in by_device.items()]


class _Group:
    """The layers of one device."""

    def __init__(
        self, members: Mapping[str, LayerExperts], device: torch.device, names: tuple[str, ...]
    ) -> None:
        layers = list(members.values())
        self.places = [(path, name) for path, layer in members.items() for name in layer.names]
        # a staging tensor made under inference_mode could not be written outside of it
        with torch.inference_mode(False):
            self.layers = layers
            self.weights = torch.ones(len(names), dtype=torch.float32, device=device)
            self.rows = torch.tensor(
                [names.index(name) for layer in layers for name in layer.names], device=device
            )
            self.base = torch.cat([layer.base_scale for layer in layers]).clone()
            self.staged = torch.empty_like(self.base)
            self.parts = list(self.staged.split([len(layer.names) for layer in layers]))
