"""What a patch would do to a model, checked to the last shape before anything is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from mole_kernels.errors import (
    MoleKeyError,
    MoleShapeError,
    MoleStateError,
    MoleTypeError,
    MoleWarning,
    printable,
)
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io.gates import GateFile, GateTensors
from mole_kernels.layers.attach import reason_against_attaching
from mole_kernels.modules.names import Names, few, hint_for, other_family
from mole_kernels.modules.scan import Scan, quantised_hint, scan, sizes
from mole_kernels.patching.families import PlannedDifference, planned_differences
from mole_kernels.patching.gates import match_gates
from mole_kernels.patching.plan_table import plan_table
from mole_kernels.patching.sources import GateMaker, Source, read_experts, read_gates

Targets = Iterable[str] | Mapping[str, nn.Module] | Callable[[str, nn.Module], bool]


@dataclass
class PlannedLayer:
    """One layer to be patched.

    factors  expert name -> its factors here; an expert without this layer is not among them
    gates    the gate file's tensors for this layer, with a row for each of the file's experts
    """

    path: str
    module: nn.Module
    parent: nn.Module | None
    factors: dict[str, LowRank] = field(default_factory=dict)
    gates: GateTensors | None = None


@dataclass
class Plan:
    """What `patch` would do; `print(plan)` shows it as a table.

    layers     path -> PlannedLayer, in the model's order
    names      the experts, in order
    gates      None, the word for a fresh gate, a GateFile or a callable
    skipped    path -> why a layer is left out
    unmatched  expert name -> the keys of its file that are not used
    gates_unmatched, gates_missing  layers of the gates file that are not patched, patched layers it lacks
    """

    model: object
    layers: dict[str, PlannedLayer]
    names: tuple[str, ...]
    experts: dict[str, Expert]
    gates: GateFile | GateMaker | str | None
    skipped: dict[str, str]
    unmatched: dict[str, list[str]]
    gates_unmatched: list[str] = field(default_factory=list)
    gates_missing: list[str] = field(default_factory=list)
    allow_large_rank: bool = False
    differences: list[PlannedDifference] = field(default_factory=list)

    def __str__(self) -> str:
        return plan_table(self)


def plan(
    model: object,
    experts: Mapping[str, Source] | object,
    gates: object = None,
    *,
    strict: bool = True,
    targets: Targets | None = None,
    allow_large_rank: bool = False,
) -> Plan:
    """What `patch` would change, with every size checked and nothing changed; `print` shows it as a table.

    Args:
        model: An nn.Module or a diffusers pipeline.
        experts: {name: file, tensors or Expert}, an ExpertBank, or the path of a file from `Handle.save`.
        gates: None: no gates, or those inside the file from `Handle.save`. A path or GateFile: its gates.
            "mole", "local", "global": fresh MoLE gates (both, token only, sample only). "constant": one
            learnt constant per expert. "softmax", "top-1", "top-2": a softmax over the experts per token.
            A callable (path, module, experts) -> Gate or None: its gate for each layer.
        strict: Whether a key that matches no layer is an error. If False it is a MoleWarning and listed in
            `Plan.unmatched`. An expert none of whose keys match is always an error.
        targets: Only these layers: paths or their endings ("attn2.to_k"), a mapping by path, or a callable
            (path, module) -> bool. None: every layer that an expert has.
        allow_large_rank: Whether ranks above min(K, N) of a layer are accepted.

    Returns:
        The plan: its layers by path, what is skipped and why, and keys that match nothing.

    Raises:
        MoleFileError: A file cannot be read.
        MoleKeyError: A key, target or gate matches nothing.
        MoleShapeError: A tensor does not fit its layer.
        MoleTypeError, MoleValueError: An argument is of the wrong kind or value.
        MoleStateError: A layer is already patched.
    """
    by_name, own_gates = read_experts(experts, model)
    spec = read_gates(gates)
    spec = own_gates if spec is None else spec
    scanned = scan(model)
    names = Names(scanned)
    result = Plan(
        model, {}, tuple(by_name), by_name, spec, dict(scanned.skipped), {name: [] for name in by_name}
    )
    result.allow_large_rank = allow_large_rank
    result.differences = planned_differences(by_name, model)
    wanted = _wanted(targets, scanned, names)
    matched = {name: _match(name, expert, names, scanned, wanted, result) for name, expert in by_name.items()}
    for name, expert in by_name.items():
        _check_some_match(name, expert, matched[name], scanned, names, model)
    _report(result, names, scanned, strict)
    for path, module in scanned.layers.items():
        layer = PlannedLayer(path, module, scanned.parents.get(path))
        for name, expert in by_name.items():
            if path in matched[name]:
                key, layer.factors[name] = matched[name][path]
                check_factor(
                    partial(where_in, name, expert, key), layer, layer.factors[name], allow_large_rank
                )
        if layer.factors:
            result.layers[path] = layer
    differing = {name for entry in result.differences for name in entry.differences}
    for name in by_name:
        if not matched[name] and name not in differing:
            raise MoleKeyError(
                "targets", f"none of the layers asked for is in {source_of(name, by_name[name])}"
            )
    _add_gates(result, names, gates, strict)
    return result


def check_factor(
    where: Callable[[], str], layer: PlannedLayer, factor: LowRank, allow_large_rank: bool
) -> None:
    """One expert's factors fit one layer. `where` makes the start of a message, and only for one: this runs
    thousands of times.
    """
    N, K = sizes(layer.module)
    if factor.conv and isinstance(layer.module, nn.Linear):
        raise MoleShapeError(
            where(),
            expected=f"factors of a linear layer, {layer.path} is one",
            got="factors of a convolution",
        )
    if factor.conv and isinstance(layer.module, nn.Conv2d) and factor.kernel != layer.module.kernel_size:
        here, there = ("x".join(map(str, kernel)) for kernel in (layer.module.kernel_size, factor.kernel))
        raise MoleShapeError(
            where(),
            expected=f"factors of a {here} convolution, {layer.path} is one",
            got=f"factors of a {there} convolution",
        )
    if (factor.in_features, factor.out_features) != (K, N):
        raise MoleShapeError(
            where(),
            expected=f"down [R,{K}] and up [{N},R] for layer {layer.path}",
            got=f"down {list(factor.down.shape)} and up {list(factor.up.shape)}",
            hint="the expert was trained on a model of other widths",
        )
    if factor.rank > min(N, K) and not allow_large_rank:
        raise MoleShapeError(
            where(),
            expected=f"a rank of at most min(K, N) = {min(N, K)} for layer {layer.path}",
            got=factor.rank,
            hint="such an expert costs more than the layer itself; allow_large_rank=True takes it anyway",
        )


def _match(
    name: str, expert: Expert, names: Names, scanned: Scan, wanted: set[str] | None, result: Plan
) -> dict[str, tuple[str, LowRank]]:
    """path -> (key, factors); what meets no layer goes to made.unmatched and made.skipped."""
    where = source_of(name, expert)
    matched: dict[str, tuple[str, LowRank]] = {}
    for key, factor in expert.layers.items():
        path = names.find(key)
        if path is not None and path in scanned.patched:
            raise MoleStateError(
                where,
                f"{path} already holds the experts {', '.join(scanned.patched[path].experts.names)}",
                hint="handle.remove() the earlier patch first, or give all experts to one patch; "
                "handle.swap() exchanges one",
            )
        if path is None or path not in scanned.layers:
            result.unmatched[name].append(key)
            if path is not None:
                result.skipped[path] = (
                    scanned.skipped.get(path)
                    or reason_against_attaching(scanned.others[path])
                    or "takes no experts"
                )
        elif path in matched:
            raise MoleKeyError(
                where,
                f"one layer is named twice: {printable(matched[path][0])} and {printable(key)} "
                f"are both {path}",
            )
        elif wanted is not None and path not in wanted:
            result.skipped[path] = "not among the targets asked for"
        else:
            matched[path] = (key, factor)
    return matched


def _check_some_match(
    name: str, expert: Expert, matched: Mapping[str, object], scanned: Scan, names: Names, model: object
) -> None:
    keys = list(expert.layers)
    if not keys and expert.families:
        return
    if not keys:
        raise MoleKeyError(source_of(name, expert), expected="factors of at least one layer", got="none")
    if not matched and not any(names.find(key) in scanned.layers for key in keys):
        if reasons := [
            f"{key}: {scanned.skipped[path]}" for key in keys if (path := names.find(key)) in scanned.skipped
        ]:
            raise MoleKeyError(
                source_of(name, expert),
                f"none of its {len(keys)} layers takes experts here"
                f"{' (mole_kernels.accelerate does)' if quantised_hint(reasons) else ''}: {few(reasons)}",
                hint=quantised_hint(reasons),
            )
        raise MoleKeyError(
            source_of(name, expert),
            f"none of its {len(keys)} layers is in this {type(model).__name__}: {few(keys)}",
            hint=hint_for(expert, scanned, model),
        )


def _report(result: Plan, names: Names, scanned: Scan, strict: bool) -> None:
    """Unused keys: an error, or a warning where the caller asked for one."""
    problems, against = [], list[str]()
    for name, keys in result.unmatched.items():
        if not keys:
            continue
        expert = result.experts[name]
        source = source_of(name, expert)
        text = f"{len(keys)} of the {len(expert.layers)} layers of {source} meet no layer: {few(keys)}"
        reasons = [
            f"{printable(key)}: {result.skipped[path]}"
            for key in keys
            if (path := names.find(key)) in result.skipped
        ]
        against += reasons
        nearest = names.nearest(keys[0])
        other = other_family(expert, scanned, result.model)
        text += (
            f" ({reasons[0]})"
            if reasons
            else f" ({other})"
            if other
            else f" (nearest: {few(nearest)})"
            if nearest
            else ""
        )
        problems.append(text)
    if problems and strict:
        raise MoleKeyError(
            "experts",
            "; ".join(problems),
            hint=quantised_hint(against)
            or "strict=False goes on without them and lists them in plan.unmatched",
        )
    for text in problems:
        warnings.warn(f"mole_kernels: {text}", MoleWarning, stacklevel=4)


def _add_gates(result: Plan, names: Names, gates_asked: object, strict: bool) -> None:
    if not isinstance(result.gates, GateFile):
        return
    where = f"gates {printable(gates_asked)}" if isinstance(gates_asked, str) else "gates"
    match = match_gates(result.gates, names, result.layers, result.names, where)
    if not match.layers:
        raise MoleKeyError(
            where,
            f"none of its {len(result.gates.layers)} layers is patched: {few(list(result.gates.layers))}",
        )
    if reason := match.reason_against_match():
        if strict:
            raise MoleKeyError(
                where,
                reason,
                hint="strict=False goes on; layers without gates then count every expert fully",
            )
        warnings.warn(f"mole_kernels: {where}: {reason}", MoleWarning, stacklevel=4)
    result.gates_unmatched, result.gates_missing = match.unmatched, match.missing
    for path, tensors in match.layers.items():
        result.layers[path].gates = tensors


def _wanted(targets: Targets | None, scanned: Scan, names: Names) -> set[str] | None:
    if targets is None:
        return None
    if callable(targets):
        return {path for path, module in scanned.layers.items() if targets(path, module)}
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise MoleTypeError(
            "targets",
            expected="paths, a dict of layers or a callable",
            got=repr(targets),
            hint='targets=["attn2.to_k"]',
        )
    wanted: set[str] = set()
    for target in targets:
        path = names.find(target)
        hits = [path] if path in scanned.layers else [p for p in scanned.layers if p.endswith(f".{target}")]
        if not hits:
            hint = f"nearest: {few(nearest)}" if (nearest := names.nearest(target)) else ""
            raise MoleKeyError("targets", f"{printable(target)} is no layer that can be patched", hint=hint)
        wanted.update(p for p in hits if p is not None)
    return wanted


def where_in(name: str, expert: Expert, key: str) -> str:
    return f"{source_of(name, expert)}, {printable(key)}"


def source_of(name: str, expert: Expert) -> str:
    return f"expert {name!r} ({printable(expert.source)})"
