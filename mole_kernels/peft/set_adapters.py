"""`set_adapters` of a diffusers model whose LoRA layers are accelerated: the time of the active adapters
alone.

diffusers' own method decides everything: names, weights, blocks, what is an error. It walks the modules of
every adapter ever loaded and lets each layer freeze all of them again. Here it is given a view of the model
that ends at the LoRA layers, and of an accelerated layer it touches only the adapters that cease to be active
or become so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mole_kernels.peft.forward import Accelerated

_METHOD = "set_adapters"


class FastSetAdapters:
    """Replaces a model's `set_adapters` while its layers are accelerated."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        method: Any = getattr(type(self.model), _METHOD)
        method(_LayersView(self.model), *args, **kwargs)


def replace_set_adapters(module: nn.Module) -> bool:
    """Replace the method of a diffusers model.

    Returns:
        Whether it is replaced. Other modules, and a model whose instance has a `set_adapters` of its own, are
        left alone.
    """
    method = getattr(type(module), _METHOD, None)
    if method is None or not method.__module__.startswith("diffusers."):
        return False
    own = module.__dict__.setdefault(_METHOD, FastSetAdapters(module))
    return isinstance(own, FastSetAdapters)


def restore_set_adapters(module: nn.Module) -> None:
    """Give the model its own method back."""
    if isinstance(module.__dict__.get(_METHOD), FastSetAdapters):
        del module.__dict__[_METHOD]


class _LayersView:
    """The model as `set_adapters` needs to see it: its modules are its LoRA layers alone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_modules(self) -> Iterator[tuple[str, object]]:
        proxy: _LayerProxy | None = None
        by_hand: bool | None = None
        for name, layer in _outer_tuner_layers(self._model):
            if not isinstance(layer, Accelerated):
                yield name, layer
                continue
            if by_hand is None:
                by_hand = _has_flags_set_by_hand(layer)
            if by_hand:
                yield name, layer
                continue
            # one object for all: the caller is done with a layer when it asks for the next
            proxy = proxy or _LayerProxy()
            proxy.layer = layer
            yield name, proxy


class _LayerProxy(BaseTunerLayer):
    """Stands for an accelerated layer, of whose adapters it touches only those that change.

    It touches as few objects as possible: the objects of 722 layers do not stay in the processor's caches.
    """

    layer: Any

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        attributes = self.layer.__dict__
        before = attributes["_active_adapter"]
        if (
            inference_mode
            or attributes["lora_variant"]
            or isinstance(before, str)
            or isinstance(adapter_names, str)
        ):
            self.layer.set_adapter(adapter_names, inference_mode)
            return
        if before != adapter_names:
            modules = attributes["_modules"]
            for half in (modules["lora_A"].__dict__["_modules"], modules["lora_B"].__dict__["_modules"]):
                for name in before:
                    if name not in adapter_names and name in half:
                        _set_requires_grad(half[name], False)
                for name in adapter_names:
                    if name not in before and name in half:
                        _set_requires_grad(half[name], True)
        attributes["_active_adapter"] = adapter_names

    def set_scale(self, adapter: str, scale: Any) -> None:
        self.layer.set_scale(adapter, scale)


def _outer_tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """In the order and under the names of `named_modules`, without going into the layers."""
    seen: set[int] = set()
    # two lists, not one of pairs: thousands of pairs would set the garbage collector off
    paths: list[str] = [""]
    modules: list[nn.Module | None] = [model]
    while modules:
        path, module = paths.pop(), modules.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, BaseTunerLayer):
            yield path, module
            continue
        children = module.__dict__["_modules"]
        if children:
            modules += reversed(children.values())
            prefix = f"{path}." if path else ""
            paths += [prefix + name for name in reversed(children)]


def _has_flags_set_by_hand(layer: Any) -> bool:
    """Whether `requires_grad` of this layer's factors was not set by PEFT.

    Flags set by hand are set in all layers, so one layer shows it. Then every layer sets the flags of all
    adapters, as PEFT does.
    """
    active = layer.active_adapters
    halves = (layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules)
    return any(
        p.requires_grad != (name in active)
        for half in halves
        for name, module in half.items()
        for p in module.parameters()
    )


def _set_requires_grad(module: nn.Module, wanted: bool) -> None:
    for parameter in module.__dict__["_parameters"].values():
        # of tensors that are no leaves the flag cannot be set
        if parameter is not None and parameter.is_leaf:
            parameter.requires_grad = wanted
