"""Inference: pictures in, experts out, with no file between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mole_kernels.errors import MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert
from mole_kernels.methods.difflora.diffusion import noise_schedule, sample_latents
from mole_kernels.methods.difflora.features import Picture
from mole_kernels.methods.difflora.predictor import KINDS, Predictor
from mole_kernels.training.pictures import decode


@dataclass(frozen=True)
class Sampling:
    """How a person's LoRA is drawn from the diffusion model.

    Args:
        steps: Steps of the sampler.
        guidance: Classifier-free guidance; 1 for none.
        seed: Of the noise, the same for every person.
        kind: The sampler, "ddim" or "dpm".
    """

    steps: int = 20
    guidance: float = 1.0
    seed: int = 0
    kind: str = "ddim"


@torch.no_grad()
def generate_experts(
    predictor: Predictor,
    people: Mapping[str, Sequence[Picture | str | Path]],
    *,
    base: object = None,
    sampling: Sampling | None = None,
    batch_size: int = 64,
) -> ExpertBank:
    """An expert of each person, predicted from their pictures.

    Args:
        predictor: The trained model.
        people: {name: pictures, as files or PIL images}; a person's expert does not depend on who else is
            asked
            for.
        base: The model it is for: where given, its layers are checked before anything is computed.
        sampling: How the LoRAs are drawn; None for the defaults.
        batch_size: People predicted at once.

    Returns:
        A bank with one expert for each person, by name.

    Raises:
        MoleFileError: A file that is no picture.
        MoleValueError: A person without pictures, or latents that are not finite; the person is named.
        MoleShapeError, MoleKeyError: The layout does not fit the base; its layers are named.

    Example:
        >>> bank = generate_experts(predictor, {"anna": ["anna.png"], "ben": [picture, picture]}, base=pipe)
        >>> served = mk.serve(pipe, bank.experts)
    """
    wanted = sampling or Sampling()
    if not people:
        raise MoleValueError(
            "generate", expected="at least one person's pictures", got="none", hint='{"anna": ["anna.png"]}'
        )
    if base is not None:
        predictor.manifest.check_base(base)
    scheduler = noise_schedule(wanted.kind, predictor.timesteps)
    shown = {name: [_opened(picture, name) for picture in pictures] for name, pictures in people.items()}
    conditions = []
    for name, pictures in shown.items():
        prepared = predictor.prepare(pictures, f"generate, {name!r}")
        conditions.append(predictor.condition({kind: prepared[kind][None] for kind in KINDS}))
    names, experts, c = list(people), {}, predictor.denoiser.config
    for at in range(0, len(names), batch_size):
        part = names[at : at + batch_size]
        latents = sample_latents(
            predictor.denoiser,
            scheduler,
            torch.cat(conditions[at : at + batch_size]),
            (c.latent_channels, c.latent_length),
            steps=wanted.steps,
            guidance=wanted.guidance,
            seed=[wanted.seed] * len(part),
        )
        for name, latent in zip(part, latents):
            if not bool(torch.isfinite(latent).all()):
                raise MoleValueError(
                    f"generate, {name!r}",
                    expected="finite latents",
                    got="NaN or Inf",
                    hint="are the weights whole?",
                )
        for name, vector in zip(part, predictor.decode(latents).cpu()):
            experts[name] = _expert(predictor, name, vector, wanted)
    return ExpertBank(experts)


def _expert(predictor: Predictor, name: str, vector: torch.Tensor, wanted: Sampling) -> Expert:
    expert = predictor.manifest.expert(vector, source=f"difflora, {name}")
    metadata = {
        "method": "difflora",
        "identity": printable(name),
        "steps": str(wanted.steps),
        "seed": str(wanted.seed),
    }
    metadata |= {"guidance": f"{wanted.guidance:g}"}
    return Expert(expert.layers, dialect=expert.dialect, source=expert.source, metadata=metadata)


def _opened(picture: Picture | str | Path, name: str) -> Picture:
    if isinstance(picture, str | Path):
        return decode(Path(picture))
    if not hasattr(picture, "convert"):
        raise MoleTypeError(
            f"generate, {name!r}", expected="a file's path or a PIL image", got=type(picture).__name__
        )
    return picture
