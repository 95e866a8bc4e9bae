"""The experts' half of the single-file format: one safetensors file holds a whole bank, exactly.

    expert.<name>.<path>.down [R,K]   expert.<name>.<path>.up [N,R]
    metadata: format "mole_kernels", format_version "1", and `experts`, a JSON list in bank order; for each
    expert its name, the dialect
    it came from, its distinct ranks, its scale with the layers that differ, its convolutions (1x1 by path; of
    larger ones
    [path, height, width]), and its own metadata.

Gates (`io.gates`) may stand in the same file under `gate.`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.experts.checks import checked_lowrank
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.limits import finite, parse_json

FORMAT, VERSION = "mole_kernels", 1
PREFIX = "expert."


def stamp() -> dict[str, str]:
    """The metadata every file of ours carries."""
    return {"format": FORMAT, "format_version": str(VERSION)}


def check_stamp(metadata: Mapping[str, str], source: str) -> None:
    """Refuse what is not ours, and what a later version wrote."""
    if metadata.get("format") != FORMAT:
        raise MoleFileError(
            printable(source),
            "is not a mole_kernels file",
            hint='a LoRA file is given with a name, experts={"face": path}, and '
            "mole_kernels.io.load_expert reads it",
        )
    version = metadata.get("format_version", "")
    if version != str(VERSION):
        raise MoleFileError(
            printable(source),
            expected=f"format version {VERSION}",
            got=printable(version, 20),
            hint="a newer mole_kernels wrote this file",
        )


def tensors_of_experts(experts: Mapping[str, Expert]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that holds these experts, in their order."""
    tensors: dict[str, Tensor] = {}
    records = []
    for name, expert in experts.items():
        expert.check_low_rank(f"a file of expert {name!r}")
        scales = Counter(layer.scale for layer in expert.layers.values())
        usual = scales.most_common(1)[0][0] if scales else 1.0
        for path, layer in expert.layers.items():
            tensors[f"{PREFIX}{name}.{path}.down"] = layer.down
            tensors[f"{PREFIX}{name}.{path}.up"] = layer.up
        records.append(
            {
                "name": name,
                "dialect": expert.dialect,
                "ranks": sorted(expert.ranks()),
                "scale": usual,
                "scales": {
                    path: layer.scale for path, layer in expert.layers.items() if layer.scale != usual
                },
                "conv": [
                    path if layer.conv is True else [path, *layer.kernel]
                    for path, layer in expert.layers.items()
                    if layer.conv
                ],
                "metadata": dict(expert.metadata),
            }
        )
    return tensors, stamp() | {"experts": json.dumps(records)}


def experts_from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str
) -> tuple[dict[str, Expert], dict[str, Tensor]]:
    """(experts by name, tensors that belong to no expert) of a file of ours.

    Args:
        tensors: The file's tensors by key.
        metadata: The header's metadata.
        source: The file, for messages.

    Raises:
        MoleFileError: Not a file of ours, or of a later version.
        MoleKeyError: A tensor of an expert that the metadata do not name, or an expert that lacks a half.
    """
    check_stamp(metadata, source)
    records = _records(metadata, source)
    halves: dict[str, dict[str, dict[str, Tensor]]] = {record["name"]: {} for record in records}
    rest = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            rest[key] = tensor
            continue
        name, _, tail = key.removeprefix(PREFIX).partition(".")
        path, _, half = tail.rpartition(".")
        if name not in halves or half not in ("down", "up") or not path:
            raise MoleKeyError(
                printable(source), f"'{printable(key)}' belongs to no expert that the metadata names"
            )
        halves[name].setdefault(path, {})[half] = tensor
    experts = {record["name"]: _expert(record, halves[record["name"]], source) for record in records}
    return experts, rest


def _expert(record: dict[str, Any], layers: dict[str, dict[str, Tensor]], source: str) -> Expert:
    single = [
        f"{path} ({'no up' if 'down' in half else 'no down'})"
        for path, half in layers.items()
        if len(half) != 2
    ]
    if single:
        raise MoleKeyError(
            printable(source),
            f"expert {record['name']!r} lacks half of {', '.join(map(printable, single[:5]))}",
        )
    conv: dict[str, bool | tuple[int, int]] = {
        entry if isinstance(entry, str) else entry[0]: (
            True if isinstance(entry, str) else (entry[1], entry[2])
        )
        for entry in record["conv"]
    }
    unknown = (set(record["scales"]) | set(conv)) - set(layers)
    if unknown:
        raise MoleKeyError(
            printable(source),
            f"the metadata of expert {record['name']!r} names {printable(sorted(unknown)[0])}, which has "
            "no tensors",
        )
    layers_read = {
        path: checked_lowrank(
            f"{printable(source)}, expert {record['name']!r}, {printable(path)}",
            half["down"],
            half["up"],
            float(record["scales"].get(path, record["scale"])),
            conv.get(path, False),
        )
        for path, half in layers.items()
    }
    expert = Expert(layers_read, dialect=record["dialect"], source=source, metadata=record["metadata"])
    if sorted(expert.ranks()) != record["ranks"]:
        raise MoleFileError(
            printable(source),
            f"expert {record['name']!r}",
            expected=f"ranks {printable(record['ranks'])}",
            got=sorted(expert.ranks()),
        )
    return expert


def _records(metadata: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The metadata's list of experts, every field of the right type."""
    where = f"{printable(source)}, metadata of the experts"
    records = parse_json(metadata.get("experts", "[]"), where, "the text")
    if (
        not isinstance(records, list)
        or not all(isinstance(record, dict) for record in records)
        or len(records) > 1000
    ):
        raise MoleFileError(where, expected="a list of experts", got="something else")
    for record in records:
        right = (
            set(record) == {"name", "dialect", "ranks", "scale", "scales", "conv", "metadata"}
            and isinstance(record["name"], str)
            and isinstance(record["dialect"], str)
            and isinstance(record["ranks"], list)
            and isinstance(record["conv"], list)
            and all(isinstance(entry, str) or _kernel(entry) for entry in record["conv"])
            and isinstance(record["metadata"], dict)
            and all(isinstance(value, str) for value in record["metadata"].values())
            and isinstance(record["scales"], dict)
            and all(finite(scale) for scale in (record["scale"], *record["scales"].values()))
        )
        if not right:
            raise MoleFileError(
                where,
                expected="name, dialect, ranks, scale, scales, conv and metadata of each expert",
                got=printable(record, 200),
            )
    if len({record["name"] for record in records}) != len(records):
        raise MoleFileError(where, "two experts have one name")
    return records


def _kernel(value: object) -> bool:
    """[path, height, width]"""
    return (
        isinstance(value, list)
        and len(value) == 3
        and isinstance(value[0], str)
        and all(type(n) is int and n > 0 for n in value[1:])
    )
