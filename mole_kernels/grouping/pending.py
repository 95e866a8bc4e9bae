"""Outputs that a group has computed for layers that have not been called yet."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.layers.fingerprint import collect_tensors, layout_of
from mole_kernels.precision import autocast_dtype


class CallState(NamedTuple):
    """How an input and the layers stood before their outputs were computed.

    Attributes:
        x: The input, referred to weakly: once it is freed, no other tensor is taken for it.
        written: Its version, address and layout.
        mode: Grad mode, inference mode, autocast and float32 precision.
        layers: Of each layer its tensors' identity, address, version and layout, and its settings.
    """

    x: weakref.ref[Tensor]
    written: tuple[object, ...]
    mode: tuple[object, ...]
    layers: list[tuple[object, ...]]


def call_state(x: Tensor, layers: Sequence[nn.Module]) -> CallState | None:
    """How x and the layers stand; None if one of their tensors counts no versions."""
    states = [_layer_state(layer) for layer in layers]
    if x.is_inference() or any(state is None for state in states):
        return None
    return CallState(weakref.ref(x), _written(x), _mode(x), [s for s in states if s is not None])


class PendingOutputs:
    """The outputs of a group's layers for one input, each to be handed out once.

    Args:
        state: How input and layers stood before the outputs were computed.
        ys: One output for each layer.
    """

    def __init__(self, state: CallState, ys: list[Tensor | None]) -> None:
        self.state, self.ys = state, ys

    def hand_out(self, place: int, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The output of one layer, once; None if anything that it depends on has changed."""
        y, state = self.ys[place], self.state
        if (
            y is None
            or state.x() is not x
            or state.written != _written(x)
            or state.mode != _mode(x)
            or state.layers[place] != _layer_state(layer)
        ):
            return None
        self.ys[place] = None
        return y

    def all_handed_out(self) -> bool:
        """Whether every layer has got its output."""
        return all(y is None for y in self.ys)


def _layer_state(layer: nn.Module) -> tuple[object, ...] | None:
    tensors: list[Tensor] = []
    settings: list[object] = []
    collect_tensors(layer, tensors, settings)
    if any(t.is_inference() for t in tensors):
        return None
    return (*settings, *[(id(t), t.data_ptr(), t._version, layout_of(t)) for t in tensors])


def _written(x: Tensor) -> tuple[object, ...]:
    return None if x.is_inference() else x._version, x.data_ptr(), layout_of(x)


def _mode(x: Tensor) -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast_dtype(x.device.type),
        torch.get_float32_matmul_precision(),
    )
