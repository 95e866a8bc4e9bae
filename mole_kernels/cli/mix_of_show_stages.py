"""What `mole-kernels mix-of-show` and `train mix-of-show` do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mole_kernels.cli.mix_of_show import (
    ConceptDrawArgs,
    ConceptRegionsArgs,
    ConceptSampleArgs,
    PaperTrainArgs,
)
from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.place import ready_folder
from mole_kernels.cli.screen import done, facts, out
from mole_kernels.cli.training import (
    is_main,
    named_dtype,
    pipeline_with_unet,
    ready_run,
    resolution_of,
    run_options,
)
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.text import read_text
from mole_kernels.files.writer import atomic_write
from mole_kernels.methods.mix_of_show.augmented import PLACE, AugmentedConcept
from mole_kernels.methods.mix_of_show.concept import at_weights, load_concept, save_concept
from mole_kernels.methods.mix_of_show.edlora import train_edlora
from mole_kernels.methods.mix_of_show.folder import read_fused
from mole_kernels.methods.mix_of_show.paper_options import ValidationOptions, read_paper_options
from mole_kernels.methods.mix_of_show.prompts import sample_concepts
from mole_kernels.methods.mix_of_show.regions import Region, parse_regions, read_regions
from mole_kernels.methods.mix_of_show.sampling import regional
from mole_kernels.methods.mix_of_show.tokens import Tokens, concept_tokens
from mole_kernels.patching.apply import patch

METADATA = "metadata.jsonl"


def train_by_options(asked: PaperTrainArgs) -> None:
    """Train one concept as its options file says, and write it."""
    options = read_paper_options(asked.options, mixed_precision=torch.cuda.is_available())
    if options.training is None:
        raise MoleValueError(
            printable(asked.options, 300),
            expected="options for training",
            got="options for sampling",
            hint="mole-kernels mix-of-show sample --options",
        )
    training = options.training
    if asked.steps is not None:
        training = replace(training, config=replace(training.config, steps=asked.steps))
    ready_run(asked)
    if is_main():
        out().print(
            facts(
                {
                    "concept": " ".join(f"{token} from {start}" for token, start in options.tokens.items()),
                    "pictures": len(options.pictures),
                    "steps": training.config.steps,
                    "masked, attention": f"{training.masked}, {training.attention:g}",
                    "model": asked.model or options.model,
                }.items()
            )
        )
    pipe = pipeline_with_unet(asked.model or options.model, named_dtype(asked.dtype, training.config))
    batches = AugmentedConcept(
        pipe,
        options.pictures,
        options.tokens,
        options.batch_size,
        options.augmentation,
        seed=training.config.seed,
    )
    if asked.dry_run:
        if is_main():
            out().print("options, pictures, captions and tokens are right; nothing trained")
        return
    concept = train_edlora(pipe, batches, options.tokens, training, **run_options(asked))
    if is_main():
        save_concept(concept, asked.out)
        done(str(asked.out), f"concept {concept.name}, late loss {concept.expert.metadata['loss']}")


def sample(asked: ConceptSampleArgs) -> None:
    """Pictures of every alpha, prompt and sample."""
    wanted = _validation(asked)
    expert, embeddings, name = _read(asked.concept)
    prompts = [prompt.replace(PLACE, name) for prompt in wanted.prompts]
    ready_folder(asked.out)
    pipe, rows = _pipeline(asked), []
    options = _options(asked, wanted)
    with concept_tokens(pipe, embeddings) as tokens:
        for alpha in wanted.alphas:
            scaled = _at(expert, alpha)
            for number, prompt in enumerate(prompts):
                for n in range(wanted.samples):
                    with scaled(pipe):
                        image = _draw(pipe, prompt, tokens, asked, n, options)
                    file = f"alpha_{alpha:g}-prompt_{number:03d}-{n:03d}.png"
                    rows.append({"file_name": file, "text": prompt, "alpha": alpha, "seed": asked.seed + n})
                    _save(image, asked.out / file)
    _write_rows(asked.out, rows)
    done(str(asked.out), f"{len(rows)} pictures of {len(prompts)} prompts, {len(wanted.alphas)} alphas")


def sample_regions(asked: ConceptRegionsArgs) -> None:
    """Pictures drawn by regions."""
    size = resolution_of(asked.resolution) or 512
    height, width = (size, size) if isinstance(size, int) else size
    expert, embeddings, name = _read(asked.concept)
    regions = [
        replace(region, prompt=region.prompt.replace(PLACE, name))
        for region in _regions(asked, height, width)
    ]
    ready_folder(asked.out)
    pipe, rows = _pipeline(asked), []
    options = _options(asked, ValidationOptions()) | {"height": height, "width": width}
    with (
        concept_tokens(pipe, embeddings) as tokens,
        patch(pipe, {"concept": expert}, allow_large_rank=True),
        regional(pipe, regions, tokens=tokens),
    ):
        for n in range(asked.samples):
            image = _draw(pipe, asked.prompt.replace(PLACE, name), tokens, asked, n, options)
            file = f"regions-{n:03d}.png"
            rows.append({"file_name": file, "text": asked.prompt, "seed": asked.seed + n})
            _save(image, asked.out / file)
    _write_rows(asked.out, rows)
    done(str(asked.out), f"{len(rows)} pictures of {len(regions)} regions")


def _validation(asked: ConceptSampleArgs) -> ValidationOptions:
    """What is drawn: the options file's, with what the command line says in its place."""
    wanted = (
        ValidationOptions(samples=asked.samples)
        if asked.options is None
        else read_paper_options(asked.options).validation
    )
    if asked.prompt:
        wanted = replace(wanted, prompts=tuple(asked.prompt))
    if not wanted.prompts:
        raise MoleValueError("--prompt", expected="a prompt, or --options with some", got="none")
    if asked.alphas is not None:
        try:
            alphas = tuple(float(text) for text in asked.alphas.split(","))
        except ValueError:
            alphas = (math.nan,)
        if not all(map(math.isfinite, alphas)):
            raise MoleValueError("--alphas", expected="numbers, as in 0,0.7,1", got=printable(asked.alphas))
        wanted = replace(wanted, alphas=alphas)
    return wanted


def _read(path: Path) -> tuple[Expert, Mapping[str, Any], str]:
    """(expert at its alphas, embeddings, how prompts call it) of a concept or a fused folder."""
    if path.is_dir():
        expert, embeddings = read_fused(path)
        return expert, embeddings, " ".join(embeddings)
    concept = load_concept(path)
    return at_weights(concept), concept.embeddings, concept.name


def _at(expert: Expert, alpha: float) -> Any:
    """A function that puts the expert on a pipeline with this scale for a while; nothing for 0."""

    @contextmanager
    def scaled(pipe: Any) -> Iterator[None]:
        if alpha == 0:
            yield
            return
        with patch(pipe, {"concept": expert}, scales={"concept": alpha}, allow_large_rank=True):
            yield

    return scaled


def _regions(asked: ConceptRegionsArgs, height: int, width: int) -> list[Region]:
    if asked.regions.endswith(".json"):
        return read_regions(read_text(asked.regions))
    return parse_regions(asked.regions, height, width)


def _pipeline(asked: ConceptDrawArgs) -> Any:
    return read_pipeline(
        asked.model, getattr(torch, asked.dtype) if asked.dtype else None, command="mix-of-show"
    )


def _options(asked: ConceptDrawArgs, wanted: ValidationOptions) -> dict[str, Any]:
    size = resolution_of(asked.resolution)
    options: dict[str, Any] = {
        "num_inference_steps": asked.sampling_steps or wanted.steps,
        "guidance_scale": wanted.guidance if asked.guidance is None else asked.guidance,
    }
    if size is not None:
        options["height"], options["width"] = (size, size) if isinstance(size, int) else size
    return options


def _draw(
    pipe: Any, prompt: str, tokens: Tokens, asked: ConceptDrawArgs, n: int, options: Mapping[str, Any]
) -> Any:
    negative = asked.negative if options["guidance_scale"] > 1 else None
    generator = torch.Generator().manual_seed(asked.seed + n)
    return sample_concepts(pipe, [prompt], tokens, negative, generator=generator, **options).images[0]


def _save(image: Any, path: Path) -> None:
    atomic_write(path, lambda file: image.save(file, "PNG"))


def _write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(folder / METADATA, lambda file: file.write(text.encode()))  # type: ignore[arg-type, return-value]
