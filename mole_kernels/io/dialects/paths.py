"""Module paths: flat names cut back into dots, old spellings brought up to date, and the prefixes of kohya
and of PEFT.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from mole_kernels.experts.lowrank import flatten, split_component
from mole_kernels.io.dialects import ldm

# kohya's prefix -> the pipeline's component
KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
}

# LyCORIS used as a library puts this before the flat name of a module of whatever it wrapped
LYCORIS = "lycoris_"

# wrappers that tools put before the path
WRAPPERS = ("base_model.model.",)

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
    return "." not in rest and rest not in ATOMS and rest not in WORDS


def module_path(module: str, dialect: str) -> tuple[str, str]:
    """(dotted path with its component, dialect) of a module as a key spells it.

    dialect  what the key's ending says (`keys.ENDINGS`); the module's own spelling decides between kohya and
             Mix-of-Show
    """
    for prefix, component in KOHYA_PREFIXES.items():
        if module.startswith(prefix):
            return f"{component}.{unflatten(ldm.to_diffusers(module.removeprefix(prefix)))}", "kohya"
    if module.startswith(LYCORIS):
        return unflatten(ldm.to_diffusers(module.removeprefix(LYCORIS))), "kohya"
    for wrapper in WRAPPERS:
        module = module.removeprefix(wrapper)
    if dialect == "processor":
        return _processor_path(module)
    module = module.replace(".processor.", ".")
    return module, "mix_of_show" if dialect == "kohya" else dialect


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
