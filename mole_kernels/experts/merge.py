"""Several experts into one: ΔW = Σ_e w_e ΔW_e and its relatives, layer by layer.

merge({"counting": a, "fairy": b})                          # w_e = 1/T exactly, exact sum of the deltas
(SELMA)
merge(bank, mode="ties", weights=[0.7, 0.7], density=0.5)   # PEFT's names and results
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lazy import Size, size_of, stored_dtype
from mole_kernels.experts.lowrank import Expert, LowRank, layer_identity
from mole_kernels.experts.merge_modes import (
    DENSITY_MODES,
    FACTOR_MODES,
    RANK_MODES,
    Mode,
    Settings,
    SignMethod,
    merge_layer,
)

MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be carried out: settings and sizes are checked, no factor has been read.

    where  path of the result -> (expert, its own spelling of the path) of the experts that have the layer
    """

    experts: Mapping[str, Expert]
    weights: Mapping[str, float]
    how: Settings
    where: Mapping[str, tuple[tuple[str, str], ...]]
    dtype: torch.dtype
    seed: int | None

    def paths(self) -> list[str]:
        """The layers of the result, in order of first mention."""
        return list(self.where)

    def layers(self) -> Iterator[tuple[str, LowRank]]:
        """(path, merged layer) one after the other; only one layer's factors are held at a time."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for path, members in self.where.items():
            found = [self.experts[name].layers[spelled] for name, spelled in members]
            made = merge_layer(found, [self.weights[name] for name, _ in members], self.how, generator)
            yield path, made.to(self.dtype, where=f"merge, layer {printable(path)}")


def plan_merge(
    experts: Mapping[str, Expert] | ExpertBank,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    mode: str = "delta_mean",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    seed: int | None = 0,
    dtype: torch.dtype | None = None,
) -> MergePlan:
    """Check a merge before a factor is read; the arguments are `merge`'s."""
    members = experts.experts if isinstance(experts, ExpertBank) else dict(experts)
    if not members:
        raise MoleValueError("merge", expected="at least one expert", got="none")
    how = _settings(mode, rank, density, majority_sign_method)
    checked = _weights(weights, tuple(members))
    where, sizes = _align(members)
    if how.mode in FACTOR_MODES:
        _check_ranks(how.mode, where, sizes)
    if how.mode in RANK_MODES and how.rank is None:
        how = replace(how, rank=max(size.R for layer in sizes.values() for size in layer))
    kept = dtype or stored_dtype([size.dtype for layer in sizes.values() for size in layer])
    return MergePlan(members, checked, how, where, kept, seed)


def merge(
    experts: Mapping[str, Expert] | ExpertBank,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    mode: str = "delta_mean",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    seed: int | None = 0,
    dtype: torch.dtype | None = None,
) -> Expert:
    """One expert of many.

    weights  by name or in the experts' order, may be negative; None: exactly 1/T, T the number of experts,
             for every mode and layer
    mode     "delta_mean"  Σ w ΔW, exact; rank Σ R_e, never above the layer's own
             "cat"         the same with rank Σ R_e always (PEFT)
             "svd"         the best approximation of Σ w ΔW of rank `rank` (PEFT)
             "factor_mean" s (Σ w B)(Σ w A): another operator, with cross terms
             "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune" on A and B, and their "_svd"
             forms on ΔW, as PEFT has them
    density, majority_sign_method  as PEFT's; density in (0, 1]
    rank     for svd and the "_svd" modes; None: the largest rank among all experts, as PEFT has it
    seed     of dare's random numbers: what `torch.manual_seed(seed)` gives PEFT; None draws from torch's own
             generator
    dtype    of the result; None: the narrowest that holds all inputs exactly
    A layer that an expert lacks counts as zero. Raises MoleValueError, MoleShapeError, MoleTypeError.
    """
    made = plan_merge(
        experts,
        weights,
        mode,
        rank=rank,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
        dtype=dtype,
    )
    return Expert(
        dict(made.layers()),
        dialect=common_dialect(made.experts),
        source=f"{mode} of {', '.join(made.experts)}",
    )


def common_dialect(experts: Mapping[str, Expert]) -> str:
    """The dialects of all, each once, joined by '+' as for a file that mixes them."""
    return "+".join(sorted({expert.dialect for expert in experts.values()}))


def _settings(mode: str, rank: int | None, density: float | None, signs: SignMethod) -> Settings:
    if mode not in MODES:
        raise MoleValueError("merge, mode", expected=f"one of {', '.join(MODES)}", got=f"'{printable(mode)}'")
    if mode in DENSITY_MODES and density is None:
        raise MoleValueError(
            f"merge, {mode}", expected="a density in (0, 1]", got="none", hint="0.5 keeps half of the values"
        )
    if density is not None:
        if not isinstance(density, int | float) or isinstance(density, bool) or not 0 < density <= 1:
            raise MoleValueError("merge, density", expected="a number in (0, 1]", got=printable(density))
        if mode not in DENSITY_MODES:
            raise MoleValueError(
                "merge, density", f"{mode} does not prune", hint=f"density is for {', '.join(DENSITY_MODES)}"
            )
    if signs not in get_args(SignMethod):
        raise MoleValueError(
            "merge, majority_sign_method", expected="'total' or 'frequency'", got=f"'{printable(signs)}'"
        )
    if rank is not None and (type(rank) is not int or rank < 1):
        raise MoleValueError("merge, rank", expected="a whole number >= 1", got=printable(rank))
    if rank is not None and mode not in RANK_MODES:
        raise MoleValueError(
            "merge, rank", f"{mode} sets its rank itself", hint=f"rank is for {', '.join(RANK_MODES)}"
        )
    return Settings(mode, rank, None if density is None else float(density), signs)  # type: ignore[arg-type]


def _weights(
    weights: Sequence[float] | Mapping[str, float] | None, names: tuple[str, ...]
) -> dict[str, float]:
    """One finite number for each expert; 1/T where none are given."""
    if weights is None:
        return dict.fromkeys(names, 1 / len(names))
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise MoleValueError(
                "merge, weights",
                expected=f"one for each of {', '.join(names)}",
                got=", ".join(map(str, weights)),
            )
        given = [weights[name] for name in names]
    else:
        given = list(weights)
        if len(given) != len(names):
            raise MoleValueError(
                "merge, weights",
                expected=f"{len(names)} numbers, in the order {', '.join(names)}",
                got=len(given),
            )
    for name, weight in zip(names, given):
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise MoleTypeError(
                f"merge, weight of {printable(name)}", expected="a number", got=type(weight).__name__
            )
        if not math.isfinite(weight):
            raise MoleValueError(
                f"merge, weight of {printable(name)}", expected="a finite number", got=weight
            )
    return {name: float(weight) for name, weight in zip(names, given)}


def _align(
    experts: Mapping[str, Expert],
) -> tuple[dict[str, tuple[tuple[str, str], ...]], dict[str, list[Size]]]:
    """(members, sizes) of each layer under its most dotted spelling; layers of different sizes are refused,
    and named.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    sizes: dict[str, list[Size]] = {}
    for name, expert in experts.items():
        if not isinstance(expert, Expert):
            raise MoleTypeError(f"merge, expert {name!r}", expected="an Expert", got=type(expert).__name__)
        for path in expert.layers:
            members.setdefault(layer_identity(path), []).append((name, path))
            sizes.setdefault(layer_identity(path), []).append(size_of(expert.layers, path))
    if not members:
        raise MoleValueError("merge", expected="experts with at least one layer", got="none")
    apart = [flat for flat, found in sizes.items() if len({(size.N, size.K) for size in found}) > 1]
    if apart:
        lines = [
            f"{printable(members[flat][0][1])} ("
            + ", ".join(f"{name} {size.N}x{size.K}" for (name, _), size in zip(members[flat], sizes[flat]))
            + ")"
            for flat in apart[:5]
        ]
        more = f" and {len(apart) - 5} more" if len(apart) > 5 else ""
        raise MoleShapeError(
            "merge",
            f"{len(apart)} of {len(members)} layers have different sizes [N,K]: {', '.join(lines)}{more}",
            hint="are these experts of one base model?",
        )
    spelled = {
        flat: max((path for _, path in found), key=lambda path: path.count("."))
        for flat, found in members.items()
    }
    return {spelled[flat]: tuple(found) for flat, found in members.items()}, {
        spelled[flat]: found for flat, found in sizes.items()
    }


def _check_ranks(
    mode: str, where: Mapping[str, tuple[tuple[str, str], ...]], sizes: Mapping[str, list[Size]]
) -> None:
    """Modes that add factor to factor need one rank on each layer."""
    for path, found in sizes.items():
        if len({size.R for size in found}) > 1:
            got = ", ".join(f"{name} {size.R}" for (name, _), size in zip(where[path], found))
            raise MoleShapeError(
                f"merge, {mode}, layer {printable(path)}",
                expected="experts of one rank",
                got=got,
                hint="delta_mean, cat, svd and the _svd modes take unequal ranks",
            )
