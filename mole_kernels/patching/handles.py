"""The handles of a patched model, found again from the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from mole_kernels.modules.scan import roots

if TYPE_CHECKING:
    from mole_kernels.patching.handle import Handle

ATTRIBUTE = "_mole_handles"


class HandleList(list["Handle"]):
    """The handles of the patches on one root module; a copied or pickled model has none of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HandleList:
        return HandleList()

    def __reduce__(self) -> tuple[Any, ...]:
        return HandleList, ()


def handles(model: object) -> tuple[Handle, ...]:
    """The handles of every patch that is on a model now, oldest first.

    Args:
        model: The module or pipeline that was patched, or one that holds it.

    Returns:
        What `patch` returned; empty where nothing is patched, and for a copy of a patched model.

    Raises:
        MoleTypeError: Neither a module nor a pipeline.

    Example:
        >>> mk.patch(pipe, {"face": "face.safetensors"})  # the handle was not kept
        >>> (handle,) = mk.handles(pipe)
    """
    every = [
        handle
        for root in roots(model).values()
        for m in root.modules()
        for handle in vars(m).get(ATTRIBUTE, ())
    ]
    return tuple(dict.fromkeys(every))


def keep(handle: Handle, modules: Iterable[nn.Module]) -> None:
    """Note a handle on the root modules that it patched."""
    for module in modules:
        module.__dict__.setdefault(ATTRIBUTE, HandleList()).append(handle)


def forget(handle: Handle, modules: Iterable[nn.Module]) -> None:
    """Take a removed handle off its root modules."""
    for module in modules:
        left = HandleList(h for h in module.__dict__.get(ATTRIBUTE, ()) if h is not handle)
        if left:
            module.__dict__[ATTRIBUTE] = left
        else:
            module.__dict__.pop(ATTRIBUTE, None)
