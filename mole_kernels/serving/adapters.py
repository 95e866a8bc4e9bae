"""Adapters as a pool can hold them: read, completed by the base, and at a strength."""

from __future__ import annotations

from dataclasses import replace

from mole_kernels.errors import MoleTypeError
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.patching.families import OnBase, reason_against_serving
from mole_kernels.patching.sources import Source, read_expert


def at_strength(factor: LowRank, strength: float) -> LowRank:
    """The factors of one layer times a strength, or at it where ΔW is no multiple of it."""
    if isinstance(factor, OnBase) and factor.at_strength is not None and strength != 1:
        down, up = factor.at_strength.factors(strength)
        return LowRank(down, up, 1.0, factor.conv)
    return replace(factor, scale=factor.scale * strength)


def servable(name: str, source: Source, model: object) -> Expert:
    """The expert, where a batch can hold it beside others.

    Raises:
        MoleTypeError: It changes a bias or a norm, of which a batch has one for all.
    """
    expert = read_expert(name, source, model)
    if reason := reason_against_serving(expert):
        raise MoleTypeError(
            f"serve, adapter {name!r}",
            reason,
            hint="mole_kernels.patch takes it for a whole batch",
        )
    return expert
