"""Layers that read one input through one A: fused q, k, v files give all three the same down-projection,
which need be applied only once.

kohya's, BFL's and other files hold one LoRA for a fused projection; cut back into to_q, to_k and to_v, each
part keeps the whole A.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank

T = TypeVar("T")


def shared_down(source: Expert | ExpertBank) -> list[tuple[str, ...]]:
    """Groups of layers of one parent whose A hold the same values: [(….to_q, ….to_k, ….to_v), …].

    Only layers of one parent module are compared: others do not read the same input.

    Args:
        source: An expert, or a bank, whose groups hold for every expert that has one of the layers.
    """
    if isinstance(source, ExpertBank):
        paths = source.paths()
        return _groups(paths, {path: source.layer(path) for path in paths}, _same_experts, _signs)
    return _groups(source.layers, source.layers, _same_layer, _first_values)


def store_once(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same layers with equal A of one parent as one tensor: a third of the memory for fused q, k, v.

    Args:
        layers: Path -> LowRank.
    """
    stored = dict(layers)
    for first, *others in _groups(stored, stored, _same_layer, _first_values):
        for path in others:
            layer = stored[path]
            stored[path] = LowRank(stored[first].down, layer.up, layer.scale, layer.conv)
    return stored


def same_content(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values in the same dtype, shape and place.

    Args:
        a: A tensor; one without data is the same only as itself.
        b: Another.
    """
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device or a.is_meta:
        return False
    if a.is_contiguous() and b.is_contiguous() and a.data_ptr() == b.data_ptr():
        return True
    return torch.equal(a.detach(), b.detach())


def _same_layer(a: LowRank, b: LowRank) -> bool:
    return a.conv == b.conv and same_content(a.down, b.down)


def _same_experts(a: Mapping[str, LowRank], b: Mapping[str, LowRank]) -> bool:
    return list(a) == list(b) and all(_same_layer(a[name], b[name]) for name in a)


def _first_values(layer: LowRank) -> Hashable:
    """What tells nearly all different A apart without reading them whole."""
    return (
        layer.down.shape,
        id(layer.down) if layer.down.is_meta else tuple(layer.down.detach().reshape(-1)[:4].tolist()),
    )


def _signs(layers: Mapping[str, LowRank]) -> Hashable:
    return tuple(_first_values(layer) for layer in layers.values())


def _groups(
    paths: Iterable[str],
    content: Mapping[str, T],
    same: Callable[[T, T], bool],
    sign: Callable[[T], Hashable],
) -> list[tuple[str, ...]]:
    alike: dict[Hashable, list[list[str]]] = {}
    for path in paths:
        groups = alike.setdefault((path.rpartition(".")[0], sign(content[path])), [])
        group = next((g for g in groups if same(content[g[0]], content[path])), None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    return [tuple(group) for groups in alike.values() for group in groups if len(group) > 1]
