"""diffusers fuses to_q, to_k and to_v from their weights alone, which would drop the experts in silence: make
it an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from mole_kernels.errors import MoleStateError
from mole_kernels.modules.scan import uncompiled

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_ATTENTION_METHOD, _MODEL_METHOD = "fuse_projections", "fuse_qkv_projections"


class FuseGuard:
    """Stands in for `fuse_projections` of an attention, or `fuse_qkv_projections` of its model, while layers
    there hold experts.
    """

    def __init__(self, method: str, layers: Iterable[str]) -> None:
        self.method = method
        self.layers = frozenset(layers)

    def __call__(self, *args: object, **kwargs: object) -> None:
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
        module.__dict__[method] = FuseGuard(method, _guarded_here(module, method).union(layers))


def uninstall(places: Iterable[tuple[nn.Module, str, list[str]]]) -> None:
    """Take these layers off their guards; a guard that another handle still needs stays."""
    for module, method, layers in places:
        left = _guarded_here(module, method).difference(layers)
        if left:
            module.__dict__[method] = FuseGuard(method, left)
        else:
            module.__dict__.pop(method, None)


def _guarded_here(module: nn.Module, method: str) -> frozenset[str]:
    guard = module.__dict__.get(method)
    return guard.layers if isinstance(guard, FuseGuard) else frozenset()


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
