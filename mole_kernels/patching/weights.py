"""Adapter weights written into every layer's scale at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from mole_kernels.experts.layer import LayerExperts


class ScaleWriter:
    """scale_e = base_scale_e · weight_e in all layers, through one staging tensor for each device that is kept between calls."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._weights = torch.ones(len(self._names), dtype=torch.float32)
        self._groups: list[_Group] = []
        self._bases: list[Tensor] = []

    @torch.no_grad()
    def write(self, layers: Sequence[LayerExperts], weights: Mapping[str, float]) -> None:
        bases = [cast(Tensor, layer._buffers["base_scale"]) for layer in layers]
        # `.to()` and a swap give the layers other buffers: then what is staged is out of date
        if len(bases) != len(self._bases) or any(now is not then for now, then in zip(bases, self._bases)):
            self._bases = bases
            self._groups = self._grouped(layers)
        for i, name in enumerate(self._names):
            self._weights[i] = weights[name]
        for group in self._groups:
            group.weights.copy_(self._weights)
            torch.index_select(group.weights, 0, group.rows, out=group.staged)
            group.staged.mul_(group.base)
            torch._foreach_copy_([cast(Tensor, layer._buffers["scale"]) for layer in group.layers], group.parts)

    def _grouped(self, layers: Sequence[LayerExperts]) -> list[_Group]:
        by_device: dict[torch.device, list[LayerExperts]] = {}
        for layer in layers:
            by_device.setdefault(layer.base_scale.device, []).append(layer)
        return [_Group(members, device, self._names) for device, members in by_device.items()]


class _Group:
    """The layers of one device."""

    def __init__(self, layers: list[LayerExperts], device: torch.device, names: tuple[str, ...]) -> None:
        # a staging tensor made under inference_mode could not be written outside of it
        with torch.inference_mode(False):
            self.layers = layers
            self.weights = torch.ones(len(names), dtype=torch.float32, device=device)
            self.rows = torch.tensor([names.index(name) for layer in layers for name in layer.names], device=device)
            self.base = torch.cat([layer.base_scale for layer in layers]).clone()
            self.staged = torch.empty_like(self.base)
            self.parts = list(self.staged.split([len(layer.names) for layer in layers]))
