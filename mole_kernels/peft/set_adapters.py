"""`set_adapters` of a diffusers model whose LoRA layers are accelerated: the time of the active adapters, not
of all that are loaded.

diffusers' own decides everything: names, weights, blocks, what is wrong. It walks the modules of every
adapter ever loaded and has each
layer freeze all of them again. Here it is given a view of the model that ends at the LoRA layers, and of an
accelerated layer it touches
the adapters that cease to be active and those that become so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mole_kernels.peft.forward import Accelerated

_METHOD = "set_adapters"


class SetAdapters:
    """Stands in for a model's `set_adapters` while its layers are accelerated."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        method: Any = getattr(type(self.model), _METHOD)
        method(_View(self.model), *args, **kwargs)


def replace_set_adapters(module: nn.Module) -> bool:
    """On a diffusers model; any other module is left alone, and so is a model that somebody gave a
    `set_adapters` of its own.
    """
    method = getattr(type(module), _METHOD, None)
    if method is None or not method.__module__.startswith("diffusers."):
        return False
    own = module.__dict__.setdefault(_METHOD, SetAdapters(module))
    return isinstance(own, SetAdapters)


def restore_set_adapters(module: nn.Module) -> None:
    if isinstance(module.__dict__.get(_METHOD), SetAdapters):
        del module.__dict__[_METHOD]


class _View:
    """The model as `set_adapters` needs to see it: itself, but its modules are its LoRA layers alone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_modules(self) -> Iterator[tuple[str, object]]:
        light: Any = None
        for name, layer in _tuner_layers(self._model):
            if not isinstance(layer, Accelerated):
                yield name, layer
                continue
            if light is None:
                light = False if _flags_by_hand(layer) else _Light()
            if light:
                light.layer = layer
            yield name, light or layer


class _Light(BaseTunerLayer):
    """Stands for an accelerated layer: of its adapters only those that cease to be active, or become so, are
    looked at.

    Written for few objects touched rather than for beauty: 722 layers are no longer in the caches when their
    turn comes.
    """

    layer: Any

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        held = self.layer.__dict__
        before = held["_active_adapter"]
        if (
            inference_mode
            or held["lora_variant"]
            or isinstance(before, str)
            or isinstance(adapter_names, str)
        ):
            self.layer.set_adapter(adapter_names, inference_mode)
            return
        if before != adapter_names:
            modules = held["_modules"]
            for half in (modules["lora_A"].__dict__["_modules"], modules["lora_B"].__dict__["_modules"]):
                for name in before:
                    if name not in adapter_names and name in half:
                        _want_gradient(half[name], False)
                for name in adapter_names:
                    if name not in before and name in half:
                        _want_gradient(half[name], True)
        held["_active_adapter"] = adapter_names

    def set_scale(self, adapter: str, scale: Any) -> None:
        self.layer.set_scale(adapter, scale)


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
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


def _flags_by_hand(layer: Any) -> bool:
    """Who sets flags by hand does it in all layers, so one shows it: every layer then sets the flags of all
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


def _want_gradient(module: nn.Module, wanted: bool) -> None:
    for parameter in module.__dict__["_parameters"].values():
        # of tensors that are no leaves the flag cannot be set
        if parameter is not None and parameter.is_leaf:
            parameter.requires_grad = wanted
