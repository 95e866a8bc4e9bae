"""Gradient fusion of a whole pipeline: several concepts into one expert, without an optimiser and without a
stored activation.

Text encoders first; then the UNet, whose text comes from the fused text encoder. Each layer's inputs are what
it sees in each concept's
own model: text encoder layers every token of the prompts, K and V of the cross-attention the concept's and
the end token's states, all
others every place of every step of one sampling run without guidance. The layer itself is solved by
`experts.fuse`.

Source: Mix-of-Show (Gu et al., NeurIPS 2023) and its code for what is fused with what; the closed form is
this package's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleValueError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.experts.merge import merge
from mole_kernels.methods.mix_of_show.collect import Site, passes
from mole_kernels.methods.mix_of_show.concept import Concept
from mole_kernels.methods.mix_of_show.fusion_records import (
    GROUPS,
    FusedConcepts,
    FusionSettings,
    Progress,
)
from mole_kernels.methods.mix_of_show.fusion_run import FusionRun
from mole_kernels.methods.mix_of_show.tokens import (
    check_apart,
    concept_tokens,
    cross_attentions,
    portable,
    random_words,
    text_encoders,
)
from mole_kernels.patching.plan import plan


@dataclass(frozen=True)
class FusionPlan:
    """What a fusion will do: groups of layers, each with `runs` sampling runs of every concept, and the
    bytes of the largest.
    """

    text: list[list[Site]]
    cross: list[Site]
    unet: list[list[Site]]
    concepts: int
    runs: int = 1

    @property
    def sites(self) -> list[Site]:
        return [site for part in (*self.text, self.cross, *self.unet) for site in part]

    @property
    def bytes(self) -> int:
        return max(
            sum(site.bytes for site in part)
            for part in (*self.text, *self.unet, *([site] for site in self.cross))
        )

    def __str__(self) -> str:
        count = sum(map(len, self.text)), len(self.cross), sum(map(len, self.unet))
        each = len(self.unet) * self.runs
        return (
            f"{count[0]} layers of text encoders, {count[1]} of cross-attention's K and V, {count[2]} "
            "others; "
            f"{each} x {self.concepts} = {each * self.concepts} sampling runs; sums of up to "
            f"{self.bytes / 1e6:.1f} MB"
        )


def plan_fusion(pipe: Any, concepts: Sequence[Concept], settings: FusionSettings | None = None) -> FusionPlan:
    """What `fuse_pipeline` would do; every name and size is checked, nothing is changed.

    Raises MoleValueError (names, tokens, memory), MoleKeyError and MoleShapeError (an expert of another base,
    with the shapes).
    """
    _check(concepts)
    settings = settings or FusionSettings()
    lots = settings.lots
    patch_plan = plan(pipe, {concept.name: concept.expert for concept in concepts}, allow_large_rank=True)
    order = list(cross_attentions(pipe.unet))
    sites = []
    for path, layer in patch_plan.layers.items():
        component, _, rest = path.partition(".")
        owner, _, last = rest.rpartition(".")
        group, index = GROUPS[2], None
        if component in text_encoders(pipe):
            group = GROUPS[0]
        elif component != "unet":
            raise MoleKeyError(f"fuse, {printable(path)}", "is neither in the UNet nor in a text encoder")
        elif owner in order and last in ("to_k", "to_v"):
            group, index = GROUPS[1], order.index(owner)
        sites.append(Site(path, layer.module, layer.factors, group, index, len(lots)))
    budget = settings.memory
    by_group = {group: [site for site in sites if site.group == group] for group in GROUPS}
    passes(by_group[GROUPS[1]], budget)
    return FusionPlan(
        passes(by_group[GROUPS[0]], budget),
        by_group[GROUPS[1]],
        passes(by_group[GROUPS[2]], budget),
        len(concepts),
        sum(len(lot.runs) for lot in lots),
    )


@torch.no_grad()
def fuse_pipeline(
    pipe: Any,
    concepts: Sequence[Concept],
    settings: FusionSettings | None = None,
    progress: Progress | None = None,
) -> FusedConcepts:
    """Concepts into one expert that does to each concept's own inputs what that concept did alone.

    The pipeline is as before at the end.

    Args:
        pipe: The pipeline that the concepts were trained on.
        concepts: The concepts to fuse.
        settings: How their inputs are drawn and the layers solved; None for the defaults.
        progress: Called with (what, done, of how many); the first call says the whole plan.

    Returns:
        The fused expert, the concepts' tokens, and a report by layer.

    Raises:
        MoleError: As `plan_fusion`.
        MoleValueError: A template that does not fit the tokenizer, or inputs that are not finite.
    """
    fusion_plan, settings, tell = (
        plan_fusion(pipe, concepts, settings),
        settings or FusionSettings(),
        progress or _silent,
    )
    tell(str(fusion_plan), 0, 0)
    embeddings = {
        token: by_component for concept in concepts for token, by_component in concept.embeddings.items()
    }
    words = random_words(pipe, settings.word_tokens, settings.seed)
    with concept_tokens(pipe, embeddings | words) as tokens:
        run = FusionRun(pipe, concepts, fusion_plan.sites, settings, tokens, tell)
        text = run.text_encoders(fusion_plan.text)
        with run.fused_text(text):
            states, rows = run.states()
            crossed = run.cross_attention(fusion_plan.cross, rows)
            unet = crossed | run.others(fusion_plan.unet, states, crossed)
    source = f"gradient fusion of {', '.join(concept.name for concept in concepts)}"
    metadata = {
        "method": "mix_of_show",
        "fusion": "gradient",
        "concepts": ", ".join(concept.name for concept in concepts),
    }
    return FusedConcepts(
        Expert(portable(text | unet), source=source, metadata=metadata),
        embeddings,
        tokens.only(embeddings),
        run.reports,
    )


def fuse_by_weights(concepts: Sequence[Concept]) -> Expert:
    """The baseline W0 + Σ (α_i/n) ΔW_i as one expert."""
    _check(concepts)
    scaled = {}
    for concept in concepts:
        layers = {
            path: replace(layer, scale=layer.scale * concept.alpha(path))
            for path, layer in concept.expert.layers.items()
        }
        scaled[concept.name] = replace(concept.expert, layers=layers)
    return replace(
        merge(scaled, mode="cat"),
        source=f"weight fusion of {', '.join(concept.name for concept in concepts)}",
    )


@torch.no_grad()
def put_into_weights(pipe: Any, expert: Expert) -> int:
    """W0 + ΔW in place of the base weights, for those who want a checkpoint; returns how many layers
    changed.
    """
    patch_plan = plan(pipe, {"fused": expert}, allow_large_rank=True)
    for layer in patch_plan.layers.values():
        weight: Tensor = layer.module.weight  # type: ignore[union-attr, assignment]
        delta = layer.factors["fused"].to(device=weight.device).delta(torch.float32)
        weight.copy_((weight.float() + delta.reshape(weight.shape)).to(weight.dtype))
    return len(patch_plan.layers)


def _check(concepts: Sequence[Concept]) -> None:
    if not concepts:
        raise MoleValueError("fuse", expected="at least one concept", got="none")
    tokens = [token for concept in concepts for token in concept.embeddings]
    check_apart(tokens)
    for concept in concepts:
        if set(concept.name.split()) != set(concept.embeddings):
            raise MoleValueError(
                f"fuse: concept '{printable(concept.name)}'",
                expected=f"the tokens {', '.join(map(printable, concept.embeddings))}",
                got="the name",
                hint="prompts call a concept by all of its tokens",
            )


def _silent(what: str, done: int, total: int) -> None:
    return None
