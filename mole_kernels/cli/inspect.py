"""What is in a file, and what it would match in a model."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from mole_kernels.cli.files import InspectArgs
from mole_kernels.cli.pipelines import named_expert, pipeline_of_name
from mole_kernels.cli.screen import facts, number, out, table
from mole_kernels.errors import MoleError, MoleWarning, printable
from mole_kernels.experts.format import PREFIX, experts_from_tensors
from mole_kernels.experts.lowrank import Expert, LowRank, split_component
from mole_kernels.files.header import printable_metadata
from mole_kernels.files.reader import SafetensorsFile, read_header
from mole_kernels.io.bank import load_bank
from mole_kernels.io.convert import kind_of
from mole_kernels.io.dialects.families import families_of, titles
from mole_kernels.io.dialects.parts import adapter_kinds
from mole_kernels.io.experts import expert_from_tensors
from mole_kernels.io.gates import GateFile, gates_from_tensors, load_gates
from mole_kernels.io.resolve import Pipeline
from mole_kernels.io.source import adapter_name, find_adapter

# bytes: the factors of larger files are not read, so neither norms nor NaN are known of them; above any
# published LoRA
READ_WHOLE = 2**30
_SMALL = 4096
METADATA_SHOWN = 12
UNMATCHED_SHOWN = 10
# what the tables above already say
NOT_SHOWN = ("experts", "gates", "lora_adapter_metadata", "format", "format_version")
# the part of a path that says what kind of layer it is: all that follows the last numbered block
_BLOCK = re.compile(r"^.*(?:blocks|layers|attentions|resnets|samplers)[._]\d+[._]")


def show(asked: InspectArgs) -> None:
    """Print all there is to say of a file; raises MoleError where it is broken or fits the model nowhere."""
    path = asked.file
    kind = kind_of(path)
    experts, gates = _load(path, kind, pipeline_of_name(asked.pipeline))
    if asked.json:
        print(json.dumps(as_data(path, kind, experts, gates), indent=1))
        return
    console = out()
    console.print(facts(_summary(path, kind, experts, gates)), "")
    for group in _tables(experts, gates, asked.layers):
        console.print(group, "")
    _metadata(console, path)
    if asked.model is not None:
        _match(console, asked.model, experts, gates)


def as_data(path: Path, kind: str, experts: dict[str, Expert], gates: GateFile | None) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "file": os.fsdecode(path),
        "kind": kind,
        "experts": {
            name: {
                "dialect": expert.dialect,
                "family": titles(families_of(expert)) or None,
                "strength": expert.strength or None,
                "layers": {
                    layer_path: {
                        "in": layer.in_features,
                        "out": layer.out_features,
                        "rank": layer.rank,
                        "scale": layer.scale,
                        "dtype": str(layer.up.dtype).removeprefix("torch."),
                    }
                    for layer_path, layer in expert.layers.items()
                },
                "families": {layer_path: family.kind for layer_path, family in expert.families.items()},
            }
            for name, expert in experts.items()
        },
        "gates": None
        if gates is None
        else {"experts": list(gates.expert_names), "layers": list(gates.layers)},
    }


def _load(path: Path, kind: str, pipeline: Pipeline) -> tuple[dict[str, Expert], GateFile | None]:
    """The experts and gates of a file; of a file over READ_WHOLE the factors are sizes only, on meta."""
    name = adapter_name(path)
    weights = Path(find_adapter(path).weights)
    large = weights.is_file() and weights.stat().st_size > READ_WHOLE
    if kind == "gates":
        return {}, load_gates(path)
    if not large and kind == "bank":
        bank, gates = load_bank(path)
        return bank.experts, gates
    if not large:
        return {name: named_expert(path, pipeline)}, None
    source = os.fsdecode(path)
    with SafetensorsFile(weights) as file:
        entries, metadata = file.header.entries, file.header.metadata
        big = {
            key
            for key, e in entries.items()
            if e.end - e.begin > _SMALL and (kind != "bank" or key.startswith(PREFIX))
        }
        tensors = file.read([key for key in entries if key not in big])
        tensors |= {
            key: torch.empty(entries[key].shape, dtype=entries[key].dtype, device="meta") for key in big
        }
        # the order of the header is the order of the layers
        tensors = {key: tensors[key] for key in entries}
    if kind == "bank":
        of_bank, rest = experts_from_tensors(tensors, metadata, source)
        return of_bank, gates_from_tensors(rest, metadata, source)
    return {name: expert_from_tensors(tensors, metadata, source)}, None


def _summary(
    path: Path, kind: str, experts: dict[str, Expert], gates: GateFile | None
) -> Iterable[tuple[str, object]]:
    header = read_header(find_adapter(path).weights)
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in header.entries.values()})
    size = sum(entry.end - entry.begin for entry in header.entries.values())
    adapters = ", ".join(adapter_kinds(header.entries)) or "LoRA"
    what = {
        "bank": "single file of mole_kernels",
        "gates": "gates of MoLE",
        "expert": f"one expert ({adapters})",
    }[kind]
    yield "file", path
    yield "is", what
    yield "holds", f"{len(header.entries):,} tensors, {size / 2**20:,.1f} MiB, {', '.join(dtypes)}"
    if experts and size > READ_WHOLE:
        yield "values", f"not read, and not checked for NaN: more than {READ_WHOLE / 2**30:.0f} GiB"
    if experts:
        origins = ", ".join(dict.fromkeys(expert.dialect for expert in experts.values()))
        yield "dialect", f"native; experts from {origins}" if kind == "bank" else origins
        models = dict.fromkeys(titles(families_of(expert)) for expert in experts.values())
        yield "model", ", ".join(model or "not told by its names" for model in models)
        strengths = dict.fromkeys(expert.strength for expert in experts.values())
        yield "strength", ", ".join(strength or "as stored" for strength in strengths)
    elif gates is not None:
        yield (
            "dialect",
            "native" if header.metadata.get("format") == "mole_kernels" else "official (JiePKU/MoLE)",
        )


def _tables(experts: dict[str, Expert], gates: GateFile | None, every: bool) -> Iterable[Group]:
    numbers = ("layers", "rank", "scale", "‖ΔW‖", "parameters")
    if experts:
        rows = [[name, *_totals(expert)] for name, expert in experts.items()]
        yield table(
            "Experts", ("expert", "layers", "in", "rank", "scale", "‖ΔW‖", "parameters"), rows, numbers
        )
    for name, expert in experts.items():
        title = f"Layers of {name}" if len(experts) > 1 else "Layers"
        rows = (
            [[path, *_figures([layer])] for path, layer in expert.layers.items()]
            if every
            else _by_kind(expert)
        )
        columns = (
            ("layer", "K → N", "rank", "scale", "‖ΔW‖")
            if every
            else ("layer", "layers", "K → N", "rank", "scale", "‖ΔW‖")
        )
        yield table(title, columns, rows, numbers)
        if expert.families:
            kinds = Counter(family.kind for family in expert.families.values())
            yield table(
                f"{title}, completed by the base", ("family", "layers"), sorted(kinds.items()), ("layers",)
            )
    if gates is not None:
        yield table(
            "Gates",
            ("expert", "layers", "token gate", "sample gate", "l at x = 0", "G at h = 0"),
            _gate_rows(gates),
        )
        if every:
            halves = [
                (path, ", ".join(f"{name} {list(t.shape)}" for name, t in layer.present().items()))
                for path, layer in gates.layers.items()
            ]
            yield table("Layers of the gates", ("layer", "tensors"), halves)


def _totals(expert: Expert) -> list[object]:
    components = ", ".join(sorted({component or "(no prefix)" for component in expert.components()}))
    layers = list(expert.layers.values())
    parameters = sum(layer.down.numel() + layer.up.numel() for layer in layers)
    _, rank, scale, norm = _figures(layers)
    return [f"{len(layers):,}", components, rank, scale, norm, f"{parameters:,}"]


def _by_kind(expert: Expert) -> list[list[object]]:
    kinds: dict[str, list[LowRank]] = {}
    for path, layer in expert.layers.items():
        component, rest = split_component(path)
        kinds.setdefault(f"{component + ' ' if component else ''}…{_BLOCK.sub('', rest)}", []).append(layer)
    return [[kind, f"{len(layers):,}", *_figures(layers)] for kind, layers in kinds.items()]


def _figures(layers: list[LowRank]) -> list[str]:
    """[sizes, ranks, scales, ‖ΔW‖ over all of them]."""
    sizes = sorted({(layer.in_features, layer.out_features) for layer in layers})
    return [
        _few(f"{k} → {n}" for k, n in sizes),
        _few(str(rank) for rank in sorted({layer.rank for layer in layers})),
        _few(number(scale) for scale in sorted({layer.scale for layer in layers})),
        # four digits are shown; float64 would take seconds at MoLE's ranks
        "—"
        if any(layer.down.is_meta for layer in layers)
        else number(sum(layer.norm(torch.float32) ** 2 for layer in layers) ** 0.5),
    ]


def _few(texts: Iterable[str], most: int = 3) -> str:
    texts = list(dict.fromkeys(texts))
    return ", ".join(texts[:most]) + (f" … {texts[-1]}" if len(texts) > most else "")


def _gate_rows(gates: GateFile) -> list[list[object]]:
    rows: list[list[object]] = []
    for e, name in enumerate(gates.expert_names):
        row: list[object] = [name, f"{len(gates.layers):,}"]
        opens = []
        for weight, bias in (("phi", "phi_bias"), ("head", "head_bias")):
            present = [
                (getattr(layer, weight), getattr(layer, bias))
                for layer in gates.layers.values()
                if getattr(layer, weight) is not None
            ]
            norm = sum(w[e].double().norm().item() ** 2 for w, _ in present) ** 0.5
            row.append(
                f"{len(present):,}, ‖{'Φ' if weight == 'phi' else 'w'}‖ {number(norm)}" if present else "none"
            )
            open_ = torch.stack([b[e].double() for _, b in present]).sigmoid() if present else None
            opens.append(
                "—" if open_ is None else f"{open_.mean():.2f} ({open_.min():.2f} to {open_.max():.2f})"
            )
        rows.append([*row, *opens])
    return rows


def _metadata(console: Any, path: Path) -> None:
    texts = printable_metadata(read_header(find_adapter(path).weights).metadata)
    texts = {key: value for key, value in texts.items() if key not in NOT_SHOWN}
    if not texts:
        return
    rows = list(texts.items())[:METADATA_SHOWN]
    if len(texts) > METADATA_SHOWN:
        rows.append(("…", f"{len(texts) - METADATA_SHOWN} more"))
    console.print(table("Metadata, as the file says it", ("key", "value"), rows), "")


def _match(console: Any, name: str, experts: dict[str, Expert], gates: GateFile | None) -> None:
    """Plan a patch of the model's skeleton, expert by expert, and say what meets what."""
    from mole_kernels.cli.models import skeleton
    from mole_kernels.modules.names import Names
    from mole_kernels.modules.scan import scan, sizes
    from mole_kernels.patching.plan import plan

    model = skeleton(name)
    rows: list[list[object]] = []
    problems: list[MoleError] = []
    left: dict[str, list[str]] = {}
    for label, expert in experts.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MoleWarning)
                left[label] = plan(model, {"expert": expert}, strict=False).unmatched["expert"]
        except MoleError as error:
            rows.append([label, f"0 of {len(expert.layers)}", Text("does not fit", style="red")])
            problems.append(error)
        else:
            rows.append([label, *_score(len(expert.layers), left[label])])
    if gates is not None:
        layers = scan(model)
        names = Names(layers)
        paths = {path: names.find(path) for path in gates.layers}
        left["gates"] = [
            p
            for p, at in paths.items()
            if at not in layers.layers or not _gate_fits(gates.layers[p], *sizes(layers.layers[at]))
        ]
        rows.append(["gates", *_score(len(paths), left["gates"])])
    console.print(table(f"In {name}", ("what", "layers", "matched"), rows))
    for label, keys in left.items():
        if keys:
            more = [f"… and {len(keys) - UNMATCHED_SHOWN} more"] if len(keys) > UNMATCHED_SHOWN else []
            shown = [f"  {printable(text, 300)}" for text in [*keys[:UNMATCHED_SHOWN], *more]]
            console.print()
            console.print(Text("\n".join([f"{printable(label)}, not matched", *shown])), soft_wrap=True)
    if problems:
        raise problems[0]


def _score(count: int, left: list[str]) -> list[object]:
    verdict = Text(f"all but {len(left)}", style="yellow") if left else Text("all", style="green")
    return [f"{count - len(left)} of {count}", verdict]


def _gate_fits(layer: Any, N: int, K: int) -> bool:
    return (layer.phi is None or layer.phi.shape[1] == K) and (layer.head is None or layer.head.shape[1] == N)
