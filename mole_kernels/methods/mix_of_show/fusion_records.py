"""What a fusion is asked for, and what it reports: settings, figures per layer, the fused concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from mole_kernels.errors import MoleValueError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.methods.mix_of_show.tokens import (
    Tokens,
)

# (what is being done, how much of it is done, of how much)
Progress = Callable[[str, int, int], None]
GROUPS = ("text encoder", "cross-attention", "unet")


@dataclass(frozen=True)
class FusionSettings:
    """How inputs are gathered and layers solved.

    Args:
        templates: Prompts; {} is the concept. The first is the one that is sampled.
        steps: Of the sampling run (the paper's code: 20, or 50 in its first version).
        height: Of its picture in pixels; None for the pipeline's own.
        width: Likewise.
        memory: Bytes that the sums may take at once, None for no limit; with less, layers go in groups,
            each with sampling runs of its own.
        cutoff: See `experts.fuse.fuse_layer`.
        ridge: See `experts.fuse.fuse_layer`.
        lbfgs: Steps of the paper's optimiser on every layer too, for the report alone (the paper takes
            500); 0 for none.
    """

    templates: tuple[str, ...] = ("photo of a {}", "{}")
    steps: int = 20
    height: int | None = None
    width: int | None = None
    seed: int = 0
    memory: int | None = None
    cutoff: float = 1e-12
    ridge: float = 0.0
    lbfgs: int = 0

    def __post_init__(self) -> None:
        if not self.templates or any("{}" not in t for t in self.templates):
            raise MoleValueError(
                "fuse: templates", expected="texts with {} for the concept", got=printable(self.templates)
            )
        if self.steps < 1:
            raise MoleValueError("fuse: steps", expected="at least 1", got=self.steps)
        if self.lbfgs < 0:
            raise MoleValueError("fuse: lbfgs", expected="steps >= 0", got=self.lbfgs)


@dataclass(frozen=True)
class FusedLayer:
    """One fused layer.

    Args:
        rows: Concept -> inputs seen.
        K: Inputs of the layer.
        rank: Rank of the result.
        base: Objective Σ_i ‖(α_i ΔW_i − ΔW) X_i‖² of the base, ΔW = 0.
        by_weights: Objective of the fusion of weights, without inputs.
        fused: Objective of the result.
        directions: How many of the K directions the inputs reach.
        condition: Largest ÷ smallest eigenvalue among them.
        seconds: To solve it.
        lbfgs: Objective where the paper's optimiser stops; None where it was not asked for.
        lbfgs_seconds: How long the optimiser took.
        note: What to know about it: no inputs, fewer inputs than ranks; "" where nothing.
    """

    path: str
    group: str
    rows: dict[str, int]
    K: int
    rank: int
    base: float
    by_weights: float
    fused: float
    directions: int
    condition: float
    seconds: float = 0.0
    lbfgs: float | None = None
    lbfgs_seconds: float | None = None
    note: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FusedConcepts:
    """expert: of rank at most Σ r_i, its alphas in it · embeddings, tokens: of all concepts, as installed
    then · layers: a report each.
    """

    expert: Expert
    embeddings: Mapping[str, Mapping[str, Tensor]]
    tokens: Tokens
    layers: list[FusedLayer] = field(default_factory=list)

    def totals(self) -> dict[str, dict[str, float]]:
        """group -> sums over its layers of the three objectives and the seconds, and of LBFGS's where every
        layer has them.
        """
        totals = {}
        for group in GROUPS:
            own = [layer for layer in self.layers if layer.group == group]
            if own:
                totals[group] = {
                    key: sum(getattr(layer, key) for layer in own) for key in ("base", "by_weights", "fused")
                }
                totals[group] |= {"layers": len(own), "seconds": sum(layer.seconds for layer in own)}
                if all(layer.lbfgs is not None for layer in own):
                    totals[group] |= {
                        key: sum(getattr(layer, key) for layer in own) for key in ("lbfgs", "lbfgs_seconds")
                    }
        return totals
