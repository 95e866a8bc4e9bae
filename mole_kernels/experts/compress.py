"""Experts of a smaller rank: truncated SVD of each layer from its factors, with the error bounded beforehand
and measured after.

    smaller, report = compress(expert, energy=0.99)

For ΔW = s·B·A with singular values σ_1 ≥ σ_2 ≥ …, keeping r of them is the best that rank r can do (Eckart
and Young):
‖ΔW − ΔW'‖₂ = σ_{r+1} and ‖ΔW − ΔW'‖_F = (Σ_{i>r} σ_i²)^½. Storing the new factors in fewer bits adds
rounding; the bound holds both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mole_kernels.errors import MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.compress_report import NOMINAL, CompressedLayer, Predicted, Report, predicted_us
from mole_kernels.experts.compress_svd import Svd, difference, singular_values, svd, truncate
from mole_kernels.experts.lazy import stored_dtype
from mole_kernels.experts.lowrank import Expert, LowRank


@dataclass(frozen=True)
class CompressionTarget:
    """What decides each layer's rank: exactly one of the three.

    Attributes:
        rank: At most this.
        energy: The smallest rank that keeps this part of Σσ², in (0, 1].
        max_error: The smallest rank with ‖ΔW − ΔW'‖₂ ≤ max_error · ‖ΔW‖₂ as stored, in [0, 1): no input's
            output moves by more than that.

    Raises:
        MoleValueError: None or several of them, or one out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        limits = {name: value for name, value in asdict(self).items() if value is not None}
        if len(limits) != 1:
            raise MoleValueError(
                "compress",
                expected="exactly one of rank, energy and max_error",
                got=", ".join(limits) or "none",
            )
        name, value = limits.popitem()
        if name == "rank" and (type(value) is not int or value < 1):
            raise MoleValueError("compress, rank", expected="a whole number >= 1", got=printable(value))
        if name != "rank":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            right = number and (0 < value <= 1 if name == "energy" else 0 <= value < 1)
            if not right:
                raise MoleValueError(
                    f"compress, {name}",
                    expected="(0, 1]" if name == "energy" else "[0, 1)",
                    got=printable(value),
                )

    def ranks(self, values: Tensor, stored: float = 0.0) -> int:
        """The rank for one layer, 1 at least.

        Args:
            values: Its singular values [P], falling.
            stored: What rounding already takes of `max_error`.
        """
        if self.rank is not None:
            return min(self.rank, len(values))
        values = values.double()
        if self.energy is not None:
            squares = values.square()
            # from the small end, where no large sum swallows them
            tails = squares.flip(0).cumsum(0).flip(0)
            enough = tails <= (1 - self.energy) * tails[0]
        else:
            assert self.max_error is not None
            enough = values <= max(self.max_error - stored, 0.0) * values[0]
        indices = torch.nonzero(enough)
        return max(int(indices[0]) if len(indices) else len(values), 1)


class Compressed(NamedTuple):
    """What `compress` returns: the same kind of thing smaller, and a report for each expert (by name for a
    bank).
    """

    result: Any
    report: Any


def compress(
    experts: Expert | ExpertBank,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
    predicted: Predicted = NOMINAL,
) -> Compressed:
    """The best experts of smaller rank: truncated SVD of each layer from its factors (Eckart and Young).

    Exactly one of `rank`, `energy` and `max_error` decides (see `CompressionTarget`). A layer whose rank is
    already small enough keeps its factors bit for bit.

    Args:
        experts: An Expert, or an ExpertBank.
        rank: At most this rank.
        energy: Keep this part of Σσ², in (0, 1].
        max_error: Keep the relative spectral error below this, in [0, 1).
        dtype: Of the result; None: the narrowest that holds the input's exactly.
        predicted: The call that predicted times are for.

    Returns:
        (result, report): an Expert and its Report, or an ExpertBank and {name: Report}.

    Raises:
        MoleTypeError: Neither an Expert nor an ExpertBank.
        MoleValueError: None or several targets, one out of its range, or one that `dtype` cannot reach.

    Example:
        >>> smaller, report = compress(expert, energy=0.99)
    """
    target = CompressionTarget(rank, energy, max_error)
    if isinstance(experts, ExpertBank):
        results = {
            name: _compress_expert(expert, target, dtype, predicted)
            for name, expert in experts.experts.items()
        }
        return Compressed(
            ExpertBank({name: smaller for name, (smaller, _) in results.items()}),
            {name: report for name, (_, report) in results.items()},
        )
    if not isinstance(experts, Expert):
        raise MoleTypeError("compress", expected="an Expert or an ExpertBank", got=type(experts).__name__)
    return Compressed(*_compress_expert(experts, target, dtype, predicted))


def _compress_expert(
    expert: Expert, target: CompressionTarget, dtype: torch.dtype | None, predicted: Predicted
) -> tuple[Expert, Report]:
    expert.check_low_rank("compress")
    layers, reports = {}, []
    for path, layer, report in compress_layers(expert.layers, target, dtype, predicted):
        layers[path] = layer
        reports.append(report)
    return Expert(layers, expert.dialect, expert.source, expert.metadata), Report(tuple(reports), predicted)


def compress_layers(
    layers: Mapping[str, LowRank],
    target: CompressionTarget,
    dtype: torch.dtype | None = None,
    predicted: Predicted = NOMINAL,
) -> Iterator[tuple[str, LowRank, CompressedLayer]]:
    """(path, smaller layer, report) of each layer, one at a time.

    Args:
        layers: Path -> LowRank.
        target: What decides the ranks.
        dtype: Of the results.
        predicted: The call that predicted times are for.
    """
    for path in layers:
        smaller, report = compress_layer(path, layers[path], target, dtype, predicted)
        yield path, smaller, report


def compress_layer(
    path: str,
    layer: LowRank,
    target: CompressionTarget,
    dtype: torch.dtype | None = None,
    predicted: Predicted = NOMINAL,
) -> tuple[LowRank, CompressedLayer]:
    """(smaller layer, report) of one layer.

    Args:
        path: The layer, for messages and the report.
        layer: Its factors.
        target: What decides the rank.
        dtype: Of the result.
        predicted: The call that predicted times are for.

    Raises:
        MoleValueError: A `max_error` that `dtype` cannot reach.
    """
    stored = dtype or stored_dtype([layer.down.dtype, layer.up.dtype])
    parts = svd(layer)
    values = parts.values.double() * abs(layer.scale)
    smaller = _stored(path, layer, parts, target.ranks(values), stored)
    errors = _errors(layer, smaller)
    if target.max_error is not None and errors[1] > target.max_error * values[0].item():
        # what rounding adds must come out of the truncation's share; a little over, as the two add up
        # otherwise at another rank
        left_out = _at(values, smaller.rank)
        rounding = 1.25 * (errors[1] - left_out) / values[0].item()
        smaller = _stored(path, layer, parts, target.ranks(values, stored=rounding), stored)
        errors = _errors(layer, smaller)
        if errors[1] > target.max_error * values[0].item():
            raise MoleValueError(
                f"compress, layer {printable(path)}",
                expected=f"a relative spectral error of at most {target.max_error:g}",
                got=f"{errors[1] / values[0].item():.3g} at rank {smaller.rank} stored in {str(stored)[6:]}",
                hint="give a wider dtype",
            )
    return smaller, _report(path, layer, smaller, values, errors, predicted)


def _stored(path: str, layer: LowRank, parts: Svd, rank: int, dtype: torch.dtype) -> LowRank:
    """Truncated to `rank` and cast; what needs no truncation keeps its factors."""
    smaller = layer if rank >= layer.rank else truncate(layer, rank, parts)
    return smaller.to(dtype, where=f"compress, layer {printable(path)}")


def _errors(layer: LowRank, smaller: LowRank) -> tuple[float, float]:
    """(Frobenius, spectral) of ΔW − ΔW' as stored, in float64."""
    if (
        smaller.rank == layer.rank
        and torch.equal(smaller.down, layer.down)
        and torch.equal(smaller.up, layer.up)
    ):
        return 0.0, 0.0
    apart = singular_values(difference(layer, smaller))
    return apart.norm().item(), apart[0].item()


def _rounding(layer: LowRank, smaller: LowRank, values: Tensor) -> float:
    """How far storing and the SVD's own arithmetic can move ΔW' (Frobenius).

    Storing: ‖δB‖‖A'‖ + ‖B'‖‖δA‖ with |δ| ≤ u|·| + half the smallest subnormal. The arithmetic: a small
    multiple of its own u, of σ_1.
    """
    info = torch.finfo(smaller.up.dtype)
    half = info.eps / 2
    down, up = (t.detach().double().norm().item() for t in (smaller.down, smaller.up))
    tiny = info.smallest_normal * info.eps / 2
    moved = sum(
        (half * size + tiny * math.sqrt(t.numel())) * other
        for size, t, other in ((down, smaller.down, up), (up, smaller.up, down))
    )
    work = torch.finfo(torch.float64 if layer.up.dtype == torch.float64 else torch.float32).eps
    return abs(layer.scale) * moved * (1 + half) + 8 * work * math.sqrt(len(values)) * values[
        0
    ].item() * math.sqrt(layer.rank)


def _report(
    path: str,
    layer: LowRank,
    smaller: LowRank,
    values: Tensor,
    errors: tuple[float, float],
    predicted: Predicted,
) -> CompressedLayer:
    N, K, same = layer.out_features, layer.in_features, errors == (0.0, 0.0)
    rounding = 0.0 if same else _rounding(layer, smaller, values)
    us = [predicted_us(N, K, factors.rank, predicted) for factors in (layer, smaller)]
    return CompressedLayer(
        path,
        N,
        K,
        layer.rank,
        smaller.rank,
        values.norm().item(),
        values[0].item(),
        0.0 if same else values[smaller.rank :].norm().item() + rounding,
        0.0 if same else _at(values, smaller.rank) + rounding,
        *errors,
        2 * layer.rank * (K + N),
        2 * smaller.rank * (K + N),
        *us,
    )


def _at(values: Tensor, i: int) -> float:
    return values[i].item() if i < len(values) else 0.0
