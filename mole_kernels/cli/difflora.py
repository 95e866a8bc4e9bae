"""`mole-kernels difflora`: its stages and their options. Torch is imported by the commands that need it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

difflora = typer.Typer(
    help="DiffLoRA: from pictures of people to a model that predicts a person's LoRA.", no_args_is_help=True
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Dialect(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"


class Sampler(str, Enum):
    ddim = "ddim"
    dpm = "dpm"


TUNE, SHAPE, ENCODERS = (
    "Training",
    "Shape",
    "Encoders: small[:SIZE] (trains with the rest), clip:FOLDER, insightface:FOLDER",
)


def _opt(help: str, panel: str | None = None, **more):
    return typer.Option(help=help, rich_help_panel=panel, **more)


# typer reads these annotations when it runs
Work = Annotated[Path, typer.Argument(help="The data set's folder, made by `data`.")]
Model = Annotated[
    str,
    _opt("A pipeline's folder in diffusers' layout, its name on the hub, or demo: the digits of the demo."),
]
Steps = Annotated[int, _opt("Optimiser steps.", TUNE, min=0)]
Rate = Annotated[float, _opt("Peak learning rate.", TUNE)]
Seed = Annotated[int, _opt("Of noise, order and fresh weights.", TUNE)]
Batch = Annotated[int, _opt("Samples a step and process.", TUNE, min=1)]
Every = Annotated[int, _opt("Steps between checkpoints.", TUNE, min=1)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=TUNE)
]
Schedule = Annotated[str, _opt("constant, linear or cosine.", TUNE)]


@difflora.command()
def data(
    root: Annotated[Path, typer.Argument(help="A folder of pictures for each identity.")],
    work: Annotated[Path, typer.Argument(help="The data set's folder; goes on where it stopped.")],
    model: Model,
    minimum: Annotated[int, _opt("Shorter side in pixels below which a picture is left out.")] = 256,
    faces: Annotated[
        Path | None, _opt("insightface's folder of models: pictures without a face go.", show_default=False)
    ] = None,
    caption: Annotated[
        str, _opt("Of pictures that have none (.txt beside them, or metadata.jsonl).")
    ] = "a photo of a person",
    per_shard: Annotated[int, _opt("Vectors in each shard.", min=1)] = 256,
    resolution: Annotated[int, _opt("Side of the pictures in pixels.", TUNE)] = 512,
    rank: Annotated[int, _opt("Of every expert.", TUNE, min=1)] = 4,
    alpha: Annotated[float | None, _opt("Scale times rank.", TUNE, show_default="the rank")] = None,
    target: Annotated[
        list[str] | None,
        _opt("Ends of the layers' names; may be repeated.", TUNE, show_default="attention's q, k, v, out"),
    ] = None,
    steps: Steps = 500,
    lr: Rate = 1e-4,
    batch: Batch = 1,
    seed: Seed = 0,
    dtype: Annotated[
        Dtype | None, _opt("Of the model.", show_default="float32 on a CPU, else bfloat16")
    ] = None,
) -> None:
    """Filter the pictures, train an expert for each identity, pack them into shards. Under `accelerate
    launch` processes share them out.
    """
    given = locals()
    from mole_kernels.cli.difflora_stages import make_data

    make_data(given)


@difflora.command()
def train_autoencoder(
    work: Work,
    out: Annotated[Path, typer.Argument(help="The autoencoder's folder.")],
    channels: Annotated[str, _opt("Of each stage, with commas.", SHAPE)] = "128,256,128,64",
    factor: Annotated[int, _opt("By which every stage shortens.", SHAPE, min=1)] = 4,
    kernel: Annotated[int, _opt("Size of the convolutions, odd.", SHAPE, min=1)] = 5,
    latent_channels: Annotated[int, _opt("Of the latent.", SHAPE, min=1)] = 1,
    strength: Annotated[
        float, _opt("How much more the errors of large weights count; 0 is the MSE.", TUNE)
    ] = 1.0,
    power: Annotated[float, _opt("Of the weights' size in that.", TUNE)] = 1.0,
    steps: Steps = 20_000,
    lr: Rate = 5e-4,
    batch: Batch = 16,
    schedule: Schedule = "constant",
    checkpoint_every: Every = 500,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """The autoencoder of flat LoRAs."""
    given = locals()
    from mole_kernels.cli.difflora_stages import teach_autoencoder

    teach_autoencoder(given)


@difflora.command()
def train(
    work: Work,
    autoencoder: Annotated[Path, typer.Argument(help="Its folder.")],
    out: Annotated[Path, typer.Argument(help="The model's folder.")],
    face: Annotated[str, _opt("Of faces.", ENCODERS)],
    image: Annotated[str, _opt("Of whole pictures.", ENCODERS)],
    dim: Annotated[int, _opt("Of the mixed features.", SHAPE, min=1)] = 1024,
    depth: Annotated[int, _opt("Layers of the denoiser.", SHAPE, min=1)] = 16,
    width: Annotated[int, _opt("Of the denoiser.", SHAPE, min=1)] = 1454,
    heads: Annotated[int, _opt("Of the denoiser.", SHAPE, min=1)] = 16,
    patch: Annotated[int, _opt("Places of the latent in one token.", SHAPE, min=1)] = 16,
    most: Annotated[int, _opt("Pictures of a person that are shown at most.", TUNE, min=1)] = 4,
    drop: Annotated[float, _opt("Probability of no person, for guidance.", TUNE)] = 0.1,
    steps: Steps = 20_000,
    lr: Rate = 1e-4,
    batch: Batch = 64,
    schedule: Schedule = "constant",
    checkpoint_every: Every = 500,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """The denoiser and the mixed image features, on the autoencoder's latents."""
    given = locals()
    from mole_kernels.cli.difflora_stages import teach

    teach(given)


@difflora.command()
def generate(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that `train` wrote.")],
    out: Annotated[Path, typer.Argument(help="The LoRA file to write.")],
    pictures: Annotated[list[Path], typer.Argument(help="Of one person: files, or folders of them.")],
    model: Annotated[
        str | None,
        _opt(
            "The base it is for, to be checked first: sd15, sdxl, demo or a pipeline's folder.",
            show_default=False,
        ),
    ] = None,
    face: Annotated[
        str | None, _opt("As in training, where it is frozen.", ENCODERS, show_default=False)
    ] = None,
    image: Annotated[
        str | None, _opt("As in training, where it is frozen.", ENCODERS, show_default=False)
    ] = None,
    to: Annotated[Dialect, _opt("What the file is for.")] = Dialect.diffusers,
    sampling_steps: Annotated[int, _opt("Of the denoiser.", min=1)] = 20,
    sampler: Annotated[Sampler, _opt("Of the denoiser.")] = Sampler.ddim,
    guidance: Annotated[float, _opt("Classifier-free guidance; 1 is none.")] = 1.0,
    seed: Annotated[int, _opt("Of the noise.")] = 0,
) -> None:
    """Pictures of a person into a LoRA file."""
    given = locals()
    from mole_kernels.cli.difflora_stages import predict

    predict(given)
