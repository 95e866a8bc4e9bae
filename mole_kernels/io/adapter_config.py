"""PEFT's settings as diffusers writes them into a file's metadata: alpha, ranks, rsLoRA."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.experts.checks import checked_alpha
from mole_kernels.experts.lowrank import Expert, split_component
from mole_kernels.experts.scales import Convention, alpha_of, scale_of
from mole_kernels.files.limits import parse_json

KEY = "lora_adapter_metadata"
FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
# what a pattern may hold to be read as plain text; PEFT takes patterns as regular expressions, which we do
# not run for a stranger
_PLAIN = re.compile(r"\^?[\w.\\-]+\$?\Z")


@dataclass(frozen=True)
class AdapterConfig:
    """component (None where the file names none) -> PEFT's fields; empty where the file has none of this
    metadata.
    """

    parts: Mapping[str | None, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.parts)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> AdapterConfig:
        """Read `lora_adapter_metadata`; DoRA and biases are refused here, since their tensors might be
        missing.
        """
        if KEY not in metadata:
            return cls()
        where = f"{where}, metadata '{KEY}'"
        found = parse_json(metadata[KEY], where, "the text")
        if not isinstance(found, dict):
            raise MoleFileError(where, expected="a JSON object", got=type(found).__name__)
        parts: dict[str | None, dict[str, Any]] = {}
        for key, value in found.items():
            component, name = split_component(key)
            if name in FIELDS:
                parts.setdefault(component, {})[name] = value
        for part in parts.values():
            _check(part, where)
        return cls(parts)

    def scale(self, path: str, rank: int, where: str) -> float:
        """The scale of one layer: its alpha over its rank, or over √rank; 1 where the file says nothing."""
        component, rest = split_component(path)
        part = self.parts.get(component, self.parts.get(None))
        if part is None:
            return 1.0
        said = _pattern(part.get("rank_pattern", {}), rest, part.get("r"))
        if said is not None and said != rank:
            raise MoleKeyError(
                where, f"the metadata say rank {printable(said, 20)}, the tensors have rank {rank}"
            )
        alpha = _pattern(part.get("alpha_pattern", {}), rest, part.get("lora_alpha"))
        convention: Convention = "rslora" if part.get("use_rslora") else "peft"
        return scale_of(convention, None if alpha is None else checked_alpha(f"{where}, alpha", alpha), rank)


def describe(expert: Expert) -> dict[str, str]:
    """The metadata that makes diffusers and PEFT (and `AdapterConfig`) give each layer its scale; {} where
    every scale is 1.
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


def _check(part: Mapping[str, Any], where: str) -> None:
    if part.get("use_dora") or part.get("lora_bias"):
        raise MoleKeyError(
            where,
            f"the adapter was trained with {'DoRA' if part.get('use_dora') else 'a LoRA bias'}, which is not supported",
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


def _pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the path or, without a leading ^, its dotted ending."""
    for key, value in (pattern or {}).items():
        name = key.replace("\\", "").removesuffix("$")
        if path == name.removeprefix("^") or path.endswith(f".{name}"):
            return value
    return default
