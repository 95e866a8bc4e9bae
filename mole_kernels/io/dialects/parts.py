"""What the last words of an adapter's key say: which part of which family of adapters it holds.

One table for every family: what a part is called stands here, what is computed from it elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

# kinds of adapters, by what their layers are made of
Kind = Literal["lora", "loha", "lokr", "glora", "oft", "boft", "ia3", "full", "norm"]
# who ends keys so; "" where the ending does not tell
Ending = Literal["diffusers", "processor", "kohya", "xlabs", ""]

KINDS: dict[Kind, str] = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "IA3",
    "full": "a full weight difference",
    "norm": "a difference of a norm",
}

_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w2", *_LOHA)
# ending -> (part, kind, who writes it). `*` stands for a PEFT adapter name, `#` for a number, and what stands
# before `|` belongs to the module. The first that fits counts. A part of kind None stands beside any kind.
ENDINGS: tuple[tuple[str, str, Kind | None, Ending], ...] = (
    (".lora_A.weight", "down", "lora", "diffusers"),
    (".lora_B.weight", "up", "lora", "diffusers"),
    (".lora_A.*.weight", "down", "lora", "diffusers"),
    (".lora_B.*.weight", "up", "lora", "diffusers"),
    (".lora.down.weight", "down", "lora", "diffusers"),
    (".lora.up.weight", "up", "lora", "diffusers"),
    (".lora_linear_layer.down.weight", "down", "lora", "diffusers"),
    (".lora_linear_layer.up.weight", "up", "lora", "diffusers"),
    ("_lora1|.down.weight", "down", "lora", "xlabs"),
    ("_lora1|.up.weight", "up", "lora", "xlabs"),
    ("_lora2|.down.weight", "down", "lora", "xlabs"),
    ("_lora2|.up.weight", "up", "lora", "xlabs"),
    (".processor.qkv_lora|.down.weight", "down", "lora", "xlabs"),
    (".processor.qkv_lora|.up.weight", "up", "lora", "xlabs"),
    ("_lora.down.weight", "down", "lora", "processor"),
    ("_lora.up.weight", "up", "lora", "processor"),
    (".lora_down.weight", "down", "lora", "kohya"),
    (".lora_up.weight", "up", "lora", "kohya"),
    (".lora_down.*.weight", "down", "lora", "kohya"),
    (".lora_up.*.weight", "up", "lora", "kohya"),
    (".lora_mid.weight", "mid", "lora", "kohya"),
    (".alpha", "alpha", None, ""),
    (".lora_alpha", "alpha", None, ""),
    # DoRA's norms [N,1] (of rows) or [1,K] (of columns), beside LoRA, LoHa or LoKr
    (".dora_scale", "magnitude", None, ""),
    (".lora_magnitude_vector", "magnitude", "lora", "diffusers"),
    (".lora_magnitude_vector.weight", "magnitude", "lora", "diffusers"),
    (".lora_magnitude_vector.*.weight", "magnitude", "lora", "diffusers"),
    (".lora_magnitude_vector.*", "magnitude", "lora", "diffusers"),
    # β [N]: times the adapter's strength; PEFT's stands inside its scale, as B's own bias
    (".lora_B.bias", "up_bias", "lora", "diffusers"),
    (".lora_B.*.bias", "up_bias", "lora", "diffusers"),
    (".lora.up.bias", "up_bias", "lora", "diffusers"),
    (".lora_up.bias", "up_bias", "lora", "kohya"),
    (".lora_bias", "up_bias", "lora", "diffusers"),
    (".diff_b", "bias", None, ""),
    (".diff", "diff", "full", ""),
    (".w_norm", "diff", "norm", ""),
    (".b_norm", "bias", "norm", ""),
    # a norm's own weight anew, as BFL's control LoRAs have it
    *((f".{norm}|.scale", "set", "norm", "") for norm in ("query_norm", "key_norm")),
    *((f".norm_{norm}|.weight", "set", "norm", "") for norm in ("q", "k", "added_q", "added_k")),
    # LyCORIS; PEFT puts its adapter's name behind
    *((f".hada_{part}", part, "loha", "") for part in _LOHA),
    *((f".hada_{part}.*", part, "loha", "diffusers") for part in _LOHA),
    *((f".lokr_{part}", part, "lokr", "") for part in _LOKR),
    *((f".lokr_{part}.*", part, "lokr", "diffusers") for part in _LOKR),
    *((f".{part}.weight", part, "glora", "") for part in ("a1", "a2", "b1", "b2", "bm", "bm1", "bm2")),
    (".oft_blocks", "blocks", "oft", ""),
    (".oft_blocks.#", "blocks", "oft", "kohya"),
    (".oft_diag", "blocks", "oft", ""),
    (".rescale", "rescale", "oft", ""),
    (".oft_R.weight", "R", "oft", "diffusers"),
    (".oft_R.*.weight", "R", "oft", "diffusers"),
    (".oft_R.*", "R", "oft", "diffusers"),
    (".oft_R", "R", "oft", "diffusers"),
    (".boft_R", "R", "boft", "diffusers"),
    (".boft_R.*", "R", "boft", "diffusers"),
    (".boft_s", "s", "boft", "diffusers"),
    (".boft_s.*", "s", "boft", "diffusers"),
    (".ia3_l", "l", "ia3", "diffusers"),
    (".ia3_l.*", "l", "ia3", "diffusers"),
    (".on_input", "on_input", "ia3", ""),
)


class KeyPart(NamedTuple):
    """What a key says: `part` of an adapter of `kind` (None: of whichever kind its module has) on `module`.

    Attributes:
        module: The module as the file spells it.
        part: The part's word in `ENDINGS`, with the number behind it that `#` stands for.
        kind: The kind of adapter.
        ending: Who ends keys so.
    """

    module: str
    part: str
    kind: Kind | None
    ending: Ending


def _compiled(ending: str) -> re.Pattern[str]:
    module_end, bar, rest = ending.rpartition("|")
    pattern = re.escape(rest).replace(r"\*", r"[^.]+").replace(r"\#", r"(\d+)") + r"\Z"
    return re.compile(f"(?<={re.escape(module_end)}){pattern}" if bar else pattern)


_PATTERNS = tuple((_compiled(ending), part, kind, who) for ending, part, kind, who in ENDINGS)
_ANY = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, *_ in _PATTERNS))

# what a part is called that a layer has beside its kind's own
BESIDE = {
    "magnitude": "DoRA",
    "up_bias": "a LoRA bias",
    "bias": "a full bias difference",
    "set": "full weights of a norm",
    "mid": "a LoCon's core",
    "alpha": "alpha",
}
# parts that are added to what the model has, so that zeros do nothing
ADDED = frozenset({"diff", "bias", "up_bias"})


def adapter_kinds(keys: Iterable[str]) -> list[str]:
    """The kinds of adapters that a file's keys name, as they are called.

    Args:
        keys: The file's keys.
    """
    names: set[str] = set()
    for key in keys:
        part = parse_part(key)
        if part is not None:
            names |= {KINDS[part.kind]} if part.kind else set()
            names |= {BESIDE[part.part]} if part.part in ("magnitude", "bias", "up_bias") else set()
    return sorted(names)


def parse_part(key: str) -> KeyPart | None:
    """The part of an adapter that a key names; None where it ends as no adapter's does."""
    if _ANY.search(key) is None:
        return None
    for pattern, part, kind, ending in _PATTERNS:
        match = pattern.search(key)
        if match and match.start() > 0:
            return KeyPart(key[: match.start()], part + "".join(match.groups()), kind, ending)
    return None
