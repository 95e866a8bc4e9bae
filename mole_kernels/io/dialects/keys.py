"""The spellings of a LoRA key: which half of which module, or which thing that is not supported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast, get_args

from mole_kernels.errors import printable
from mole_kernels.io.dialects.parts import Ending, parse_part

Half = Literal["down", "up", "mid", "alpha"]
HALVES: tuple[str, ...] = get_args(Half)

# a part of a key -> what it belongs to. Dropping any of these would change the result in silence.
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.vera_", "VeRA"),
    (r"\.lora_E(?:\.[^.]+)?\Z|\.ranknum(?:\.[^.]+)?\Z", "AdaLoRA"),
    (r"\.hra_u", "HRA"),
    (r"\.fourierft_|\.waveft_", "a spectral adapter (FourierFT, WaveFT)"),
    (r"\.randlora_|\.c3a_kernel|\.bone_|\.miss_block|\.shira_|\.road_theta|\.delora_", "another PEFT method"),
    (r"\.(?:q_layer|p_layer)\.weight\Z|\.lambda_layer\Z", "T-LoRA"),
    (r"\.scalar\Z", "a learned LyCORIS scalar"),
    (r"\.bias_(?:indices|values|size)\Z", "a sparse bias difference"),
    (r"\.lora_embedding_", "an embedding LoRA"),
    (r"\.lora_A(?:\.[^.]+)?\.bias\Z|[._]lora[._]down\.bias\Z", "a bias between the factors"),
    (r"\.diff_m\Z", "a full difference of a modulation"),
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
_ADDED = re.compile(r"\.diff_m\Z|\.bias\Z")


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
    part = parse_part(key)
    if part is None or part.part not in HALVES or part.kind not in ("lora", None):
        return None
    return LoraKey(part.module, cast(Half, part.part), part.ending)


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
