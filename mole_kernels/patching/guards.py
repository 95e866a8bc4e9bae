"""Methods of a caller's model that would lose the experts in silence, made to say so while a patch is on.

diffusers fuses to_q, to_k and to_v from their weights alone: an error. `save_pretrained` writes the base
alone: a warning. A block that is compiled by itself first gets the ranks of the other blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from mole_kernels.errors import MoleStateError, MoleWarning
from mole_kernels.modules.scan import uncompiled
from mole_kernels.patching import block_ranks

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_ATTENTION_METHOD, _MODEL_METHOD, _SAVE_METHOD = "fuse_projections", "fuse_qkv_projections", "save_pretrained"
_COMPILE_METHOD = "compile"


class Guard:
    """Replaces one method of a module on the instance, while `layers` below it hold experts.

    The module is kept here and not in a closure, so that a deep copy of the model guards its own methods.
    """

    def __init__(self, module: nn.Module, method: str, layers: Iterable[str]) -> None:
        self.module, self.method = module, method
        self.layers = frozenset(layers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class SaveGuard(Guard):
    """`save_pretrained` of a patched model saves the base, and warns that the experts are not in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"save_pretrained writes the base weights alone: the experts on {len(self.layers)} layers of "
            f"this {type(self.module).__name__} are not in it. handle.save(path) keeps experts and gates, "
            "handle.bake() puts a constant mixture into the weights.",
            MoleWarning,
            stacklevel=2,
        )
        return type(self.module).save_pretrained(self.module, *args, **kwargs)  # type: ignore[attr-defined]


class CompileGuard(Guard):
    """`compile` of a block: first its experts are padded to the ranks of the other blocks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block_ranks.pad([self.module])
        return type(self.module).compile(self.module, *args, **kwargs)


class FuseGuard(Guard):
    """`fuse_projections` of an attention, or `fuse_qkv_projections` of its model, refused."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = min(self.layers)
        raise MoleStateError(
            self.method,
            f"{len(self.layers)} projections hold experts ({first}, …), which fused projections would ignore",
            hint="handle.remove() first; experts and fused projections exclude each other",
        )


def guarded(
    model_roots: Mapping[str, nn.Module], parents: Mapping[str, nn.Module]
) -> list[tuple[nn.Module, str, list[str]]]:
    """(module, method, layers): where guards belong for the patched layers `parents` (path -> the module that
    holds the layer).
    """
    places: dict[tuple[int, str], tuple[nn.Module, str, list[str]]] = {}
    for path, parent in parents.items():
        root = model_roots.get(path.partition(".")[0], model_roots.get(""))
        if root is not None and hasattr(type(root), _SAVE_METHOD):
            places.setdefault((id(root), _SAVE_METHOD), (root, _SAVE_METHOD, []))[2].append(path)
        for block in _blocks(model_roots, path):
            places.setdefault((id(block), _COMPILE_METHOD), (block, _COMPILE_METHOD, []))[2].append(path)
        if path.rpartition(".")[2] not in _PROJECTIONS or not hasattr(parent, _ATTENTION_METHOD):
            continue
        places.setdefault((id(parent), _ATTENTION_METHOD), (parent, _ATTENTION_METHOD, []))[2].append(path)
        # the model's own method fuses one attention after the other: stop it before the first
        for above in _above(model_roots, path):
            if hasattr(above, _MODEL_METHOD):
                places.setdefault((id(above), _MODEL_METHOD), (above, _MODEL_METHOD, []))[2].append(path)
    return list(places.values())


def install(places: Iterable[tuple[nn.Module, str, list[str]]]) -> None:
    for module, method, layers in places:
        module.__dict__[method] = _guard(module, method, _guarded_here(module, method).union(layers))


def uninstall(places: Iterable[tuple[nn.Module, str, list[str]]]) -> None:
    """Take these layers off their guards; a guard that another handle still needs stays."""
    for module, method, layers in places:
        left = _guarded_here(module, method).difference(layers)
        if left:
            module.__dict__[method] = _guard(module, method, left)
        else:
            module.__dict__.pop(method, None)


def _guarded_here(module: nn.Module, method: str) -> frozenset[str]:
    guard = module.__dict__.get(method)
    return guard.layers if isinstance(guard, Guard) else frozenset()


def _guard(module: nn.Module, method: str, layers: Iterable[str]) -> Guard:
    kind = {_SAVE_METHOD: SaveGuard, _COMPILE_METHOD: CompileGuard}.get(method, FuseGuard)
    return kind(module, method, layers)


def _blocks(model_roots: Mapping[str, nn.Module], path: str) -> Iterable[nn.Module]:
    """The members of lists of modules that the layer at `path` lies in: what is compiled block by block."""
    above = list(_above(model_roots, path))
    return [module for outer, module in pairwise(above) if isinstance(outer, nn.ModuleList)]


def _above(model_roots: Mapping[str, nn.Module], path: str) -> Iterable[nn.Module]:
    """The modules on the way from the root down to the layer at `path`, the layer excluded."""
    if "" in model_roots:
        module, names = model_roots[""], path.split(".")
    else:
        component, *names = path.split(".")
        module = model_roots[component]
    yield module
    for name in names[:-1]:
        child = module._modules.get(name)
        if child is None:
            return
        module = uncompiled(child)
        yield module
