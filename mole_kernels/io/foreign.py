"""Files of models other than Stable Diffusion: diffusers knows their dialects, through each pipeline's public
`lora_state_dict`.

Its converters are asked the way that loses nothing: alphas are taken out of the file first and given back
exactly, names that only one of
its spellings covers are spelled so, text encoders go by our own tables, and what comes out must weigh as much
as what went in.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, printable
from mole_kernels.experts.checks import checked_alpha
from mole_kernels.experts.lowrank import flatten
from mole_kernels.io.dialects.families import FAMILIES, UNETS, families, titles
from mole_kernels.io.dialects.keys import parse_key, some_keys
from mole_kernels.io.dialects.paths import unflatten

# a bare denoiser's class -> the pipeline whose files fit it
DENOISERS = {
    "FluxTransformer2DModel": "FluxPipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "ZImageTransformer2DModel": "ZImagePipeline",
    "WanTransformer3DModel": "WanPipeline",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoPipeline",
    "Lumina2Transformer2DModel": "Lumina2Pipeline",
}
# keys that only a converter understands
FOREIGN = re.compile(
    r"lora_unet_|(?:base_model\.model\.|model\.)?diffusion_model\.|(?:base_model\.model\.)?(?:double|single|joint)_blocks\."
)
WRAPPERS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")
KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", "alpha": ".alpha"}
DOTTED = KOHYA | {"down": ".lora_A.weight", "up": ".lora_B.weight"}
# B in any spelling, xlabs' among them
UP = re.compile(r"(?:lora_B(?:\.[^.]+)?|lora_up|\.up)\.weight\Z")
TEXT_KEYS = re.compile(r"lora_te[123]?_")

# parts of the names of FLUX's and Wan's own code that hold an underscore, or none
BFL_PARTS = (
    "double_blocks",
    "single_blocks",
    "img_attn",
    "txt_attn",
    "img_mlp",
    "txt_mlp",
    "img_mod",
    "txt_mod",
    "qkv",
    "proj",
    "lin",
    "linear",
    "linear1",
    "linear2",
    "modulation",
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "in_layer",
    "out_layer",
    "final_layer",
    "adaLN_modulation",
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)
WAN_PARTS = (
    "blocks",
    "self_attn",
    "cross_attn",
    "q",
    "k",
    "v",
    "o",
    "k_img",
    "v_img",
    "ffn",
    "time_projection",
    "time_embedding",
    "text_embedding",
    "head",
    "img_emb",
    "proj",
)
BFL_ROOT = re.compile(
    r"(?:(?:double|single)_blocks|(?:double|single)_stream_modulation(?:_img|_txt)?|(?:img|txt|time|vector|guidance)_in|final_layer)\b"
)


def needs_pipeline(pipeline: Any) -> bool:
    """Whether this pipeline's files are read by diffusers' converter; those of UNet pipelines are read by our
    own tables.
    """
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    if not hasattr(cls, "lora_state_dict"):
        raise MoleTypeError(
            "load_expert, pipeline", expected="a diffusers pipeline with lora_state_dict", got=cls.__name__
        )
    return "unet" not in getattr(cls, "_lora_loadable_modules", ())


def pipeline_for(model: object) -> type | None:
    """The pipeline class whose LoRA files fit this bare denoiser, or None for a module that diffusers does
    not know.
    """
    # inside torch.compile's wrapper
    model = getattr(model, "_orig_mod", model)
    for cls in type(model).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in DENOISERS:
            return getattr(importlib.import_module("diffusers"), DENOISERS[cls.__name__])
    return None


def pipeline_of_file(tensors: Mapping[str, Any], where: str) -> type | None:
    """The pipeline class that the keys tell, None where no converter is needed; where they do not tell, all
    candidates are named.
    """
    if not any(FOREIGN.match(key) for key in tensors):
        return None
    layers = {}
    for key, tensor in tensors.items():
        part = parse_key(key)
        if not TEXT_KEYS.match(key) and (
            key.endswith(".down.weight") if part is None else part.half == "down"
        ):
            layers[_bare(key if part is None else part.module)] = tensor.shape[1]
    found = families(layers)
    by_pipeline = {FAMILIES[name].pipeline: name for name in found}
    if len(by_pipeline) != 1:
        raise MoleKeyError(
            where,
            f"its dialect cannot be told: these keys are those of a {titles(found)}"
            if found
            else "its dialect is not known",
            hint="give the pipeline or its class: load_expert(path, pipeline=diffusers.FluxPipeline)",
        )
    (name,) = by_pipeline
    if name is None:
        return None
    if importlib.util.find_spec("diffusers") is None:
        raise MoleStateError(
            where,
            f"its names are those of a {titles(found)}, which diffusers converts",
            hint="pip install diffusers",
        )
    return getattr(importlib.import_module("diffusers"), name)


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a known model that only a converter brings into diffusers' names."""
    modules = {
        _bare(key if (part := parse_key(key)) is None else part.module): None
        for key in keys
        if FOREIGN.match(key)
    }
    found = families(modules)
    return bool(found) and not set(found) & UNETS


def convert_with_pipeline(tensors: Mapping[str, Any], pipeline: Any, where: str) -> dict[str, Any]:
    """The tensors under diffusers' keys, alphas as `<path>.alpha`. Raises MoleKeyError where anything would
    be lost.
    """
    cls: Any = pipeline if isinstance(pipeline, type) else type(pipeline)
    mixins = {base.__name__ for base in cls.__mro__}
    text = {_text_key(key, mixins): value for key, value in tensors.items() if TEXT_KEYS.match(key)}
    given = {_respelled(key, mixins): value for key, value in tensors.items() if not TEXT_KEYS.match(key)}
    if not given:
        return text
    given, scale = _without_alphas(given, where)
    with _listening() as said:
        try:
            state = cls.lora_state_dict(dict(given))
        # the converters raise whatever their asserts and look-ups raise
        except Exception as error:
            raise MoleKeyError(
                where,
                f"{cls.__name__}.lora_state_dict cannot read it ({type(error).__name__}: {printable(error, 300)})",
                hint=_made_for(tensors, cls.__name__),
            ) from error
    state = dict(state[0] if isinstance(state, tuple) else state)
    _check_nothing_lost(given, state, said, cls.__name__, where)
    _swap_halves(state, given, mixins)
    alphas = {}
    if scale is not None:
        for key, tensor in state.items():
            part = parse_key(key)
            if part is not None and part.half == "down":
                alphas[f"{part.module}.alpha"] = scale * tensor.shape[0]
    return {**{key: value for key, value in state.items() if not key.endswith(".alpha")}, **alphas, **text}


def _without_alphas(tensors: Mapping[str, Any], where: str) -> tuple[dict[str, Any], float | None]:
    """The tensors without alphas (or with each as its rank), and the one scale of all layers that they had;
    None where there is no alpha.

    Where scales differ, they go into B (one rounding in B's dtype) and the scale is 1.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in tensors:
        part = parse_key(key)
        if part is not None:
            halves.setdefault(part.module, {})[part.half] = key
    scales = {}
    for module, keys in halves.items():
        if "down" in keys and "up" in keys:
            alpha = tensors[keys["alpha"]] if "alpha" in keys else None
            rank = tensors[keys["down"]].shape[0]
            scales[module] = (
                None
                if alpha is None
                else checked_alpha(f"{where}, '{printable(keys['alpha'])}'", alpha) / max(rank, 1)
            )
    if all(scale is None for scale in scales.values()):
        return dict(tensors), None
    changed = dict(tensors)
    # the one converter that cannot do without them
    needed = any(key.startswith("lora_transformer_") for key in tensors)
    alike = len(set(scales.values())) == 1
    for module, scale in scales.items():
        keys = halves[module]
        if not alike and scale not in (None, 1.0):
            up = tensors[keys["up"]]
            changed[keys["up"]] = (up.to(torch.promote_types(up.dtype, torch.float32)) * scale).to(up.dtype)
        if scale is not None and needed:
            changed[keys["alpha"]] = torch.tensor(float(tensors[keys["down"]].shape[0]))
        elif scale is not None:
            del changed[keys["alpha"]]
    return changed, next(iter(scales.values())) if alike else 1.0


def _check_nothing_lost(
    given: Mapping[str, Any], state: Mapping[str, Any], said: list[str], name: str, where: str
) -> None:
    """Converters rename, split and permute B, none of which changes ‖B‖ over the file; a layer left out
    does.
    """
    before, after = _weight(given), _weight(state)
    if math.isfinite(before) and abs(before - after) > 1e-5 * before:
        why = f", saying: {printable(said[0], 300)}" if said else ""
        raise MoleKeyError(
            where,
            f"{name}.lora_state_dict leaves out some of its {len(given)} keys{why}",
            hint=_made_for(given, name, "leaving them out would change the result"),
        )
    strangers = [key for key in state if parse_key(key) is None]
    if strangers:
        raise MoleKeyError(where, f"{name}.lora_state_dict does not know {some_keys(strangers)}")


def _weight(tensors: Mapping[str, Any]) -> float:
    """‖B‖² over the file."""
    ups = [t for key, t in tensors.items() if UP.search(key) and isinstance(t, Tensor)]
    return sum(up.detach().to(torch.float64).square().sum().item() for up in ups)


def _swap_halves(state: dict[str, Any], given: Mapping[str, Any], mixins: set[str]) -> None:
    """FLUX's code has (shift, scale) in its last norm, diffusers (scale, shift): of FLUX.2 files its
    converter (0.42) leaves it so.
    """
    if "Flux2LoraLoaderMixin" in mixins and any("final_layer.adaLN_modulation" in key for key in given):
        key = "transformer.norm_out.linear.lora_B.weight"
        state[key] = torch.cat(state[key].chunk(2)[::-1])


def _bare(module: str) -> str:
    for wrapper in (*WRAPPERS, "lora_unet_", "transformer."):
        module = module.removeprefix(wrapper)
    return module


def _text_key(key: str, mixins: set[str]) -> str:
    """kohya numbers text encoders by kind: the third is T5, which is a FLUX pipeline's second."""
    return key.replace("lora_te3_", "lora_te2_", 1) if "FluxLoraLoaderMixin" in mixins else key


def _respelled(key: str, mixins: set[str]) -> str:
    """The spelling of a key that the converter reads whole: kohya's for FLUX.1, dotted names for FLUX.2 and
    Wan.
    """
    part = parse_key(key)
    if part is None:
        return key
    bare = _bare(part.module)
    if "FluxLoraLoaderMixin" in mixins:
        if (
            BFL_ROOT.match(bare)
            and ".processor." not in part.module
            and not part.module.startswith("lora_unet_")
        ):
            return f"lora_unet_{flatten(bare)}{KOHYA[part.half]}"
    elif (
        "Flux2LoraLoaderMixin" in mixins
        or "WanLoraLoaderMixin" in mixins
        or "SkyReelsV2LoraLoaderMixin" in mixins
    ):
        if part.module.startswith("lora_unet_"):
            return f"diffusion_model.{unflatten(bare, WAN_PARTS if 'Flux2LoraLoaderMixin' not in mixins else BFL_PARTS)}{DOTTED[part.half]}"
        if part.module == bare and BFL_ROOT.match(bare):
            return f"diffusion_model.{bare}{DOTTED[part.half]}"
    return key


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What diffusers' converters warn of, instead of on the screen."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, listener = logging.getLogger("diffusers.loaders.lora_conversion_utils"), Listener(logging.WARNING)
    propagate, log.propagate = log.propagate, False
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)
        log.propagate = propagate


def _made_for(
    tensors: Mapping[str, Any], name: str, otherwise: str = "is this file for another model?"
) -> str:
    """The hint of a file that a converter refuses: what its keys look like."""
    layers: dict[str, int | None] = {
        _bare(part.module): None for key in tensors if (part := parse_key(key)) is not None
    }
    found = families(layers)
    if not found or name in {FAMILIES[one].pipeline for one in found}:
        return otherwise
    return f"these look like keys of a {titles(found)}; this is a {name}"
