"""Which layers of a model can take experts, and why the others cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from mole_kernels.errors import MoleTypeError
from mole_kernels.experts.lowrank import COMPONENTS
from mole_kernels.layers.attach import reason_against_attaching
from mole_kernels.layers.conv import conv_sizes
from mole_kernels.layers.linear import Gated
from mole_kernels.layers.offload import compute_dtype
from mole_kernels.layers.sharded import is_sharded, reason_against_sharded

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# the weight is read past the layer's own forward by these owners, so a patched forward would never run
_OWNERS_READING_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_FUSED_FROM = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass
class Scan:
    """Every named module of a model or pipeline, sorted by whether it can take experts.

    layers     path -> nn.Linear or nn.Conv2d that can be patched
    patched    path -> layers that already hold experts
    skipped    path -> why a linear layer or convolution cannot be patched
    others     path -> any other module (for messages)
    parents    path -> the module that holds the layer
    first      a second path of a shared module -> its first path
    components names of the pipeline's components; () for a bare module
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    patched: dict[str, Gated] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    others: dict[str, nn.Module] = field(default_factory=dict)
    parents: dict[str, nn.Module] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    components: tuple[str, ...] = ()

    def all_paths(self) -> Iterator[str]:
        for part in (self.layers, self.patched, self.skipped, self.others):
            yield from part


# begins the reason against a layer whose weight is quantised
STORED_AS = "its weight is stored as"


def quantised_hint(reasons: Iterable[str]) -> str:
    """What takes LoRAs over a quantised base, where that is among the reasons; else the empty string."""
    if not any(STORED_AS in reason for reason in reasons):
        return ""
    return (
        "over a quantised base: pipe.load_lora_weights(…), then mole_kernels.accelerate(pipe) computes the "
        "LoRAs beside the layers as they are"
    )


def roots(model: object) -> dict[str, nn.Module]:
    """{"": module} for a module, {component: module} for a diffusers pipeline (anything with a `components`
    mapping).
    """
    if isinstance(model, nn.Module):
        return {"": uncompiled(model)}
    components = getattr(model, "components", None)
    if isinstance(components, Mapping):
        scanned = {name: uncompiled(part) for name, part in components.items() if isinstance(part, nn.Module)}
        if scanned:
            return scanned
    raise MoleTypeError("model", expected="an nn.Module or a diffusers pipeline", got=type(model).__name__)


def scan(model: object) -> Scan:
    """Look at every module once; a module that two paths share is kept under the first."""
    scanned, seen = Scan(), dict[int, str]()
    parts = roots(model)
    if "" not in parts:
        scanned.components = tuple(parts)
    for name, root in parts.items():
        for path, module, parent in _walk(root, name, None):
            if seen.setdefault(id(module), path) != path:
                scanned.first[path] = seen[id(module)]
                continue
            if parent is not None:
                scanned.parents[path] = parent
            if isinstance(module, Gated):
                scanned.patched[path] = module
            elif not isinstance(module, nn.Linear | nn.Conv2d):
                scanned.others.setdefault(path, module)
            elif reason := reason_against_layer(module, parent, path.rpartition(".")[2]):
                scanned.skipped[path] = reason
            else:
                scanned.layers[path] = module
    return scanned


def mole_targets(model: object) -> dict[str, nn.Module]:
    """Every nn.Linear and 1x1 nn.Conv2d inside a Transformer2DModel: 192 in SD1.5's UNet, 722 in SDXL's
    (MoLE's choice of layers).
    """
    inside: set[int] = set()
    for root in roots(model).values():
        for module in root.modules():
            if any(cls.__name__ == "Transformer2DModel" for cls in type(module).__mro__):
                inside.update(id(child) for child in module.modules())
    scanned = scan(model)
    return {
        path: module for path, module in (scanned.layers | scanned.patched).items() if id(module) in inside
    }


# what LoRAs of transformers are trained on where nobody says otherwise: all that attention projects
_ATTENTION = re.compile(
    r"(^|[._])(attn|attention|attn[12]|self_attn|cross_attn|self_attention|cross_attention)"
    r"\.((to|add)_(q|k|v|qkv|q_proj|k_proj|v_proj|qkv_mlp_proj)|to_(out\.0|out|add_out)|img_qkv_proj|txt_kv_proj)$"
)


def attention_targets(module: nn.Module) -> dict[str, nn.Module]:
    """The layers by which a transformer's attention projects, by path; {} where none has a known name."""
    return {path: layer for path, layer in scan(module).layers.items() if _ATTENTION.search(path)}


def reason_against_layer(module: nn.Module, parent: nn.Module | None, name: str) -> str | None:
    """Why experts on this linear or convolution would not be exact, or None."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if isinstance(parent, _OWNERS_READING_WEIGHTS):
        return f"{type(parent).__name__} may read its weight without calling it"
    if parent is not None and _is_fused_away(parent, name):
        return "its attention runs fused projections instead; call unfuse_qkv_projections() first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter"
    if is_sharded(weight):
        return reason_against_attaching(module) or reason_against_sharded(module)
    if type(weight) is not nn.Parameter or compute_dtype(module) not in _PLAIN_DTYPES:
        return f"{STORED_AS} {type(weight).__name__}, {str(weight.dtype)[6:]}"
    return reason_against_attaching(module)


def _is_fused_away(owner: nn.Module, name: str) -> bool:
    """diffusers keeps to_q, to_k, to_v beside the fused layer that replaced them."""
    if getattr(owner, "fused_projections", False) is not True:
        return False
    # the older attention class keeps the flag when it is unfused again, and there the processor decides
    if (
        not hasattr(owner, "unfuse_projections")
        and "Fused" not in type(getattr(owner, "processor", None)).__name__
    ):
        return False
    return any(fused in owner._modules and name in parts for fused, parts in _FUSED_FROM.items())


def _walk(
    module: nn.Module, path: str, parent: nn.Module | None
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """(path, module, parent), PEFT layers replaced by the layer they wrap; nothing inside a patched layer."""
    while (inner := module._modules.get("base_layer", module._modules.get("_orig_mod"))) is not None:
        module = inner
    yield path, module, parent
    if isinstance(module, Gated):
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, module)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def denoiser(components: tuple[str, ...]) -> str | None:
    """The component that a file without component names means."""
    return next(
        (name for name in COMPONENTS if name in components and not name.startswith("text_encoder")), None
    )


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, or of a convolution as one over the patches that its pixels see."""
    if isinstance(layer, nn.Conv2d):
        return conv_sizes(layer)[::-1]
    N, K = layer.weight.shape  # type: ignore[union-attr, misc]
    return N, K
