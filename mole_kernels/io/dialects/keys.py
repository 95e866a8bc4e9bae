"""The spellings of a LoRA key: which half of which module, or which thing that is not supported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from mole_kernels.errors import printable

Half = Literal["down", "up", "mid", "alpha"]
# who ends keys so; "" where the ending does not tell
Ending = Literal["diffusers", "processor", "kohya", "xlabs", ""]

# ending of a key -> (half, who writes it); `*` stands for a PEFT adapter name, and what stands before `|`
# belongs to the module. The first that fits counts.
ENDINGS: tuple[tuple[str, Half, Ending], ...] = (
    (".lora_A.weight", "down", "diffusers"),
    (".lora_B.weight", "up", "diffusers"),
    (".lora_A.*.weight", "down", "diffusers"),
    (".lora_B.*.weight", "up", "diffusers"),
    (".lora.down.weight", "down", "diffusers"),
    (".lora.up.weight", "up", "diffusers"),
    (".lora_linear_layer.down.weight", "down", "diffusers"),
    (".lora_linear_layer.up.weight", "up", "diffusers"),
    ("_lora1|.down.weight", "down", "xlabs"),
    ("_lora1|.up.weight", "up", "xlabs"),
    ("_lora2|.down.weight", "down", "xlabs"),
    ("_lora2|.up.weight", "up", "xlabs"),
    ("_lora.down.weight", "down", "processor"),
    ("_lora.up.weight", "up", "processor"),
    (".lora_down.weight", "down", "kohya"),
    (".lora_up.weight", "up", "kohya"),
    (".lora_down.*.weight", "down", "kohya"),
    (".lora_up.*.weight", "up", "kohya"),
    (".lora_mid.weight", "mid", "kohya"),
    (".alpha", "alpha", ""),
    (".lora_alpha", "alpha", ""),
)

# a part of a key -> what it belongs to. Dropping any of these would change the result in silence.
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.lora_magnitude_vector|\.dora_scale|\.lora_magnitude\b", "DoRA"),
    (r"\.lokr_", "LoKr"),
    (r"\.hada_", "LoHa"),
    (r"\.oft_|\.oft_blocks|\.oft_diag", "OFT"),
    (r"\.boft_", "BOFT"),
    (r"\.ia3_|\.on_input\Z", "IA3"),
    (r"\.vera_", "VeRA"),
    (r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight\Z", "GLoRA"),
    (r"\.lora_E(?:\.[^.]+)?\Z|\.ranknum(?:\.[^.]+)?\Z", "AdaLoRA"),
    (r"\.hra_u", "HRA"),
    (r"\.fourierft_|\.waveft_", "a spectral adapter (FourierFT, WaveFT)"),
    (r"\.randlora_|\.c3a_kernel|\.bone_|\.miss_block|\.shira_|\.road_theta|\.delora_", "another PEFT method"),
    (r"\.scalar\Z", "a learned LyCORIS scalar"),
    (r"\.bias_(?:indices|values|size)\Z", "a sparse bias difference"),
    (r"\.(?:query|key)_norm\.scale\Z|\.norm_(?:added_)?[qk]\.weight\Z", "full weights of a norm"),
    (r"\.lora_embedding_", "an embedding LoRA"),
    (r"\.lora_[AB](\.[^.]+)?\.bias\Z|\.lora_bias\Z", "a LoRA bias"),
    (r"[._]lora[._](down|up)\.bias\Z", "a LoRA bias"),
    (r"\.diff_b\Z", "a full bias difference"),
    (r"\.diff_m\Z", "a full difference of a modulation"),
    (r"\.diff\Z", "a full weight difference"),
    (r"\.[wb]_norm\Z", "full weights of a norm"),
    (r"\.set_weight\Z", "a weight that replaces the model's own"),
    (r"\.reshape_weight\Z", "a new shape for one of the model's weights"),
    (r"\.modules_to_save\.|\.original_module\.", "a fully trained module (modules_to_save)"),
    (
        r"\.weight\.(?:absmax|quant_map|quant_state|nested_)|\.(?:qweight|wscales|weight_scale)\Z",
        "a quantised LoRA",
    ),
    (r"\Abundle_emb\.", "an embedding"),
    (r"\Anew_concept_embedding", "an embedding"),
)
# differences and biases: added to what the model has, so that zeros change nothing
_ADDED = re.compile(r"\.diff(?:_[bm])?\Z|\.[wb]_norm\Z|\.bias\Z|\.lora_bias\Z")


def _compiled(ending: str) -> re.Pattern[str]:
    module_end, bar, rest = ending.rpartition("|")
    pattern = re.escape(rest).replace(r"\*", r"[^.]+") + r"\Z"
    return re.compile(f"(?<={re.escape(module_end)}){pattern}" if bar else pattern)


_PATTERNS = tuple((_compiled(ending), half, who) for ending, half, who in ENDINGS)
_UNSUPPORTED = tuple((re.compile(part), what) for part, what in UNSUPPORTED)
_ANY_UNSUPPORTED = re.compile("|".join(f"(?:{part})" for part, _ in UNSUPPORTED))


class LoraKey(NamedTuple):
    """What a key says: `half` of `module`, spelled as the file spells it, with an ending that `ending`
    writes.
    """

    module: str
    half: Half
    ending: Ending


def parse_key(key: str) -> LoraKey | None:
    """The half of a module that a key names; None where it is no LoRA key."""
    for pattern, half, ending in _PATTERNS:
        match = pattern.search(key)
        if match and match.start() > 0:
            return LoraKey(key[: match.start()], half, ending)
    return None


def unsupported(key: str) -> str | None:
    """What a key belongs to that this package does not compute, or None."""
    if _ANY_UNSUPPORTED.search(key) is None:
        return None
    return next(what for pattern, what in _UNSUPPORTED if pattern.search(key))


def is_added(key: str) -> bool:
    """Whether the tensor under this unsupported key is added to the model's own, so that zeros do nothing."""
    return _ADDED.search(key) is not None


def some_keys(keys: Iterable[str], limit: int = 5) -> str:
    """The first few of many keys, quoted and safe to print, and how many more there are."""
    keys = list(keys)
    return ", ".join(f"'{printable(key)}'" for key in keys[:limit]) + (
        f" and {len(keys) - limit} more" if len(keys) > limit else ""
    )
