"""What compressing an expert gave up, layer by layer, and what speed the cost model predicts for it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from mole_kernels.dispatch.choose import choose
from mole_kernels.dispatch.device import KNOWN
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.problem import Problem


@dataclass(frozen=True)
class CompressedLayer:
    """One layer before and after. Norms and errors are of ΔW with its scale: Frobenius, and spectral (‖·‖₂,
    the worst case over inputs).

    Attributes:
        path: The layer.
        N: Outputs.
        K: Inputs.
        rank_before: R before.
        rank_after: R after.
        frobenius: ‖ΔW‖_F.
        spectral: ‖ΔW‖₂.
        bound_frobenius: What the error cannot exceed: the singular values left out, and the rounding of the
            stored factors.
        bound_spectral: Likewise.
        error_frobenius: Measured in float64 on the factors as they are stored.
        error_spectral: Likewise.
        flops_before: Of the expert for one token: 2·R·(K+N).
        flops_after: Likewise.
        layer_us_before: Predicted microseconds of the whole layer (base and expert) by the dispatcher's cost
            model; never measured.
        layer_us_after: Likewise.
    """

    path: str
    N: int
    K: int
    rank_before: int
    rank_after: int
    frobenius: float
    spectral: float
    bound_frobenius: float
    bound_spectral: float
    error_frobenius: float
    error_spectral: float
    flops_before: int
    flops_after: int
    layer_us_before: float
    layer_us_after: float


@dataclass(frozen=True)
class Predicted:
    """The call that the predictions are for: one sample of `tokens` tokens of `dtype` on a known GPU."""

    device: str = "h200"
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.device not in KNOWN:
            raise MoleValueError(
                "compress, device", expected=f"one of {', '.join(KNOWN)}", got=f"'{printable(self.device)}'"
            )
        if type(self.tokens) is not int or self.tokens < 1:
            raise MoleValueError(
                "compress, tokens", expected="a whole number >= 1", got=printable(self.tokens)
            )


NOMINAL = Predicted()


@dataclass(frozen=True)
class Report:
    """All layers of one expert."""

    layers: tuple[CompressedLayer, ...]
    predicted: Predicted = NOMINAL

    def total(self) -> dict[str, float]:
        """The whole expert: its largest ranks, relative errors over all layers together, predicted speed-up
        of the layers in a row.
        """
        norm = math.fsum(layer.frobenius**2 for layer in self.layers) ** 0.5 or 1.0
        error = math.fsum(layer.error_frobenius**2 for layer in self.layers) ** 0.5
        worst = max((layer.error_spectral / (layer.spectral or 1.0) for layer in self.layers), default=0.0)
        before, after = (
            sum(getattr(layer, f"layer_us_{when}") for layer in self.layers) for when in ("before", "after")
        )
        return {
            "layers": len(self.layers),
            "rank_before": max((layer.rank_before for layer in self.layers), default=0),
            "rank_after": max((layer.rank_after for layer in self.layers), default=0),
            "parameters_before": sum(layer.rank_before * (layer.N + layer.K) for layer in self.layers),
            "parameters_after": sum(layer.rank_after * (layer.N + layer.K) for layer in self.layers),
            "relative_error_frobenius": error / norm,
            "worst_relative_error_spectral": worst,
            "predicted_us_before": before,
            "predicted_us_after": after,
            "predicted_speedup": before / after if after else 1.0,
        }

    def to_json(self) -> str:
        """The report as JSON: totals, what the predictions are for, and every layer."""
        predicted = {
            "device": self.predicted.device,
            "tokens": self.predicted.tokens,
            "dtype": str(self.predicted.dtype)[6:],
        }
        fields: dict[str, Any] = {
            "total": self.total(),
            "predicted_for": predicted,
            "layers": [asdict(layer) for layer in self.layers],
        }
        return json.dumps(fields, indent=1)


@lru_cache(maxsize=4096)
def predicted_us(N: int, K: int, rank: int, predicted: Predicted) -> float:
    """Microseconds of the whole layer with one ungated expert, by the dispatcher's cost model.

    Args:
        N: Outputs.
        K: Inputs.
        rank: R of the expert.
        predicted: The call.
    """
    problem = Problem(1, predicted.tokens, K, N, (rank,), 1, predicted.dtype, "cuda")
    return choose(problem, KNOWN[predicted.device]).predicted
