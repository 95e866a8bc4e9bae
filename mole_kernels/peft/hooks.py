"""Hooks of accelerate and diffusers on PEFT's layers and on the modules inside them.

Some hooks only bring a module's tensors for a call: sequential offload, leaf-level group offload, casting. A
layer that reads lora_A and lora_B instead of calling them would skip these. It runs them itself, in the order
in which PEFT's calls would have run them, with its own computation inside. The order matters: diffusers
records it in the first forward, and then prefetches each module's tensors while the one before it computes.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn


class FetchHook(Protocol):
    """What accelerate's and diffusers' hooks have in common."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict]: ...

    def post_forward(self, module: nn.Module, output: Any) -> Any: ...


# hooks that move or cast the tensors of their module, move its input, and do nothing else
FETCH_HOOKS = {
    ("accelerate.hooks", "AlignDevicesHook"),
    ("diffusers.hooks.group_offloading", "GroupOffloadingHook"),
    ("diffusers.hooks.group_offloading", "LayerExecutionTrackerHook"),
    ("diffusers.hooks.layerwise_casting", "LayerwiseCastingHook"),
}


class ModuleHooks(NamedTuple):
    """The hooks of one module, the outermost first."""

    module: nn.Module
    hooks: Sequence[FetchHook]


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class's forward."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return True
    # accelerate and diffusers hook by replacing forward on the instance; on removal they leave the bound
    # original there
    forward = module.__dict__.get("forward")
    return forward is not None and not _is_class_forward(forward, module)


def fetching_hooks(module: nn.Module) -> ModuleHooks | None:
    """The hooks of a hooked module if all that they do is to bring its tensors, else None."""
    if torch.compiler.is_compiling() or module._forward_hooks or module._forward_pre_hooks:
        return None
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    attributes = module.__dict__
    forward, registry, hook = (attributes.get(n) for n in ("forward", "_diffusers_hook", "_hf_hook"))
    # either package alone, and its wrapper outermost: anything else is a forward that we do not know
    if not isinstance(forward, functools.partial) or (registry is None) == (hook is None):
        return None
    hooks: Sequence[FetchHook]
    if registry is not None:
        wrapper, innermost = (
            "diffusers.hooks.hooks",
            registry._fn_refs[0].forward if registry._fn_refs else None,
        )
        hooks = [registry.hooks[name] for name in reversed(registry._hook_order)]
    else:
        wrapper, innermost = "accelerate.hooks", attributes.get("_old_forward")
        hooks = [cast(FetchHook, hook)]
    if forward.func.__module__ != wrapper or not _is_class_forward(innermost, module):
        return None
    # accelerate's SequentialHook holds others
    kinds = [type(inner) for outer in hooks for inner in getattr(outer, "hooks", (outer,))]
    if any((kind.__module__, kind.__qualname__) not in FETCH_HOOKS for kind in kinds):
        return None
    return ModuleHooks(module, hooks)


def fetched_dtype(tensor: Tensor, hooked: Sequence[ModuleHooks]) -> torch.dtype:
    """The dtype that `tensor` has once the hooks of its module have run."""
    for module, hooks in hooked:
        if module._parameters.get("weight") is tensor:
            for hook in hooks:
                if type(hook).__qualname__ == "LayerwiseCastingHook":
                    return hook.compute_dtype  # type: ignore[attr-defined, no-any-return]
    return tensor.dtype


@contextmanager
def fetched(hooked: Sequence[ModuleHooks], x: Tensor) -> Iterator[Tensor]:
    """Inside the block the tensors of these modules are where their hooks bring them.

    Args:
        hooked: Modules and their hooks, in the order in which PEFT would call the modules.
        x: The input of the layer.

    Yields:
        x where the hooks send it.
    """
    begun: list[tuple[nn.Module, FetchHook]] = []
    try:
        for module, hooks in hooked:
            for hook in hooks:
                (x,), _ = hook.pre_forward(module, x)
                begun.append((module, hook))
        yield x
    finally:
        for module, hook in reversed(begun):
            hook.post_forward(module, None)


def captured_forwards(module: nn.Module, cls: type[nn.Module]) -> Iterator[tuple[Any, str]]:
    """(object, attribute) of each place where the module, or a hook on it, keeps the forward of `cls`."""
    registry = module.__dict__.get("_diffusers_hook")
    places: list[tuple[Any, str]] = [(module, "forward"), (module, "_old_forward")]
    for reference in getattr(registry, "_fn_refs", ()):
        places += [(reference, "forward"), (reference, "original_forward")]
    for holder, name in places:
        function = vars(holder).get(name)
        if getattr(function, "__func__", None) is cls.forward and function.__self__ is module:  # type: ignore[union-attr]
            yield holder, name


def redirect_forwards(module: nn.Module, before: type[nn.Module], after: type[nn.Module]) -> None:
    """Let hooks that found the forward of `before` when they came call the forward of `after`."""
    for holder, name in list(captured_forwards(module, before)):
        vars(holder)[name] = types.MethodType(after.forward, module)


def _is_class_forward(function: Any, module: nn.Module) -> bool:
    """Whether `function` is the forward of the module's class, bound to the module."""
    return (
        getattr(function, "__func__", None) is type(module).forward and function.__self__ is module  # type: ignore[attr-defined]
    )
