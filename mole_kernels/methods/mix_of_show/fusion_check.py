"""How far a fused model's predicted noise is from each concept's own, on runs that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError
from mole_kernels.experts.lowrank import Expert
from mole_kernels.methods.mix_of_show.concept import Concept, at_weights
from mole_kernels.methods.mix_of_show.prompts import encode_prompts, layered, sample_concepts
from mole_kernels.methods.mix_of_show.tokens import Tokens
from mole_kernels.patching.apply import patch


@dataclass(frozen=True)
class _Seen:
    """One call of the UNet while a concept drew by itself."""

    sample: Tensor
    timestep: Any
    more: Mapping[str, Any]
    noise: Tensor


@torch.no_grad()
def noise_errors(
    pipe: Any,
    concepts: Sequence[Concept],
    fused: Mapping[str, Expert],
    tokens: Tokens,
    templates: Sequence[str],
    seeds: Sequence[int],
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Σ ‖ε_fused − ε_own‖² / Σ ‖ε_base − ε_own‖², over all steps of runs that each concept draws by itself.

    Every model predicts from the same noisy latents and from its own text states. 0 is the concept's own
    model, 1 the base model, which has the concepts' embeddings and no expert. Without guidance.

    Args:
        pipe: A pipeline that holds the concepts' tokens (`concept_tokens`).
        concepts: The concepts.
        fused: Name -> expert to judge, as "gradient fusion" and "weight fusion".
        tokens: The tokens in the pipeline.
        templates: Prompts with {} for the concept, best ones that no fusion was fitted on.
        seeds: One sampling run of every template for each.
        options: Of the pipeline: num_inference_steps, height, width.

    Returns:
        Name -> concept -> error.

    Raises:
        MoleValueError: No template, one without {}, no seed, or a concept that changes nothing.
    """
    if not templates or not seeds or any("{}" not in template for template in templates):
        raise MoleValueError(
            "noise_errors", expected="templates with {} and seeds", got=f"{list(templates)}, {list(seeds)}"
        )
    errors: dict[str, dict[str, float]] = {name: {} for name in fused}
    for concept in concepts:
        models = {"own": at_weights(concept), "base": None} | dict(fused)
        sums = dict.fromkeys(models, 0.0)
        for template in templates:
            prompt = template.replace("{}", concept.name)
            runs = [_own_run(pipe, models["own"], prompt, tokens, seed, options) for seed in seeds]
            for name, expert in models.items():
                sums[name] += _distance(pipe, expert, prompt, tokens, [seen for run in runs for seen in run])
        if sums["base"] == 0:
            raise MoleValueError(f"noise_errors, {concept.name}", "the expert changes nothing")
        for name in fused:
            errors[name][concept.name] = sums[name] / sums["base"]
    return errors


def _own_run(
    pipe: Any, expert: Expert | None, prompt: str, tokens: Tokens, seed: int, options: Mapping[str, Any]
) -> list[_Seen]:
    seen: list[_Seen] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        more = {key: value for key, value in kwargs.items() if key == "added_cond_kwargs" and value}
        seen.append(_Seen(args[0].clone(), args[1], more, _noise(out).clone()))

    assert expert is not None
    with patch(pipe, {"own": expert}, allow_large_rank=True):
        hook = pipe.unet.register_forward_hook(keep, with_kwargs=True)
        try:
            generator = torch.Generator().manual_seed(seed)
            sample_concepts(
                pipe, [prompt], tokens, None, generator=generator, output_type="latent", **options
            )
        finally:
            hook.remove()
    return seen


def _distance(pipe: Any, expert: Expert | None, prompt: str, tokens: Tokens, seen: Sequence[_Seen]) -> float:
    """Σ ‖ε − ε_own‖² of one model."""
    if expert is None:
        return _sum(pipe, prompt, tokens, seen)
    with patch(pipe, {"fused": expert}, allow_large_rank=True):
        return _sum(pipe, prompt, tokens, seen)


def _sum(pipe: Any, prompt: str, tokens: Tokens, seen: Sequence[_Seen]) -> float:
    states = encode_prompts(pipe, [prompt], tokens)
    total = 0.0
    with layered(pipe.unet, states.tokens):
        for call in seen:
            more = {key: dict(value) for key, value in call.more.items()}
            if states.pooled is not None:
                more["added_cond_kwargs"]["text_embeds"] = states.pooled
            out = pipe.unet(call.sample, call.timestep, encoder_hidden_states=states.flat, **more)
            total += (_noise(out).double() - call.noise.double()).square().sum().item()
    return total


def _noise(out: Any) -> Tensor:
    noise: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return noise
