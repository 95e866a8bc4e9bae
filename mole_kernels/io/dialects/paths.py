"""Module paths: flat names cut back into dots, old spellings brought up to date, and the prefixes of kohya
and of PEFT.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from mole_kernels.experts.lowrank import COMPONENTS, flatten, split_component
from mole_kernels.io.dialects import ldm
from mole_kernels.io.dialects.keys import Ending
from mole_kernels.io.dialects.own import classes_with_layers

# what tools put before a path -> the pipeline's component ("": its denoiser, whatever that is called there).
# The first that fits counts; what follows is flat after an underscore, and dotted after a dot.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", ""),
    ("lora_transformer_", ""),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    ("model.diffusion_model.", ""),
    ("diffusion_model.", ""),
    ("pipe.dit.", ""),
    *((f"{component}.", component) for component in COMPONENTS),
)
# LyCORIS used as a library puts this before the flat name of a module of whatever it wrapped
LYCORIS = "lycoris_"
# wrappers of one module, which say nothing of what it is
WRAPPERS = ("base_model.model.", "_orig_mod.")
# parts that wrappers of inner modules add to a path
_INNER = re.compile(r"\.(?:base_layer|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|\Z)")

# parts of a module path that hold an underscore themselves; every other underscore of a flat name was a dot
ATOMS = (
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "proj_in",
    "proj_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "to_qkv",
    "time_emb_proj",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "text_projection",
)
WORDS = (
    "attentions",
    "resnets",
    "downsamplers",
    "upsamplers",
    "attn1",
    "attn2",
    "ff",
    "net",
    "proj",
    "conv",
    "conv1",
    "conv2",
    "encoder",
    "layers",
    "mlp",
    "fc1",
    "fc2",
)
UNET_PARTS = (*ATOMS, *WORDS)
# what T5 and the language models among text encoders add
TEXT_PARTS = (
    *UNET_PARTS,
    "block",
    "layer",
    "SelfAttention",
    "DenseReluDense",
    *("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
    *("model", "gate_proj", "up_proj", "down_proj"),
)

# before PEFT, attention processors held the LoRA, under names of their own
PROCESSOR = {"to_out": "to_out.0"}
PROCESSOR_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@functools.lru_cache(maxsize=16)
def _token(parts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(sorted((*parts, r"\d+"), key=len, reverse=True)) + r")(?:_|\Z)")


def unflatten(flat: str, known: tuple[str, ...] = UNET_PARTS) -> str:
    """down_blocks_0_attentions_1_proj_in -> down_blocks.0.attentions.1.proj_in; a name with an unknown part
    stays flat.
    """
    token, parts, position = _token(known), [], 0
    while position < len(flat):
        match = token.match(flat, position)
        if match is None:
            return flat
        parts.append(match.group(1))
        position = match.end()
    return flat if flat.endswith("_") else ".".join(parts)


def stayed_flat(path: str) -> bool:
    """Whether a path read from a kohya file is one flat name that the tables could not cut."""
    rest = split_component(path)[1]
    return "." not in rest and rest not in ATOMS and rest not in WORDS and not classes_with_layers((rest,))


class Spelled(NamedTuple):
    """A module's name without what a tool put before it.

    Attributes:
        component: The pipeline's component; "" for its denoiser, None where the name does not say.
        rest: What follows, flat or dotted.
        flat: Whether the prefix is one that flat names have.
        prefix: What was taken off, wrappers left out.
    """

    component: str | None
    rest: str
    flat: bool
    prefix: str


@functools.lru_cache(maxsize=8192)
def spelled(module: str) -> Spelled:
    """Take wrappers and one tool's prefix off a module's name."""
    name = _unwrapped(_INNER.sub("", module))
    for prefix, component in PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            rest = _unwrapped(name.removeprefix(prefix))
            return Spelled(component, rest, prefix.endswith("_"), prefix)
    if name.startswith(LYCORIS):
        return Spelled(None, name.removeprefix(LYCORIS), True, LYCORIS)
    return Spelled(None, name, False, "")


def _unwrapped(name: str) -> str:
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(wrapper)
    return name


def module_path(module: str, ending: Ending) -> tuple[str, str]:
    """(dotted path with its component, dialect) of a module as a key spells it, by the tables of UNets and
    text encoders; a name that they do not hold stays as it is.

    Args:
        module: The module's name in the file.
        ending: Who ends keys so (`keys.ENDINGS`); the module's own spelling decides between kohya and
            Mix-of-Show.
    """
    name = spelled(module)
    component = "unet" if name.component == "" else name.component
    if name.flat or (name.component == "" and ldm.is_ldm(flatten(name.rest))):
        known = TEXT_PARTS if component and component.startswith("text_encoder") else UNET_PARTS
        rest, dialect = unflatten(ldm.to_diffusers(flatten(name.rest)), known), "kohya"
    elif name.component == "" and unflatten(flatten(name.rest)) == name.rest:
        rest, dialect = name.rest, ending
    elif name.component == "":
        # what the tables do not hold keeps its prefix: a converter may read it
        return f"{name.prefix}{name.rest}", ending
    elif ending == "processor":
        rest, dialect = _processor_path(name.rest)
    else:
        rest, dialect = name.rest.replace(".processor.", "."), "mix_of_show" if ending == "kohya" else ending
    return (f"{component}.{rest}" if component else rest), dialect


def _processor_path(module: str) -> tuple[str, str]:
    """`….attn1.processor.to_q` and `….self_attn.to_q` of old diffusers; `….attn1.to_q`, `….to_out.0` of
    Mix-of-Show.
    """
    head, dot, last = module.rpartition(".")
    old = head.endswith(".processor")
    text = head.endswith(".self_attn")
    table = PROCESSOR_TEXT if text else PROCESSOR
    dialect = "diffusers" if old or (text and last in PROCESSOR_TEXT) else "mix_of_show"
    return f"{head.removesuffix('.processor')}{dot}{table.get(last, last)}", dialect


def looks_like_sdxl(paths: Iterable[str]) -> bool:
    """SDXL's transformers are deeper than one block, and it has two text encoders; SD 1.x and 2.x have
    neither.
    """
    return any(
        path.startswith("text_encoder_2.") or re.search(r"transformer_blocks[._][1-9]", path)
        for path in paths
    )


def kohya_name(path: str, *, sdxl: bool, prefix: str = "lora_") -> str | None:
    """lora_unet_<flat> of a dotted path, with LDM's block names for SDXL; None for a component that kohya's
    scheme lacks.
    """
    component, rest = split_component(path)
    if component in (None, "unet"):
        flat = flatten(rest)
        return f"{prefix}unet_{ldm.to_ldm(flat) if sdxl else flat}"
    if component == "text_encoder":
        return f"{prefix}{'te1' if sdxl else 'te'}_{flatten(rest)}"
    if component == "text_encoder_2":
        return f"{prefix}te2_{flatten(rest)}"
    return None
