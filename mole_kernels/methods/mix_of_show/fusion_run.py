"""One fusion under way: inputs of every layer are gathered concept by concept, then each layer is solved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mole_kernels.experts.fuse import Sums, fuse_by_lbfgs, fuse_layer, objective
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.methods.mix_of_show.collect import Site, listening, patched_by_one
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


def _label(what: str, number: int, count: int) -> str:
    return what if count == 1 else f"{what}, group {number + 1} of {count}"
