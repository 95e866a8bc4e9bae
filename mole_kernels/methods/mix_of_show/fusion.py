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

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleValueError, printable
from mole_kernels.experts.fuse import Sums, fuse_by_lbfgs, fuse_layer, objective
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.merge import merge
from mole_kernels.methods.mix_of_show.collect import Site, listening, passes, patched_by_one
from mole_kernels.methods.mix_of_show.concept import Concept
from mole_kernels.methods.mix_of_show.prompts import (
    TextStates,
    encode_ids,
    layered,
    read_positions,
    token_ids,
)
from mole_kernels.methods.mix_of_show.tokens import (
    Tokens,
    check_apart,
    concept_tokens,
    cross_attentions,
    portable,
    text_encoders,
)
from mole_kernels.modules.scan import uncompiled
from mole_kernels.patching.apply import patch
from mole_kernels.patching.plan import plan

# (what is being done, how much of it is done, of how much)
Progress = Callable[[str, int, int], None]
GROUPS = ("text encoder", "cross-attention", "unet")


@dataclass(frozen=True)
class FusionSettings:
    """How inputs are gathered and layers solved.

    templates  prompts; {} is the concept. The first is the one that is sampled
    steps      of the sampling run (the paper's code: 20, or 50 in its first version)
    height, width  of its picture; None for the pipeline's own
    memory     bytes that the sums may take at once, None for no limit; with less, layers go in groups, each
               with sampling runs of its own
    cutoff, ridge  see `experts.fuse.fuse_layer`
    lbfgs      steps of the paper's optimiser on every layer too, for the report alone (the paper takes 500);
               0 for none
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

    rows        concept -> inputs seen       K  inputs of the layer     rank  of the result
    base, by_weights, fused  the objective of the base, of weight fusion and of the result
    directions  of K that the inputs reach   condition  largest ÷ smallest eigenvalue among them
    seconds     to solve it
    lbfgs, lbfgs_seconds  the objective where the optimiser stops, and how long it took; None where it was not
                          asked for
    note        what to know about it: no inputs, fewer inputs than ranks; "" where nothing
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


@dataclass(frozen=True)
class FusionPlan:
    """What a fusion will do: groups of layers, each with as many runs as there are concepts, and the bytes of
    the largest.
    """

    text: list[list[Site]]
    cross: list[Site]
    unet: list[list[Site]]
    concepts: int

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
        runs = len(self.unet) * self.concepts
        return (
            f"{count[0]} layers of text encoders, {count[1]} of cross-attention's K and V, {count[2]} others; "
            f"{len(self.unet)} x {self.concepts} = {runs} sampling runs; sums of up to {self.bytes / 1e6:.1f} MB"
        )


def plan_fusion(pipe: Any, concepts: Sequence[Concept], settings: FusionSettings | None = None) -> FusionPlan:
    """What `fuse_pipeline` would do; every name and size is checked, nothing is changed.

    Raises MoleValueError (names, tokens, memory), MoleKeyError and MoleShapeError (an expert of another base,
    with the shapes).
    """
    _check(concepts)
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
        sites.append(Site(path, layer.module, layer.factors, group, index))
    budget = (settings or FusionSettings()).memory
    by_group = {group: [site for site in sites if site.group == group] for group in GROUPS}
    passes(by_group[GROUPS[1]], budget)
    return FusionPlan(
        passes(by_group[GROUPS[0]], budget),
        by_group[GROUPS[1]],
        passes(by_group[GROUPS[2]], budget),
        len(concepts),
    )


@torch.no_grad()
def fuse_pipeline(
    pipe: Any,
    concepts: Sequence[Concept],
    settings: FusionSettings | None = None,
    progress: Progress | None = None,
) -> FusedConcepts:
    """Concepts into one expert that does to each concept's own inputs what that concept did alone; the
    pipeline is as before at the end.

    progress  hears (what, done, of how many); the first call says the whole plan
    Errors are those of `plan_fusion`, and MoleValueError where a template does not fit the tokenizer or
    inputs are not finite.
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
    with concept_tokens(pipe, embeddings) as tokens:
        run = _Run(pipe, concepts, fusion_plan.sites, settings, tokens, tell)
        text = run.text_encoders(fusion_plan.text)
        with run.fused_text(text):
            states = run.states()
            unet = run.cross_attention(fusion_plan.cross, states) | run.others(fusion_plan.unet, states)
    source = f"gradient fusion of {', '.join(concept.name for concept in concepts)}"
    metadata = {
        "method": "mix_of_show",
        "fusion": "gradient",
        "concepts": ", ".join(concept.name for concept in concepts),
    }
    return FusedConcepts(
        Expert(portable(text | unet), source=source, metadata=metadata), embeddings, tokens, run.reports
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


class _Run:
    """One fusion on its way: the pipeline holds the concepts' tokens."""

    def __init__(
        self,
        pipe: Any,
        concepts: Sequence[Concept],
        sites: Sequence[Site],
        settings: FusionSettings,
        tokens: Tokens,
        tell: Progress,
    ) -> None:
        self.pipe, self.concepts, self.settings, self.tokens, self.tell = (
            pipe,
            concepts,
            settings,
            tokens,
            tell,
        )
        self.prompts = {c.name: [t.replace("{}", c.name) for t in settings.templates] for c in concepts}
        self.ids = {name: token_ids(pipe, prompts, tokens) for name, prompts in self.prompts.items()}
        # looked at before the first minute of work: a template may be too long for the tokenizer
        self.places = {name: self._places(name) for name in self.prompts}
        self.reports: list[FusedLayer] = []
        self.factors: dict[str, dict[str, LowRank]] = {c.name: {} for c in concepts}
        for site in sites:
            for name, factor in site.factors.items():
                self.factors[name][site.path] = factor

    def _places(self, name: str) -> list[Tensor]:
        """Of each prompt: where the concept's tokens and the end token are; the same in every variant and
        text encoder.
        """
        concept = next(c for c in self.concepts if c.name == name)
        places: list[Tensor] = []
        for b, prompt in enumerate(self.prompts[name]):
            wanted = {t: [self.tokens.ids[t]["text_encoder"][0]] for t in concept.embeddings}
            own, _, end = read_positions(
                self.pipe, self.ids[name]["text_encoder"][b, 0], "text_encoder", wanted, prompt
            )
            places.append(torch.cat([own, torch.tensor([end])]))
        return places

    def text_encoders(self, parts: list[list[Site]]) -> dict[str, LowRank]:
        """Text encoder layers: all tokens of all variants up to the end token."""
        fused: dict[str, LowRank] = {}
        for number, part in enumerate(parts):
            with listening(part) as heard:
                for i, concept in enumerate(self.concepts):
                    heard.concept = concept.name
                    for component, (encoder, tokenizer) in text_encoders(self.pipe).items():
                        with patched_by_one(
                            encoder, component, self.factors[concept.name], concept.text_encoder_alpha
                        ):
                            for ids in (
                                self.ids[concept.name][component].flatten(0, 1).unique(dim=0).split(64)
                            ):
                                end = (ids == tokenizer.eos_token_id).int().argmax(1)
                                heard.keep = torch.arange(ids.shape[1])[None] <= end[:, None]
                                encoder(ids.to(next(encoder.parameters()).device))
                    self.tell(_label("text encoder", number, len(parts)), i + 1, len(self.concepts))
            fused |= self.solve(part, heard.sums)
        return fused

    def fused_text(self, text: Mapping[str, LowRank]) -> AbstractContextManager[Any]:
        """The pipeline with the fused expert on its text encoders."""
        if not text:
            return nullcontext()
        return patch(self.pipe, {"fused": Expert(text)}, allow_large_rank=True)

    def states(self) -> dict[str, TextStates]:
        """concept -> states of its prompts, from the fused text encoder."""
        return {name: encode_ids(self.pipe, ids) for name, ids in self.ids.items()}

    def cross_attention(self, sites: list[Site], states: Mapping[str, TextStates]) -> dict[str, LowRank]:
        """K and V of the text: they see nothing else than text states, so nothing is sampled; one Gram matrix
        at a time.
        """
        fused: dict[str, LowRank] = {}
        for number, site in enumerate(sites):
            sums = site.sums()
            for name, text_states in states.items():
                rows = [
                    text_states.states[b, site.layer, places] for b, places in enumerate(self.places[name])
                ]
                sums.add(name, site.factors.get(name), torch.cat(rows))
            fused |= self.solve([site], {site.path: sums}, quiet=True)
            self.tell("cross-attention, solved", number + 1, len(sites))
        return fused

    def others(self, parts: list[list[Site]], states: Mapping[str, TextStates]) -> dict[str, LowRank]:
        """All other layers: every place of every step of a sampling run of each concept's own UNet."""
        fused: dict[str, LowRank] = {}
        for number, part in enumerate(parts):
            with listening(part) as heard:
                for concept in self.concepts:
                    heard.concept = concept.name
                    label = f"{_label('unet', number, len(parts))}, sampling {concept.name}"
                    self.sample(concept, states[concept.name], label)
            fused |= self.solve(part, heard.sums)
        return fused

    def sample(self, concept: Concept, states: TextStates, label: str) -> None:
        """One run without guidance of one concept's UNet, latents only."""
        settings, unet = self.settings, uncompiled(self.pipe.unet)
        arguments: dict[str, Any] = {
            "prompt_embeds": states.flat[:1],
            "guidance_scale": 1.0,
            "output_type": "latent",
        }
        if states.pooled is not None:
            arguments["pooled_prompt_embeds"] = states.pooled[:1]
        size = {
            key: value
            for key, value in (("height", settings.height), ("width", settings.width))
            if value is not None
        }

        def heard(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            self.tell(label, step + 1, settings.steps)
            return kwargs

        generator = torch.Generator().manual_seed(settings.seed)
        with (
            patched_by_one(unet, "unet", self.factors[concept.name], concept.unet_alpha),
            layered(unet, states.tokens),
        ):
            self.pipe(
                num_inference_steps=settings.steps,
                generator=generator,
                callback_on_step_end=heard,
                **arguments,
                **size,
            )

    def solve(
        self, sites: Sequence[Site], sums: Mapping[str, Sums], quiet: bool = False
    ) -> dict[str, LowRank]:
        """The closed form on each layer, and a line of report."""
        return dict(self._solved(sites, sums, quiet))

    def _solved(
        self, sites: Sequence[Site], sums: Mapping[str, Sums], quiet: bool
    ) -> Iterator[tuple[str, LowRank]]:
        for number, site in enumerate(sites):
            own = sums[site.path]
            alphas = {c.name: c.alpha(site.path) for c in self.concepts if c.name in site.factors}
            begun = time.perf_counter()
            fused = fuse_layer(
                site.factors, own, alphas, cutoff=self.settings.cutoff, ridge=self.settings.ridge
            )
            seconds = time.perf_counter() - begun
            factor = fused.factor.to(device="cpu")
            rows, wanted = sum(own.rows.values()), sum(f.rank for f in site.factors.values())
            note = (
                "no inputs: weight fusion"
                if not rows
                else f"{rows} inputs for a rank of {wanted}"
                if rows < wanted
                else ""
            )
            self.reports.append(
                FusedLayer(
                    site.path,
                    site.group,
                    dict(own.rows),
                    site.K,
                    factor.rank,
                    fused.base,
                    fused.by_weights,
                    fused.fused,
                    fused.directions,
                    fused.condition,
                    seconds,
                    *self._by_lbfgs(site, own, alphas),
                    note,
                )
            )
            if not quiet:
                self.tell(f"{site.group}, solved", number + 1, len(sites))
            yield site.path, factor

    def _by_lbfgs(
        self, site: Site, sums: Sums, alphas: Mapping[str, float]
    ) -> tuple[float | None, float | None]:
        """The objective that the optimiser ends at, and its seconds; where there is nothing to fit, that of
        the base it starts from.
        """
        if not self.settings.lbfgs:
            return None, None
        if not sums.cross:
            return objective(site.factors, sums, alphas, None), 0.0
        begun = time.perf_counter()
        delta = fuse_by_lbfgs(site.factors, sums, alphas, self.settings.lbfgs).double()
        seconds = time.perf_counter() - begun
        return objective(
            site.factors,
            sums,
            alphas,
            LowRank(delta, torch.eye(len(delta), dtype=delta.dtype, device=delta.device)),
        ), seconds


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


def _label(what: str, number: int, count: int) -> str:
    return what if count == 1 else f"{what}, group {number + 1} of {count}"


def _silent(what: str, done: int, total: int) -> None:
    return None
