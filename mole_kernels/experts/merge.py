"""Several experts into one: ΔW = Σ_e w_e ΔW_e and its relatives, layer by layer.

merge({"counting": a, "fairy": b})                          # w_e = 1/T, exact sum of the deltas (SELMA)
merge(bank, mode="ties", weights=[0.7, 0.7], density=0.5)   # PEFT's names and results
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, get_args

import torch
from typing_extensions import Unpack

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lazy import Size, layer_size, stored_dtype
from mole_kernels.experts.lowrank import Expert, LowRank, canonical_path, is_denoiser, split_component
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
# layer of the result -> (expert, its own spelling of the layer) of the experts that have it
Members = Mapping[str, tuple[tuple[str, str], ...]]


class MergeOptions(TypedDict, total=False):
    """What `merge` takes beside experts, weights and mode."""

    rank: int | None
    density: float | None
    majority_sign_method: SignMethod
    seed: int | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be carried out: settings and sizes are checked, no factor has been read.

    Attributes:
        experts: Name -> Expert.
        weights: Name -> weight.
        how: The mode and its numbers.
        where: Path of the result -> (expert, its own spelling of the path) of the experts that have the
            layer.
        dtype: Of the result.
        seed: Of dare's random numbers.
    """

    experts: Mapping[str, Expert]
    weights: Mapping[str, float]
    how: Settings
    where: Members
    sizes: Mapping[str, list[Size]]
    dtype: torch.dtype
    seed: int | None

    def paths(self) -> list[str]:
        """The layers of the result, in order of first mention."""
        return list(self.where)

    def layers(self) -> Iterator[tuple[str, LowRank]]:
        """(path, merged layer) one after the other; only one layer's factors are held at a time."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for path, members in self.where.items():
            layers = [self.experts[name].layers[spelling] for name, spelling in members]
            layer = merge_layer(layers, [self.weights[name] for name, _ in members], self.how, generator)
            yield path, layer.to(self.dtype, where=f"merge, layer {printable(path)}")

    def size(self) -> int:
        """Bytes of the result's factors, before one is read."""
        return sum(self._rank(sizes) * (sizes[0].N + sizes[0].K) for sizes in self.sizes.values()) * (
            self.dtype.itemsize
        )

    def _rank(self, sizes: list[Size]) -> int:
        if self.how.mode in FACTOR_MODES:
            return sizes[0].R
        smallest = min(sizes[0].N, sizes[0].K)
        total = sum(size.R for size in sizes)
        if self.how.mode == "cat":
            return total
        return min(smallest, total if self.how.mode == "delta_mean" else self.how.rank or total)


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
    """Check a merge before a factor is read; the arguments and errors are `merge`'s."""
    members = experts.experts if isinstance(experts, ExpertBank) else dict(experts)
    if not members:
        raise MoleValueError("merge", expected="at least one expert", got="none")
    for name, expert in members.items():
        expert.check_low_rank(f"merge, {name!r}")
    how = _settings(mode, rank, density, majority_sign_method)
    checked = _weights(weights, tuple(members))
    where, sizes = _align(members)
    if how.mode in FACTOR_MODES:
        _check_ranks(how.mode, where, sizes)
    if how.mode in RANK_MODES and how.rank is None:
        how = replace(how, rank=max(size.R for layer in sizes.values() for size in layer))
    stored = dtype or stored_dtype([size.dtype for layer in sizes.values() for size in layer])
    return MergePlan(members, checked, how, where, sizes, stored, seed)


def merge(
    experts: Mapping[str, Expert] | ExpertBank,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    mode: str = "delta_mean",
    **options: Unpack[MergeOptions],
) -> Expert:
    """One expert of several: ΔW = Σ_e w_e ΔW_e, or one of its relatives.

    A layer that an expert lacks counts as zero.

    Args:
        experts: Name -> Expert, or a bank.
        weights: By name or in the experts' order, may be negative; None: exactly 1/T for T experts, whatever
            the mode and the layer.
        mode: "delta_mean": Σ w ΔW, exact, of rank Σ R_e but never above the layer's own · "cat": the same of
            rank Σ R_e always (PEFT) · "svd": the best approximation of Σ w ΔW of rank `rank` (PEFT) ·
            "factor_mean": s (Σ w B)(Σ w A), another operator, with cross terms · "linear", "ties",
            "dare_linear", "dare_ties", "magnitude_prune" on A and B, and their "_svd" forms on ΔW, as PEFT
            has them.
        rank: Of the result for svd and the "_svd" modes; None: the largest among all experts, as in PEFT.
        density: As PEFT's, in (0, 1].
        majority_sign_method: As PEFT's.
        seed: Of dare's random numbers: what `torch.manual_seed(seed)` gives PEFT; None draws from torch's own
            generator.
        dtype: Of the result; None: the narrowest that holds all inputs exactly.

    Returns:
        The merged expert; its metadata say what it was made of.

    Raises:
        MoleShapeError: Layers of different sizes, or ranks that the mode cannot add.
        MoleTypeError: An expert or a weight of another type.
        MoleValueError: An unknown mode, or a number out of its range.

    Example:
        >>> merge({"counting": a, "fairy": b}, weights=[0.7, 0.3])
    """
    plan = plan_merge(experts, weights, mode, **options)
    return Expert(
        dict(plan.layers()),
        dialect=common_dialect(plan.experts),
        source=f"{mode} of {', '.join(plan.experts)}",
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
    """One finite number for each expert; 1/T where there are no weights."""
    if weights is None:
        return dict.fromkeys(names, 1 / len(names))
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise MoleValueError(
                "merge, weights",
                expected=f"one for each of {', '.join(names)}",
                got=", ".join(map(str, weights)),
            )
        numbers = [weights[name] for name in names]
    else:
        numbers = list(weights)
        if len(numbers) != len(names):
            raise MoleValueError(
                "merge, weights",
                expected=f"{len(names)} numbers, in the order {', '.join(names)}",
                got=len(numbers),
            )
    for name, weight in zip(names, numbers):
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise MoleTypeError(
                f"merge, weight of {printable(name)}", expected="a number", got=type(weight).__name__
            )
        if not math.isfinite(weight):
            raise MoleValueError(
                f"merge, weight of {printable(name)}", expected="a finite number", got=weight
            )
    return {name: float(weight) for name, weight in zip(names, numbers)}


def _align(
    experts: Mapping[str, Expert],
) -> tuple[dict[str, tuple[tuple[str, str], ...]], dict[str, list[Size]]]:
    """(members, sizes) of each layer under its most dotted spelling.

    Raises:
        MoleKeyError: As `_check_names`.
        MoleShapeError: Layers of one identity and several sizes.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    sizes: dict[str, list[Size]] = {}
    for name, expert in experts.items():
        if not isinstance(expert, Expert):
            raise MoleTypeError(f"merge, expert {name!r}", expected="an Expert", got=type(expert).__name__)
        for path in expert.layers:
            members.setdefault(canonical_path(path), []).append((name, path))
            sizes.setdefault(canonical_path(path), []).append(layer_size(expert.layers, path))
    if not members:
        raise MoleValueError("merge", expected="experts with at least one layer", got="none")
    apart = [layer for layer, several in sizes.items() if len({(size.N, size.K) for size in several}) > 1]
    if apart:
        lines = [
            f"{printable(members[layer][0][1])} ("
            + ", ".join(f"{name} {size.N}x{size.K}" for (name, _), size in zip(members[layer], sizes[layer]))
            + ")"
            for layer in apart[:5]
        ]
        more = f" and {len(apart) - 5} more" if len(apart) > 5 else ""
        raise MoleShapeError(
            "merge",
            f"{len(apart)} of {len(members)} layers have different sizes [N,K]: {', '.join(lines)}{more}",
            hint="are these experts of one base model?",
        )
    spellings = {
        layer: max((path for _, path in several), key=lambda path: path.count("."))
        for layer, several in members.items()
    }
    _check_names(experts, list(spellings.values()))
    return {spellings[layer]: tuple(several) for layer, several in members.items()}, {
        spellings[layer]: several for layer, several in sizes.items()
    }


# a tool's prefix that stayed, and names of blocks that no model of diffusers has
_TOOL = re.compile(r"(?:model\.)?diffusion_model\.|(?:double|single|joint)_blocks\.")
_FLAT = re.compile(r"[^.]*_\d+_[^.]*\Z")


def _check_names(experts: Mapping[str, Expert], paths: Sequence[str]) -> None:
    """Refuse a result whose layers of the denoiser are named in several ways: no reader would know them all.

    Raises:
        MoleKeyError: Names of two tools that no other expert's spelling resolves.
    """
    by_way: dict[str, str] = {}
    for path in paths:
        component, rest = split_component(path)
        if is_denoiser(component):
            tool = _TOOL.match(rest)
            way = tool.group() if tool else "flat" if _FLAT.match(rest) else "dotted"
            by_way.setdefault(way, path)
    if len(by_way) > 1:
        raise MoleKeyError(
            f"merge, {' and '.join(map(printable, experts))}",
            f"their layers have names of several tools: {' and '.join(map(printable, by_way.values()))}",
            hint="resolve them against the model: load_expert(path, pipeline=…), or --pipeline",
        )


def _check_ranks(mode: str, where: Members, sizes: Mapping[str, list[Size]]) -> None:
    """Modes that add factor to factor need one rank on each layer."""
    for path, several in sizes.items():
        if len({size.R for size in several}) > 1:
            got = ", ".join(f"{name} {size.R}" for (name, _), size in zip(where[path], several))
            raise MoleShapeError(
                f"merge, {mode}, layer {printable(path)}",
                expected="experts of one rank",
                got=got,
                hint="delta_mean, cat, svd and the _svd modes take unequal ranks",
            )
