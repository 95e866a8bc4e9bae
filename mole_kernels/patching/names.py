"""From the name a file gives a layer to the layer of this model, and what to say where there is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from mole_kernels.errors import printable
from mole_kernels.experts.lowrank import Expert, flatten, split_component
from mole_kernels.patching.targets import Scan, denoiser

# a text encoder holds this level in some versions of transformers and not in others
_OPTIONAL_LEVEL = "text_model_"


class Names:
    """Every spelling under which a file may know a layer: dotted or flat, with or without the component."""

    def __init__(self, found: Scan) -> None:
        self.components = found.components
        self._exact: dict[str, str] = {path: path for path in found.all_paths()}
        self._exact |= found.first
        self._flat: dict[str, set[str]] = {}
        for spelling, path in self._exact.items():
            flat = flatten(spelling)
            for name in {flat, flat.replace(_OPTIONAL_LEVEL, "")}:
                self._flat.setdefault(name, set()).add(path)
        self._layers = [*found.layers, *found.patched]

    def find(self, key: str) -> str | None:
        """The one path that `key` names, or None."""
        spellings = self._spellings(key)
        for spelling in spellings:
            if spelling in self._exact:
                return self._exact[spelling]
        for spelling in spellings:
            flat = flatten(spelling)
            for name in (flat, flat.replace(_OPTIONAL_LEVEL, "")):
                paths = self._flat.get(name, set())
                if len(paths) == 1:
                    return next(iter(paths))
        return None

    def nearest(self, key: str, count: int = 2) -> list[str]:
        """Existing layers whose names come closest."""
        close: list[str] = []
        for spelling in self._spellings(key):
            close += difflib.get_close_matches(spelling, self._layers, count, cutoff=0.6)
        return list(dict.fromkeys(close))[:count]

    def _spellings(self, key: str) -> list[str]:
        key = key.replace(".base_layer", "")
        spellings = [key]
        if self.components:
            default = denoiser(self.components)
            if default is not None:
                spellings.append(f"{default}.{key}")
        else:
            component, rest = split_component(key)
            if component is not None:
                spellings.append(rest)
        return spellings


def few(names: Sequence[str], count: int = 3) -> str:
    """The first names and how many more there are, safe to print."""
    shown = ", ".join(printable(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def hint_for(expert: Expert, found: Scan, model: object) -> str:
    """Why a file may fit nothing in this model."""
    theirs, ours = _family_of_expert(expert), _family_of_model(found)
    this = f"this {type(model).__name__} is a {ours}" if ours else f"this is a {type(model).__name__}"
    if theirs is not None and theirs != ours:
        return f"these look like keys of a {theirs}; {this}"
    names = Names(found)
    nearest = names.nearest(next(iter(expert.layers)))
    if nearest:
        return f"nearest layers here: {few(nearest)}"
    if found.layers:
        return f"layers here are called {few(list(found.layers))}"
    return "this model has no nn.Linear or nn.Conv2d that can be patched"


def _family(paths: Iterable[str], text_width: int | None = None) -> str | None:
    """Which model's layers these names look like, or None.

    text_width  K of a cross-attention's to_k, which tells the Stable Diffusion UNets apart where it is a published one
    """
    flat = " ".join(flatten(path) for path in paths)
    for name, signs in _SIGNS:
        if all(sign in flat for sign in signs):
            if name != "Stable Diffusion UNet":
                return name
            by_depth = "SDXL UNet" if "transformer_blocks_1_" in flat else "Stable Diffusion 1 or 2 UNet"
            return {768: "Stable Diffusion 1 UNet", 1024: "Stable Diffusion 2 UNet", 2048: "SDXL UNet"}.get(text_width or 0, by_depth)
    return None


def _family_of_expert(expert: Expert) -> str | None:
    width = next((layer.in_features for path, layer in expert.layers.items() if flatten(path).endswith("attn2_to_k")), None)
    return _family(expert.layers, width)


def _family_of_model(found: Scan) -> str | None:
    layers = {**found.layers, **found.patched}
    width = next((m.in_features for p, m in layers.items() if p.endswith("attn2.to_k") and isinstance(m, nn.Linear)), None)
    return _family(layers, width)


# first match wins; every sign must occur in the flattened names
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Stable Diffusion UNet", ("down_blocks_", "attentions_")),
    ("Stable Diffusion UNet", ("up_blocks_", "attentions_")),
    ("Stable Diffusion UNet", ("mid_block_", "attentions_")),
    ("Stable Diffusion UNet", ("input_blocks_",)),
    ("Stable Diffusion UNet", ("output_blocks_",)),
    ("FLUX transformer", ("single_transformer_blocks_",)),
    ("FLUX transformer", ("double_blocks_",)),
    ("FLUX transformer", ("single_blocks_",)),
    ("Qwen-Image transformer", ("transformer_blocks_", "img_mlp")),
    ("Qwen-Image transformer", ("transformer_blocks_", "img_mod")),
    ("SD3 or FLUX transformer", ("transformer_blocks_", "add_q_proj")),
    ("SD3 transformer", ("joint_blocks_",)),
    ("Wan transformer", ("blocks_", "ffn_net")),
    ("Wan transformer", ("blocks_", "cross_attn")),
    ("text encoder", ("encoder_layers_", "self_attn")),
    ("Z-Image transformer", ("layers_", "attention_to_q")),
)
