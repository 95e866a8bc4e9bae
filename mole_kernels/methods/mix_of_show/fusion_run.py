"""One fusion under way: inputs of every layer are gathered concept by concept, then each layer is solved."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from mole_kernels.experts.fuse import Solved, Sums, fuse_by_lbfgs, fuse_layer, objective
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.methods.mix_of_show.collect import Listening, Site, listening, patched_by_one
from mole_kernels.methods.mix_of_show.concept import Concept
from mole_kernels.methods.mix_of_show.fusion_records import (
    FusedLayer,
    FusionSettings,
    Progress,
)
from mole_kernels.methods.mix_of_show.prompts import (
    TextStates,
    encode_ids,
    layered,
    read_positions,
    token_ids,
)
from mole_kernels.methods.mix_of_show.tokens import (
    Tokens,
    text_encoders,
)
from mole_kernels.modules.scan import uncompiled
from mole_kernels.patching.apply import patch

# (lot, concept, template) -> states of a prompt that is sampled
States = Mapping[tuple[str, str, str], TextStates]


class FusionRun:
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
        self.lots = {lot.name: lot for lot in settings.lots}
        self.prompts = {
            (lot.name, c.name): [t.replace("{}", c.name) for t in lot.templates]
            for lot in settings.lots
            for c in concepts
        }
        self.ids = {key: token_ids(pipe, prompts, tokens) for key, prompts in self.prompts.items()}
        # looked at before the first minute of work: a template may be too long for the tokenizer
        self.places = {key: self._places(*key) for key in self.prompts}
        self.reports: list[FusedLayer] = []
        self.factors: dict[str, dict[str, LowRank]] = {c.name: {} for c in concepts}
        for site in sites:
            for name, factor in site.factors.items():
                self.factors[name][site.path] = factor

    def _places(self, lot: str, name: str) -> list[Tensor]:
        """Of each prompt: where the concept's tokens and the end token are; the same in every variant and
        text encoder.
        """
        concept = next(c for c in self.concepts if c.name == name)
        places: list[Tensor] = []
        for b, prompt in enumerate(self.prompts[lot, name]):
            wanted = {t: [self.tokens.ids[t]["text_encoder"][0]] for t in concept.embeddings}
            own, _, end = read_positions(
                self.pipe, self.ids[lot, name]["text_encoder"][b, 0], "text_encoder", wanted, prompt
            )
            places.append(torch.cat([own, torch.tensor([end])]))
        return places

    def text_encoders(self, parts: list[list[Site]]) -> dict[str, LowRank]:
        """Text encoder layers: all tokens of all variants up to the end token."""
        fused: dict[str, LowRank] = {}
        for number, part in enumerate(parts):
            with listening(part, list(self.lots)) as heard:
                for i, concept in enumerate(self.concepts):
                    heard.concept = concept.name
                    for component, (encoder, tokenizer) in text_encoders(self.pipe).items():
                        with patched_by_one(
                            encoder, component, self.factors[concept.name], concept.text_encoder_alpha
                        ):
                            self._read(heard, component, encoder, tokenizer)
                    self.tell(_label("text encoder", number, len(parts)), i + 1, len(self.concepts))
            fused |= self.solve(part, heard.sums)
        return fused

    def _read(self, heard: Listening, component: str, encoder: Any, tokenizer: Any) -> None:
        """Every lot's texts of the concept that is heard, equal variants once."""
        device = next(encoder.parameters()).device
        for name, lot in self.lots.items():
            heard.lot = name
            if not lot.texts:
                continue
            variants = self.ids[name, heard.concept][component][: len(lot.texts)]
            for ids in variants.flatten(0, 1).unique(dim=0).split(64):
                end = (ids == tokenizer.eos_token_id).int().argmax(1)
                heard.keep = torch.arange(ids.shape[1])[None] <= end[:, None]
                encoder(ids.to(device))

    def fused_text(self, text: Mapping[str, LowRank]) -> AbstractContextManager[Any]:
        """The pipeline with the fused expert on its text encoders."""
        if not text:
            return nullcontext()
        return patch(self.pipe, {"fused": Expert(text)}, allow_large_rank=True)

    def states(self) -> tuple[States, dict[tuple[str, str], list[Tensor]]]:
        """What the fused text encoder makes of the prompts.

        Returns:
            The states of the prompts that are sampled, and by lot and concept what K and V of the text see:
            [L,places,K] of each text. Whole states of every text would be gigabytes.
        """
        sampled: dict[tuple[str, str, str], TextStates] = {}
        rows: dict[tuple[str, str], list[Tensor]] = {key: [] for key in self.ids}
        for (lot, name), ids in self.ids.items():
            wanted = {template for template, _ in self.lots[lot].runs}
            for b, template in enumerate(self.lots[lot].templates):
                encoded = encode_ids(self.pipe, {key: own[b : b + 1] for key, own in ids.items()})
                if b < len(self.lots[lot].texts):
                    rows[lot, name].append(encoded.states[0][:, self.places[lot, name][b]])
                if template in wanted:
                    sampled[lot, name, template] = encoded
            self.tell("text states", list(self.ids).index((lot, name)) + 1, len(self.ids))
        return sampled, rows

    def cross_attention(
        self, sites: list[Site], rows: Mapping[tuple[str, str], list[Tensor]]
    ) -> dict[str, LowRank]:
        """K and V of the text: they see nothing else than text states, so nothing is sampled; one layer's
        sums at a time.
        """
        fused: dict[str, LowRank] = {}
        for number, site in enumerate(sites):
            sums = {lot: {site.path: site.sums()} for lot in self.lots}
            for (lot, name), texts in rows.items():
                if texts:
                    own = torch.cat([text[site.layer] for text in texts])
                    sums[lot][site.path].add(name, site.factors.get(name), own)
            fused |= self.solve([site], sums, quiet=True)
            self.tell("cross-attention, solved", number + 1, len(sites))
        return fused

    def others(
        self, parts: list[list[Site]], states: States, crossed: Mapping[str, LowRank]
    ) -> dict[str, LowRank]:
        """All other layers: every place of every step of sampling runs of each concept's own UNet.

        Args:
            crossed: The fused K and V of the text.
        """
        fused: dict[str, LowRank] = {}
        for number, part in enumerate(parts):
            with listening(part, list(self.lots)) as heard:
                for concept in self.concepts:
                    heard.concept = concept.name
                    label = f"{_label('unet', number, len(parts))}, sampling {concept.name}"
                    self._sample_lots(heard, concept, states, crossed, label)
            fused |= self.solve(part, heard.sums)
        return fused

    def _sample_lots(
        self, heard: Listening, concept: Concept, states: States, crossed: Mapping[str, LowRank], label: str
    ) -> None:
        """Every lot's sampling runs of one concept's UNet."""
        unet = uncompiled(self.pipe.unet)
        own = {path: scaled(f, concept.unet_alpha) for path, f in self.factors[concept.name].items()}
        if self.settings.fused_text_layers:
            own |= crossed
        tokens = next(iter(states.values())).tokens
        with patched_by_one(unet, "unet", own, 1.0), layered(unet, tokens):
            for heard.lot, lot in self.lots.items():
                for run, (template, seed) in enumerate(lot.runs):
                    run_label = f"{label}, {lot.name} {run + 1} of {len(lot.runs)}"
                    self.sample(states[lot.name, concept.name, template], seed, run_label)

    def sample(self, states: TextStates, seed: int, label: str) -> None:
        """One run without guidance, latents only."""
        settings = self.settings
        arguments: dict[str, Any] = {
            "prompt_embeds": states.flat,
            "guidance_scale": 1.0,
            "output_type": "latent",
        }
        if states.pooled is not None:
            arguments["pooled_prompt_embeds"] = states.pooled
        size = {
            key: value
            for key, value in (("height", settings.height), ("width", settings.width))
            if value is not None
        }

        def heard(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            self.tell(label, step + 1, settings.steps)
            return kwargs

        self.pipe(
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=heard,
            **arguments,
            **size,
        )

    def solve(
        self, sites: Sequence[Site], sums: Mapping[str, Mapping[str, Sums]], quiet: bool = False
    ) -> dict[str, LowRank]:
        """The closed form on each layer, and a line of report.

        Args:
            sums: Lot -> path -> sums.
            quiet: Say nothing of progress.
        """
        fused: dict[str, LowRank] = {}
        for number, site in enumerate(sites):
            fused[site.path] = self._solve({lot: by_path[site.path] for lot, by_path in sums.items()}, site)
            if not quiet:
                self.tell(f"{site.group}, solved", number + 1, len(sites))
        return fused

    def _solve(self, sums: Mapping[str, Sums], site: Site) -> LowRank:
        own = sums["fit"]
        alphas = {c.name: c.alpha(site.path) for c in self.concepts if c.name in site.factors}
        solved = fuse_layer(
            site.factors,
            own,
            alphas,
            cutoff=self.settings.cutoff,
            ridge=self.settings.ridge or 0.0,
            choose=sums.get("choose"),
            held=sums.get("held"),
        )
        lbfgs, lbfgs_seconds, others = self._by_lbfgs(site, sums, alphas)
        self.reports.append(
            FusedLayer(
                site.path,
                site.group,
                dict(own.rows),
                site.K,
                solved.factor.rank,
                solved.base,
                solved.by_weights,
                solved.fused,
                solved.directions,
                solved.condition,
                solved.seconds,
                lbfgs,
                lbfgs_seconds,
                _note(solved, sum(own.rows.values()), sum(f.rank for f in site.factors.values())),
                solved.gradient,
                None if math.isinf(solved.ridge) else solved.ridge,
                solved.towards,
                None if solved.held is None else asdict(solved.held) | others,
            )
        )
        return solved.factor.to(device="cpu")

    def _by_lbfgs(
        self, site: Site, sums: Mapping[str, Sums], alphas: Mapping[str, float]
    ) -> tuple[float | None, float | None, dict[str, float]]:
        """The objective that the optimiser ends at, its seconds, and {"lbfgs": the held-out objective}; where
        there is nothing to fit, those of the base it starts from.
        """
        if not self.settings.lbfgs:
            return None, None, {}
        begun, delta = time.perf_counter(), None
        if sums["fit"].cross:
            dense = fuse_by_lbfgs(site.factors, sums["fit"], alphas, self.settings.lbfgs).double()
            delta = LowRank(dense, torch.eye(len(dense), dtype=dense.dtype, device=dense.device))
        seconds = time.perf_counter() - begun
        fitted = objective(site.factors, sums["fit"], alphas, delta)
        held = sums.get("held")
        others = {} if held is None else {"lbfgs": objective(site.factors, held, alphas, delta)}
        return fitted, seconds, others


def _note(solved: Solved, rows: int, wanted: int) -> str:
    if not rows:
        return "no inputs: weight fusion"
    if math.isinf(solved.ridge):
        return "weight fusion, which is better on other inputs"
    return f"{rows} inputs for a rank of {wanted}" if rows < wanted else ""


def scaled(factor: LowRank, alpha: float) -> LowRank:
    """The factor with alpha in its scale."""
    return replace(factor, scale=factor.scale * alpha)


def _label(what: str, number: int, count: int) -> str:
    return what if count == 1 else f"{what}, group {number + 1} of {count}"
