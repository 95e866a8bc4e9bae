"""The spellings of a LoRA key: which half of which module, or which thing that is not supported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from mole_kernels.errors import printable

# ending of a key -> (half, the dialect it speaks); `*` stands for a PEFT adapter name. The first that fits
# counts.
ENDINGS: tuple[tuple[str, str, str], ...] = (
    (".lora_A.weight", "down", "diffusers"),
    (".lora_B.weight", "up", "diffusers"),
    (".lora_A.*.weight", "down", "diffusers"),
    (".lora_B.*.weight", "up", "diffusers"),
    (".lora.down.weight", "down", "diffusers"),
    (".lora.up.weight", "up", "diffusers"),
    (".lora_linear_layer.down.weight", "down", "diffusers"),
    (".lora_linear_layer.up.weight", "up", "diffusers"),
    ("_lora.down.weight", "down", "processor"),
    ("_lora.up.weight", "up", "processor"),
    (".lora_down.weight", "down", "kohya"),
    (".lora_up.weight", "up", "kohya"),
    (".lora_mid.weight", "mid", "kohya"),
    (".alpha", "alpha", ""),
)

# a part of a key -> what it belongs to. Dropping any of these would change the result in silence.
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.lora_magnitude_vector", "DoRA"),
    (r"\.dora_scale", "DoRA"),
    (r"\.lokr_", "LoKr"),
    (r"\.hada_", "LoHa"),
    (r"\.oft_", "OFT"),
    (r"\.boft_", "BOFT"),
    (r"\.ia3_|\.on_input\Z", "IA3"),
    (r"\.vera_", "VeRA"),
    (r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight\Z", "GLoRA"),
    (r"\.scalar\Z", "a learned LyCORIS scalar"),
    (r"\.bias_(?:indices|values|size)\Z", "a sparse bias difference"),
    (r"\.(?:query|key)_norm\.scale\Z|\.norm_(?:added_)?[qk]\.weight\Z", "full weights of a norm"),
    (r"\.lora_embedding_", "an embedding LoRA"),
    (r"\.lora_[AB](\.[^.]+)?\.bias\Z", "a LoRA bias"),
    (r"[._]lora[._](down|up)\.bias\Z", "a LoRA bias"),
    (r"\.diff_b\Z", "a full bias difference"),
    (r"\.diff\Z", "a full weight difference"),
    (r"\.[wb]_norm\Z", "full weights of a norm"),
    (r"\Abundle_emb\.", "an embedding"),
    (r"\Anew_concept_embedding", "an embedding"),
)

_PATTERNS = tuple(
    (re.compile(re.escape(end).replace(r"\*", r"[^.]+") + r"\Z"), half, dialect)
    for end, half, dialect in ENDINGS
)
_UNSUPPORTED = tuple((re.compile(part), what) for part, what in UNSUPPORTED)


class Part(NamedTuple):
    """What a key says: `half` ("down", "up", "mid", "alpha") of `module`, spelled as the file spells it."""

    module: str
    half: str
    dialect: str


def parse_key(key: str) -> Part | None:
    """The part a key names; None where it is no LoRA key."""
    for pattern, half, dialect in _PATTERNS:
        match = pattern.search(key)
        if match and match.start() > 0:
            return Part(key[: match.start()], half, dialect)
    return None


def unsupported(key: str) -> str | None:
    """What a key belongs to that this package does not compute, or None."""
    return next((what for pattern, what in _UNSUPPORTED if pattern.search(key)), None)


def some_keys(keys: Iterable[str], limit: int = 5) -> str:
    """The first few of many keys, quoted and safe to print, and how many more there are."""
    keys = list(keys)
    return ", ".join(f"'{printable(key)}'" for key in keys[:limit]) + (
        f" and {len(keys) - limit} more" if len(keys) > limit else ""
    )
