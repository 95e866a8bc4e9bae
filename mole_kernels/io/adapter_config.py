"""PEFT's settings of an adapter, from an `adapter_config.json` or from a file's header: alpha, ranks, rsLoRA,
and all that changes what the factors mean.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.experts.checks import checked_alpha
from mole_kernels.experts.lowrank import Expert, is_denoiser, split_component
from mole_kernels.experts.scales import Convention, alpha_of, scale_of
from mole_kernels.files.limits import MAX_HEADER, parse_json
from mole_kernels.files.text import read_text

# where diffusers, and trainers that follow it, keep PEFT's settings in a header
KEY = "lora_adapter_metadata"
HEADER_KEYS = (KEY, "adapter_config", "peft_config", "lora_config")
FILE = "adapter_config.json"
# what other trainers call PEFT's fields
_ALIASES = {
    "rank": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "network_alpha": "lora_alpha",
    "network_dim": "r",
}
# settings that say nothing of what the saved factors mean
_HARMLESS = frozenset(
    (
        "r lora_alpha rank_pattern alpha_pattern use_rslora peft_type auto_mapping base_model_name_or_path "
        "revision "
        "task_type inference_mode peft_version lora_dropout fan_in_fan_out bias init_lora_weights "
        "target_modules "
        "exclude_modules layers_to_transform layers_pattern megatron_config megatron_core runtime_config "
        "loftq_config "
        "eva_config corda_config lora_ga_config ensure_weight_tying qalora_group_size "
        "use_dora lora_bias use_effective_conv2d use_cayley_neumann"
    ).split()
)
# PEFT's methods that are computed here
_KINDS = frozenset({"LORA", "LOHA", "LOKR", "OFT", "IA3"})
# a setting that is on -> what the adapter was trained with
_REFUSED = {
    "coft": "constrained OFT, which projects its blocks at each call",
    "modules_to_save": "whole modules beside the factors (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "factors of bare parameters (target_parameters)",
}
# starts that leave the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA)
# take something from them, so that the factors fit the changed base alone
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "true", "false")
# what a pattern may hold to be read as plain text; PEFT takes patterns as regular expressions, which are not
# run on untrusted input
_PLAIN = re.compile(r"\^?[\w.\\-]+\$?\Z")


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's settings of one file.

    Attributes:
        parts: Component (None where the settings name none) -> PEFT's fields; empty where there are none.
        origin: Where they stand, for messages and for `inspect`.
    """

    parts: Mapping[str | None, Mapping[str, Any]] = field(default_factory=dict)
    origin: str = ""

    def __bool__(self) -> bool:
        return bool(self.parts)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> AdapterConfig:
        """The settings in a file's header: JSON under `lora_adapter_metadata` and its like, or plain fields.

        Args:
            metadata: The header's metadata.
            where: The file, for messages.

        Raises:
            MoleFileError: Settings that are no JSON object, or of wrong types.
            MoleKeyError: Settings of another method, or of one that is not supported.
        """
        for key in HEADER_KEYS:
            text = metadata.get(key)
            if text is not None and (key == KEY or text.lstrip().startswith("{")):
                return cls.from_json(text, f"{where}, metadata '{key}'", f"'{key}' in the header")
        if fields := _plain_fields(metadata):
            return cls.from_json(json.dumps(fields), f"{where}, metadata", "alpha in the header")
        return cls()

    @classmethod
    def from_json(cls, text: str, where: str, origin: str) -> AdapterConfig:
        """The settings that a JSON object holds; `component.field` and plain field names alike."""
        fields = parse_json(text, where, "the text")
        if not isinstance(fields, dict):
            raise MoleFileError(where, expected="a JSON object", got=type(fields).__name__)
        parts: dict[str | None, dict[str, Any]] = {}
        for key, value in fields.items():
            component, name = split_component(key)
            parts.setdefault(component, {})[_ALIASES.get(name, name)] = value
        for part in parts.values():
            _check(part, where)
        return cls(parts, origin)

    @classmethod
    def from_file(cls, path: str, where: str) -> AdapterConfig:
        """The settings of an `adapter_config.json`."""
        return cls.from_json(read_text(path, MAX_HEADER), f"{where}, {FILE}", f"{FILE} beside the file")

    def scale(self, path: str, rank: int, where: str) -> float:
        """The scale of one layer: its alpha over its rank, or over √rank; 1 where the settings do not say.

        Args:
            path: The layer as the file spells it, with its component where the file names one.
            rank: The rank of its factors.
            where: File and layer, for messages.

        Raises:
            MoleKeyError: The settings give the layer another rank.
        """
        component, rest = split_component(path)
        part = self._part(component)
        if part is None:
            return 1.0
        expected = self.rank(path) or None
        if expected is not None and expected != rank:
            raise MoleKeyError(
                where, f"the metadata say rank {printable(expected, 20)}, the tensors have rank {rank}"
            )
        alpha = _match(part.get("alpha_pattern"), (rest, path), part.get("lora_alpha"))
        convention: Convention = "rslora" if part.get("use_rslora") else "peft"
        return scale_of(convention, None if alpha is None else checked_alpha(f"{where}, alpha", alpha), rank)

    def rank(self, path: str) -> int:
        """The rank that the settings give a layer; 0 where they do not say.

        Args:
            path: The layer as the file spells it, with its component where the file names one.
        """
        component, rest = split_component(path)
        part = self._part(component) or {}
        rank = _match(part.get("rank_pattern"), (rest, path), part.get("r"))
        return rank if type(rank) is int else 0

    def settings(self) -> Mapping[str, Any]:
        """PEFT's fields of the file's only component; empty where there are none, or several."""
        return next(iter(self.parts.values())) if len(self.parts) == 1 else {}

    def not_targeted(self, paths: Iterable[str]) -> list[str]:
        """The layers that PEFT would not give factors, by the settings' own list of targets."""
        left_out = []
        for path in paths:
            component, rest = split_component(path)
            targets = (self._part(component) or {}).get("target_modules")
            if isinstance(targets, list) and not any(_ends(path, t) or _ends(rest, t) for t in targets):
                left_out.append(path)
        return left_out

    def _part(self, component: str | None) -> Mapping[str, Any] | None:
        if component in self.parts or None in self.parts:
            return self.parts.get(component, self.parts.get(None))
        # a denoiser is called by several names
        if is_denoiser(component):
            return next((part for name, part in self.parts.items() if is_denoiser(name)), None)
        return None


def adapter_metadata(expert: Expert) -> dict[str, str]:
    """The header's metadata that make diffusers and PEFT (and `AdapterConfig`) give each layer its scale; {}
    where every scale is 1.
    """
    if all(layer.scale == 1.0 for layer in expert.layers.values()):
        return {}
    fields: dict[str, Any] = {}
    for component in sorted(expert.components(), key=str):
        layers = {
            split_component(p)[1]: layer
            for p, layer in expert.layers.items()
            if split_component(p)[0] == component
        }
        ranks = {path: layer.rank for path, layer in layers.items()}
        alphas = {path: alpha_of("peft", layer.scale, layer.rank) for path, layer in layers.items()}
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        prefix = f"{component}." if component else ""
        fields |= {
            f"{prefix}r": r,
            f"{prefix}lora_alpha": alpha,
            f"{prefix}rank_pattern": {f"^{path}": n for path, n in ranks.items() if n != r},
            f"{prefix}alpha_pattern": {f"^{path}": a for path, a in alphas.items() if a != alpha},
            f"{prefix}target_modules": sorted(layers),
        }
    return {KEY: json.dumps(fields, sort_keys=True)}


def is_strength_key(key: str) -> bool:
    """Whether metadata under this key say how strong the factors are, and must not outlive a change."""
    return key in (*HEADER_KEYS, *_ALIASES, "r", "lora_alpha", "use_rslora", "ss_network_alpha")


def _check(part: Mapping[str, Any], where: str) -> None:
    kind = part.get("peft_type")
    if kind is not None and str(kind).rpartition(".")[2].upper() not in _KINDS:
        raise MoleKeyError(
            where, f"the adapter is of PEFT's type {printable(kind, 40)}, which is not supported"
        )
    for name, value in part.items():
        what = _REFUSED.get(name)
        if what is None and name not in _HARMLESS and name.startswith("use_"):
            what = f"the setting {printable(name, 60)}"
        if what is None and name not in _HARMLESS and name.endswith("_config"):
            what = f"the setting {printable(name, 60)}"
        if what is not None and value:
            raise MoleKeyError(where, f"the adapter was trained with {what}, which is not supported")
    if part.get("bias") not in (None, "none", False):
        raise MoleKeyError(
            where,
            f"the adapter was trained with the base's biases (bias='{printable(part['bias'], 20)}'), which "
            "is not supported",
        )
    start = part.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise MoleKeyError(
            where,
            f"the adapter began with init_lora_weights='{printable(start, 40)}', which changes the base's "
            "weights",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = part.get(name) or {}
        if not isinstance(pattern, dict):
            raise MoleFileError(where, expected=f"{name} as a JSON object", got=type(pattern).__name__)
        for key in pattern:
            if not _PLAIN.match(key):
                raise MoleFileError(
                    where,
                    f"the {name} '{printable(key)}' is a regular expression",
                    hint="only plain module names are read here",
                )
    if part.get("r") is not None and type(part["r"]) is not int:
        raise MoleFileError(where, expected="r as a whole number", got=printable(part["r"], 40))


def _match(pattern: Mapping[str, Any] | None, paths: tuple[str, str], default: Any) -> Any:
    """PEFT's rule: the first key that is the path or, without a leading ^, its dotted ending."""
    for key, value in (pattern or {}).items():
        name = key.replace("\\", "").removesuffix("$")
        if any(path == name.removeprefix("^") or _ends(path, name) for path in paths):
            return value
    return default


def _ends(path: str, name: object) -> bool:
    return path == name or path.endswith(f".{name}")


def _plain_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """r, lora_alpha and use_rslora that stand in the header one by one, as texts of numbers."""
    fields: dict[str, Any] = {}
    for key in ("r", "rank", "lora_rank", "lora_alpha", "network_alpha", "alpha", "use_rslora"):
        try:
            fields.setdefault(_ALIASES.get(key, key), json.loads(metadata[key].lower()))
        except (KeyError, ValueError):
            continue
    numbers = type(fields.get("lora_alpha")) in (int, float) and type(fields.get("r", 1)) is int
    # a bare alpha may be anything unless a rank stands beside it
    return fields if numbers and ("lora_alpha" in metadata or "r" in fields) else {}
