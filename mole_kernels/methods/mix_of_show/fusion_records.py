"""What a fusion is asked for, and what it reports: settings, figures per layer, the fused concepts."""

from __future__ import annotations

import math
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
# the paper's two, and four of ours; then what chooses, and what judges
TEMPLATES = ("photo of a {}", "{}", "a picture of {}", "{} outdoors", "close view of {}", "{} at night")
CHOOSE_TEMPLATES = ("a painting of {}", "{} in a room")
HELD_TEMPLATES = ("a drawing of {}", "{} near water")
# what stands for a word with a random embedding
WORD = "<random-word-{}>"
# how far apart the seeds of fitted, choosing and judging runs begin
APART = 10_000


@dataclass(frozen=True)
class Lot:
    """Inputs gathered for one purpose.

    Args:
        name: "fit", "choose" or "held".
        texts: Templates whose text states and text encoder inputs count; () where none is left for it.
        runs: (template, seed) of each sampling run.
    """

    name: str
    texts: tuple[str, ...]
    runs: tuple[tuple[str, int], ...]

    @property
    def templates(self) -> tuple[str, ...]:
        """All that are encoded, each once."""
        return tuple(dict.fromkeys((*self.texts, *(template for template, _ in self.runs))))


@dataclass(frozen=True)
class FusionSettings:
    """How inputs are gathered and layers solved.

    Args:
        templates: Prompts that are fitted; {} is the concept. Run r samples template r mod their number.
        words: For the layers that see text, so many more prompts "WORD {}" are fitted, and a quarter as many
            choose, each with a word of random embedding (see `tokens.random_words`): no list of templates
            covers the words that prompts come with. 0 for none, as in the paper.
        runs: Sampling runs that are fitted, for each concept, each with a seed of its own.
        choose_templates: Prompts that choose the ridge; () takes `templates` for the sampling runs.
        choose_runs: Sampling runs that choose; 0 for no choice.
        held_templates: Prompts that judge; () likewise.
        held_runs: Sampling runs that judge the result, for the report alone; 0 for none.
        steps: Of a sampling run (the paper's code: 20, or 50 in its first version).
        height: Of its picture in pixels; None for the pipeline's own.
        width: Likewise.
        memory: Bytes that the sums may take at once, None for no limit; with less, layers go in groups,
            each with sampling runs of its own.
        cutoff: See `experts.fuse.fuse_layer`.
        ridge: See `experts.ridge`; None chooses it layer by layer, together with where it leads to.
        fused_text_layers: Sample for the other layers with the fused K and V of the cross-attention in
            place, as the paper's code does; else with the concept's own.
        lbfgs: Steps of the paper's optimiser on every layer too, for the report alone (the paper takes
            500); 0 for none.
    """

    templates: tuple[str, ...] = TEMPLATES
    words: int = 256
    runs: int = 8
    choose_templates: tuple[str, ...] | None = None
    choose_runs: int = 4
    held_templates: tuple[str, ...] | None = None
    held_runs: int = 2
    steps: int = 20
    height: int | None = None
    width: int | None = None
    seed: int = 0
    memory: int | None = None
    cutoff: float = 1e-12
    ridge: float | None = None
    fused_text_layers: bool = False
    lbfgs: int = 0

    def __post_init__(self) -> None:
        others = (*(self.choose_templates or ()), *(self.held_templates or ()))
        if not self.templates or any("{}" not in t for t in (*self.templates, *others)):
            raise MoleValueError(
                "fuse: templates",
                expected="texts with {} for the concept",
                got=printable((*self.templates, *others)),
            )
        if twice := sorted(set(self.templates) & set(others)):
            raise MoleValueError(
                "fuse: templates",
                f"{printable(twice[0])} is fitted and held out",
                hint="what is fitted can neither choose nor judge",
            )
        for name in ("runs", "choose_runs", "held_runs", "words"):
            if getattr(self, name) < (name == "runs"):
                at_least = "at least 1" if name == "runs" else "at least 0"
                raise MoleValueError(f"fuse: {name}", expected=at_least, got=getattr(self, name))
        if self.steps < 1:
            raise MoleValueError("fuse: steps", expected="at least 1", got=self.steps)
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise MoleValueError("fuse: ridge", expected="a number >= 0, or None", got=self.ridge)
        if self.lbfgs < 0:
            raise MoleValueError("fuse: lbfgs", expected="steps >= 0", got=self.lbfgs)

    @property
    def lots(self) -> tuple[Lot, ...]:
        """What is fitted, then what chooses and what judges, where asked for."""
        lots = [self._lot("fit", self.templates, self.runs, 0, self.word_tokens[: self.words])]
        if self.ridge is None and self.choose_runs:
            own = self._others(self.choose_templates, CHOOSE_TEMPLATES)
            words = self.word_tokens[self.words :]
            lots.append(self._lot("choose", own, self.choose_runs, APART, words))
        if self.held_runs:
            own = self._others(self.held_templates, HELD_TEMPLATES)
            lots.append(self._lot("held", own, self.held_runs, 2 * APART))
        return tuple(lots)

    @property
    def word_tokens(self) -> tuple[str, ...]:
        """What stands for the random words: those that are fitted, then those that choose."""
        return tuple(WORD.format(i) for i in range(self.words + self.words // 4))

    def _others(self, asked: tuple[str, ...] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
        if asked is not None:
            return asked
        return usual if self.templates == TEMPLATES else ()

    def _lot(
        self, name: str, texts: tuple[str, ...], count: int, first: int, words: tuple[str, ...] = ()
    ) -> Lot:
        sampled = texts or self.templates
        runs = [(sampled[r % len(sampled)], self.seed + first + r) for r in range(count)]
        return Lot(name, (*texts, *(f"{word} {{}}" for word in words)), tuple(runs))


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
        gradient: Objective of the closed form without a ridge.
        ridge: ρ that was taken; None for weight fusion itself.
        towards: Where it leads to, "base" or "weights".
        held: base, by_weights, gradient and fused on inputs that neither fitted nor chose; None without.
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
    gradient: float = 0.0
    ridge: float | None = 0.0
    towards: str = "base"
    held: dict[str, float] | None = None

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
        """group -> sums over its layers.

        Of the objectives and the seconds; of LBFGS's, and of the held-out ones (held_base, held_by_weights,
        held_gradient, held_fused), where every layer has them; and weight_fused, how many layers fell back.
        """
        totals = {}
        for group in GROUPS:
            own = [layer for layer in self.layers if layer.group == group]
            if own:
                totals[group] = {
                    key: sum(getattr(layer, key) for layer in own)
                    for key in ("base", "by_weights", "gradient", "fused")
                }
                totals[group] |= {"layers": len(own), "seconds": sum(layer.seconds for layer in own)}
                totals[group]["weight_fused"] = sum(layer.ridge is None for layer in own)
                held = [layer.held for layer in own if layer.held is not None]
                if len(held) == len(own):
                    totals[group] |= {f"held_{key}": sum(row[key] for row in held) for key in held[0]}
                if all(layer.lbfgs is not None for layer in own):
                    totals[group] |= {
                        key: sum(getattr(layer, key) for layer in own) for key in ("lbfgs", "lbfgs_seconds")
                    }
        return totals
