"""`mole-kernels difflora` and `train difflora`: the stages and their options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from mole_kernels.cli.grammar import MoleCommand, MoleGroup
from mole_kernels.cli.options import (
    DATA,
    TUNE,
    Alpha,
    BatchSize,
    CheckpointEvery,
    CondDropout,
    Dtype,
    Guidance,
    Model,
    OptionalModel,
    Out,
    Rank,
    Rate,
    Resolution,
    Resume,
    SamplingSteps,
    Schedule,
    Seed,
    Steps,
    To,
    Work,
    option,
    takes,
)
from mole_kernels.cli.train import train

difflora = typer.Typer(
    help="DiffLoRA: from pictures of people to a model (`train difflora`) that predicts a person's LoRA.",
    no_args_is_help=True,
    cls=MoleGroup,
)
train_difflora = typer.Typer(
    help="DiffLoRA's two models: the autoencoder of LoRAs, then the predictor on its latents.",
    no_args_is_help=True,
    cls=MoleGroup,
)
train.add_typer(train_difflora, name="difflora")

SHAPE = "Shape"
ENCODERS = "Encoders: small[:SIZE] (trains with the rest), clip:FOLDER, insightface:FOLDER"


@dataclass(frozen=True, kw_only=True)
class DiffLoRADataArgs:
    """`difflora data`."""

    root: Annotated[Path, typer.Argument(help="Folder that holds a folder of pictures for each person.")]
    out: Out
    model: Model
    min_side: Annotated[
        int, option("Shorter side in pixels below which a picture is left out.", panel=DATA)
    ] = 256
    face_models: Annotated[
        Path | None, option("insightface's folder of models: pictures without a face go.", panel=DATA)
    ] = None
    caption: Annotated[
        str, option("Caption of pictures that have none (.txt beside them, or metadata.jsonl).", panel=DATA)
    ] = "a photo of a person"
    same_face: Annotated[
        float | None,
        option("Cosine below which a face is another's, with --face-models; 0.3 to 0.5.", panel=DATA),
    ] = None
    rare_token: Annotated[
        str, option("Rare token for {} in --caption, which then is every picture's caption.", panel=DATA)
    ] = ""
    class_pictures: Annotated[
        Path | None, option("Folder of class pictures for prior preservation.", panel=DATA)
    ] = None
    per_shard: Annotated[int, option("Vectors in each shard.", min=1)] = 256
    resolution: Resolution = "512"
    rank: Rank = 4
    alpha: Alpha = None
    target_module: Annotated[
        list[str] | None,
        option("End of layers' names; may be repeated.", panel=TUNE, show_default="attention's q, k, v, out"),
    ] = None
    steps: Steps = 500
    lr: Rate = 1e-4
    batch_size: BatchSize = 1
    seed: Seed = 0
    dtype: Dtype = None


@dataclass(frozen=True, kw_only=True)
class DiffLoRALoopArgs:
    """What both trainings of DiffLoRA take."""

    work: Work
    out: Out
    steps: Steps = 20_000
    schedule: Schedule = "constant"
    checkpoint_every: CheckpointEvery = 500
    seed: Seed = 0
    resume: Resume = False


@dataclass(frozen=True, kw_only=True)
class DiffLoRAAutoencoderArgs(DiffLoRALoopArgs):
    """`train difflora autoencoder`."""

    channels: Annotated[str, option("Channels of each stage, with commas.", panel=SHAPE)] = "128,256,128,64"
    factor: Annotated[int, option("Factor by which every stage shortens.", min=1, panel=SHAPE)] = 4
    kernel: Annotated[int, option("Size of the convolutions, odd.", min=1, panel=SHAPE)] = 5
    latent_channels: Annotated[int, option("Channels of the latent.", min=1, panel=SHAPE)] = 1
    error_weight: Annotated[
        float, option("How much more the errors of large weights count; 0 is the MSE.", panel=TUNE)
    ] = 1.0
    error_power: Annotated[float, option("Power of a weight's size in that.", panel=TUNE)] = 1.0
    lr: Rate = 5e-4
    batch_size: BatchSize = 16


@dataclass(frozen=True, kw_only=True)
class DiffLoRAPredictorArgs(DiffLoRALoopArgs):
    """`train difflora predictor`."""

    autoencoder: Annotated[Path, option("Folder of the trained autoencoder.")]
    face_encoder: Annotated[str, option("Encoder of faces.", panel=ENCODERS)]
    image_encoder: Annotated[str, option("Encoder of whole pictures.", panel=ENCODERS)]
    dim: Annotated[int, option("Size of the mixed features.", min=1, panel=SHAPE)] = 1024
    depth: Annotated[int, option("Layers of the denoiser.", min=1, panel=SHAPE)] = 16
    width: Annotated[int, option("Width of the denoiser.", min=1, panel=SHAPE)] = 1454
    heads: Annotated[int, option("Heads of the denoiser.", min=1, panel=SHAPE)] = 16
    patch: Annotated[int, option("Places of the latent in one token.", min=1, panel=SHAPE)] = 16
    max_pictures: Annotated[int, option("Most pictures of a person in one sample.", min=1, panel=TUNE)] = 4
    cond_dropout: CondDropout = 0.1
    lr: Rate = 1e-4
    batch_size: BatchSize = 64


@dataclass(frozen=True, kw_only=True)
class DiffLoRAGenerateArgs:
    """`difflora generate`."""

    predictor: Annotated[Path, typer.Argument(help="Folder that `train difflora predictor` wrote.")]
    pictures: Annotated[list[Path], typer.Argument(help="Pictures of one person: files, or folders of them.")]
    out: Out
    model: OptionalModel = None
    face_encoder: Annotated[
        str | None, option("Encoder of faces.", panel=ENCODERS, show_default="the one in the folder")
    ] = None
    image_encoder: Annotated[
        str | None, option("Encoder of whole pictures.", panel=ENCODERS, show_default="the one in the folder")
    ] = None
    to: To = "diffusers"
    sampling_steps: SamplingSteps = 20
    sampler: Annotated[Literal["ddim", "dpm"], option("Sampler of the denoiser.")] = "ddim"
    guidance: Guidance = 1.0
    seed: Seed = 0


@difflora.command(name="data", cls=MoleCommand)
@takes(DiffLoRADataArgs)
def data_command(asked: DiffLoRADataArgs) -> None:
    """Filter pictures, train an expert for each person, pack them; shared out by `accelerate launch`."""
    from mole_kernels.cli.difflora_stages import make_data

    make_data(asked)


@train_difflora.command(name="autoencoder", cls=MoleCommand)
@takes(DiffLoRAAutoencoderArgs)
def autoencoder_command(asked: DiffLoRAAutoencoderArgs) -> None:
    """The autoencoder of flat LoRAs."""
    from mole_kernels.cli.difflora_stages import run_autoencoder

    run_autoencoder(asked)


@train_difflora.command(name="predictor", cls=MoleCommand)
@takes(DiffLoRAPredictorArgs)
def predictor_command(asked: DiffLoRAPredictorArgs) -> None:
    """The denoiser and the mixed image features, on the autoencoder's latents."""
    from mole_kernels.cli.difflora_stages import run_predictor

    run_predictor(asked)


@difflora.command(name="generate", cls=MoleCommand)
@takes(DiffLoRAGenerateArgs)
def generate_command(asked: DiffLoRAGenerateArgs) -> None:
    """Pictures of a person into a LoRA file."""
    from mole_kernels.cli.difflora_stages import generate_file

    generate_file(asked)
