"""One expert of a patched model replaced by another, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleWarning, printable
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.modules.names import Names, few
from mole_kernels.modules.scan import scan
from mole_kernels.modules.snapshot import all_or_nothing
from mole_kernels.patching.block_scales import LayerScale, scale_at
from mole_kernels.patching.families import OnBase, reason_against_serving
from mole_kernels.patching.pack import check_narrowing
from mole_kernels.patching.patched import Patched
from mole_kernels.patching.plan import Plan, PlannedLayer, check_factor, source_of, where_in
from mole_kernels.patching.sources import Source, read_expert


def swap_expert(
    patched: Mapping[str, Patched],
    plan: Plan,
    name: str,
    source: Source,
    strict: bool,
    weights: Mapping[str, LayerScale],
) -> Expert:
    """Write the expert read from `source` into the place of `name`, and into the plan; returns it. Whatever
    it raises, nothing has changed.

    weights  the adapter weights, which stay
    """
    expert = read_expert(name, source, plan.model)
    held = [entry for entry in patched.values() if name in entry.experts.names]
    factors = match_held(held, plan, name, expert, strict)
    _check_swappable(held, plan, name, expert)
    with torch.inference_mode(False), torch.no_grad():
        larger = [
            entry for entry in held if entry.path in factors and factors[entry.path].rank > _room(entry, name)
        ]
        repacked = {entry.path: _repack(entry, name, factors[entry.path], weights) for entry in larger}
        in_place = [entry for entry in held if entry.path not in repacked]
        # everything new stands ready in the layer's dtype before the first write
        writes = [
            (target, value, target.clone())
            for entry in in_place
            for target, value in zip(
                _places(entry, name),
                _stage(entry, name, factors.get(entry.path), scale_at(weights[name], entry.path)),
            )
        ]
        known, books = plan.experts, [(entry, entry.experts, entry.ranks) for entry in held]
        with all_or_nothing([entry.module for entry in held]):
            try:
                for target, value, _ in writes:
                    target.copy_(value)
                for entry in larger:
                    entry.module.experts = repacked[entry.path]
                for entry in held:
                    entry.experts = repacked.get(entry.path, entry.experts)
                    entry.ranks = entry.ranks | {
                        name: factors[entry.path].rank if entry.path in factors else 0
                    }
                plan.experts = {**plan.experts, name: expert}
            except BaseException:
                plan.experts = known
                for entry, experts, ranks in books:
                    entry.experts, entry.ranks = experts, ranks
                for target, _, old in writes:
                    target.copy_(old)
                raise
    return expert


def _check_swappable(held: list[Patched], plan: Plan, name: str, expert: Expert) -> None:
    """Refuse what a swap would leave half done: differences of biases and norms, a ΔW of its own scale.

    Raises:
        MoleStateError: The old or the new expert has such parts.
    """
    old = any(
        name in entry.experts.strengths or entry.experts.bias_delta is not None for entry in held
    ) or any(name in entry.differences for entry in plan.differences)
    new = reason_against_serving(expert) or any(
        isinstance(layer, OnBase) and layer.at_strength is not None for layer in expert.layers.values()
    )
    if old or new:
        raise MoleStateError(
            f"Handle.swap, {name!r}",
            f"the {'old' if old else 'new'} expert is not A and B alone",
            hint="remove() and patch anew",
        )


def match_held(
    held: list[Patched], plan: Plan, name: str, expert: Expert, strict: bool
) -> dict[str, LowRank]:
    """path -> the new expert's factors on the layers that held the old one."""
    where = source_of(name, expert)
    names, layers = Names(scan(plan.model)), {entry.path: entry for entry in held}
    factors: dict[str, LowRank] = {}
    unmatched = []
    for key, factor in expert.layers.items():
        path = names.find(key)
        if path is None or path not in layers:
            unmatched.append(key)
            continue
        if path in factors:
            raise MoleKeyError(where, f"one layer is named twice, the second time as {printable(key)}")
        layer = PlannedLayer(path, layers[path].module, None)
        check_factor(partial(where_in, name, expert, key), layer, factor, plan.allow_large_rank)
        factors[path] = factor
    if not factors:
        raise MoleKeyError(
            where,
            f"none of its {len(expert.layers)} layers holds the expert it is to replace: "
            f"{few(list(expert.layers))}",
        )
    if unmatched:
        text = (
            f"{len(unmatched)} of its {len(expert.layers)} layers do not hold the expert it is to replace: "
            f"{few(unmatched)}"
        )
        if strict:
            raise MoleKeyError(
                where,
                text,
                hint="remove() and patch anew to adapt other layers, or strict=False to go on without these",
            )
        warnings.warn(f"mole_kernels: {where}: {text}", MoleWarning, stacklevel=4)
    return factors


def _room(entry: Patched, name: str) -> int:
    return entry.experts.ranks[entry.experts.index(name)]


def _places(entry: Patched, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The places of one expert in a packed layer: rows of down, columns of up, its base scale, its scale."""
    experts, e, span = entry.experts, entry.experts.index(name), entry.experts.span(name)
    return (
        experts.down[:, span],
        experts.up[:, :, span],
        experts.base_scale[e : e + 1],
        experts.scale[e : e + 1],
    )


def _stage(
    entry: Patched, name: str, factor: LowRank | None, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What goes into those places: the factors padded with zeros to the room there is, or zeros alone."""
    down, up, base, scale = (torch.zeros_like(place) for place in _places(entry, name))
    if factor is not None:
        down[:, : factor.rank] = factor.down.detach()
        up[:, :, : factor.rank] = factor.up.detach()
        base.fill_(factor.scale)
        scale.copy_(base * weight)
        check_narrowing(name, entry.path, factor, down, up)
    return down, up, base, scale


def _repack(entry: Patched, name: str, factor: LowRank, weights: Mapping[str, LayerScale]) -> LayerExperts:
    """The layer's experts packed anew, with a larger rank for one of them; device, dtype, flags and weights
    as before.
    """
    old = entry.experts
    factors = {other: factor if other == name else old.factor(other) for other in old.names}
    new = LayerExperts.from_factors(factors, dtype=old.down.dtype, device=old.down.device)
    span = new.span(name)
    check_narrowing(name, entry.path, factor, new.down[:, span], new.up[:, :, span])
    new.set_weights({other: scale_at(weights[other], entry.path) for other in new.names})
    new.down.requires_grad_(old.down.requires_grad)
    new.up.requires_grad_(old.up.requires_grad)
    return new.train(old.training)
