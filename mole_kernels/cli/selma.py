"""`mole-kernels selma`: its stages and their options. Torch is imported by the commands that need it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

selma = typer.Typer(
    help="SELMA: prompts by skill, pictures by the model itself, an expert per skill, all merged with weights 1/T.",
    no_args_is_help=True,
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kind(str, Enum):
    chat = "chat"
    completion = "completion"


class Preset(str, Enum):
    small = "small"
    sd = "sd"
    sdxl = "sdxl"


class Mode(str, Enum):
    delta_mean = "delta_mean"
    factor_mean = "factor_mean"
    cat = "cat"
    svd = "svd"
    linear = "linear"


WRITER, PICTURES, TUNE = "Who writes (one of)", "Pictures", "Settings (of the preset, where not given)"


def _from(help: str, panel: str = WRITER, **more):
    return typer.Option(help=help, rich_help_panel=panel, show_default=False, **more)


# typer reads these annotations when it runs
Work = Annotated[Path, typer.Argument(help="The run's folder; every stage goes on where it stopped.")]
Skills = Annotated[
    list[str] | None,
    typer.Option("--skill", help="May be repeated; all of the run, where not given.", show_default=False),
]
Model = Annotated[
    str,
    typer.Option(
        help="A pipeline's folder in diffusers' layout, its name on the hub, or demo: the digits of the demo."
    ),
]
BaseDtype = Annotated[
    Dtype | None, typer.Option(help="Of the model.", show_default="float32 on a CPU, else float16")
]
Steps = Annotated[int | None, _from("Denoising steps.", PICTURES)]
Guidance = Annotated[float | None, _from("Guidance scale.", PICTURES)]
Height = Annotated[int | None, _from("In pixels.", PICTURES)]
Width = Annotated[int | None, _from("In pixels.", PICTURES)]
Batch = Annotated[
    int, typer.Option(help="Pictures at once on each process.", rich_help_panel=PICTURES, min=1)
]
Seed = Annotated[
    int,
    typer.Option(help="Every picture has its own, made of this and its number.", rich_help_panel=PICTURES),
]
Questions = Annotated[Path, typer.Argument(help="DSG's .csv or TIFA's .json.")]


@selma.command()
def prompts(
    work: Work,
    skill: Annotated[
        list[str] | None,
        typer.Option(
            "--skill", help="A known skill, or one of --skills; may be repeated.", show_default=False
        ),
    ] = None,
    skills: Annotated[
        Path | None,
        typer.Option(help='JSON {name: {"seeds": [three], "about": …}} instead of the known skills.'),
    ] = None,
    model: Annotated[
        str | None, _from("A transformers language model, or with --url the server's name for one.")
    ] = None,
    url: Annotated[
        str | None, _from("An OpenAI-compatible endpoint, as in http://127.0.0.1:8000/v1.")
    ] = None,
    file: Annotated[Path | None, _from("A text file of prompts, or a folder of SKILL.txt.")] = None,
    kind: Annotated[Kind, typer.Option(help="Of endpoint.")] = Kind.chat,
    key: Annotated[
        str | None,
        typer.Option(envvar="MOLE_API_KEY", help="The endpoint's; never kept.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="Prompts of each skill, exactly.", min=1)] = 1000,
    more: Annotated[int, typer.Option(help="Asked for in each request.", min=1)] = 20,
    limit: Annotated[float, typer.Option(help="ROUGE-L F1 above which a prompt is turned away.")] = 0.8,
    temperature: Annotated[float, typer.Option(help="Of the language model.")] = 1.0,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer of an endpoint.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="For each request.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Of what is shown and sampled.")] = 0,
) -> None:
    """Stage 1: from three seeds of each skill to so many prompts, by a local model, an endpoint or a file."""
    given = locals()
    from mole_kernels.cli.selma_stages import write

    write(given)


@selma.command()
def pictures(
    work: Work,
    model: Model,
    skill: Skills = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    seed: Seed = 42,
    dtype: BaseDtype = None,
) -> None:
    """Stage 2: a picture for each prompt. Under `accelerate launch` the processes, of many machines too,
    share them out.
    """
    given = locals()
    from mole_kernels.cli.selma_stages import paint

    paint(given)


@selma.command()
def train(
    work: Work,
    model: Model,
    skill: Skills = None,
    preset: Annotated[
        Preset, typer.Option(help="sd, sdxl: the paper's; small: one small GPU or a CPU.")
    ] = Preset.small,
    joint: Annotated[
        bool,
        typer.Option("--joint", help="One expert on the pictures of all skills instead, for comparison."),
    ] = False,
    rank: Annotated[int | None, _from("Of the expert; alpha goes with it.", TUNE)] = None,
    steps: Annotated[int | None, _from("Optimiser steps.", TUNE)] = None,
    lr: Annotated[float | None, _from("Learning rate.", TUNE)] = None,
    batch: Annotated[int | None, _from("Pictures a batch and process.", TUNE)] = None,
    accumulation: Annotated[int | None, _from("Batches a step and process.", TUNE)] = None,
    resolution: Annotated[str | None, _from("Side in pixels, or HEIGHTxWIDTH.", TUNE)] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="Pictures also mirrored.", rich_help_panel=TUNE, show_default=False
        ),
    ] = None,
    seed: Annotated[int | None, _from("Of noise, order and fresh weights.", TUNE)] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the model.", show_default="bfloat16 on a GPU with sd, sdxl; else float32"),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Of latents and text states.", show_default="in memory")
    ] = None,
) -> None:
    """Stage 3: an expert for each skill from its pictures, the model untouched; goes on from the last
    checkpoint.
    """
    given = locals()
    from mole_kernels.cli.selma_stages import teach

    teach(given)


@selma.command()
def merge(
    work: Work,
    skill: Skills = None,
    mode: Annotated[
        Mode, typer.Option(help="delta_mean is the paper's; see mole-kernels merge for more.")
    ] = Mode.delta_mean,
    rank: Annotated[int | None, typer.Option(help="Of the result, for svd.", show_default=False)] = None,
) -> None:
    """Stage 4: the experts as one, each with weight exactly 1/T; a LoRA file that diffusers reads."""
    given = locals()
    from mole_kernels.cli.selma_stages import unite

    unite(given)


@selma.command()
def draw(
    questions: Questions,
    folder: Annotated[Path, typer.Argument(help="Where the pictures go.")],
    model: Model,
    expert: Annotated[
        Path | None, typer.Option(help="A LoRA file, such as merged.safetensors.", show_default=False)
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    seed: Seed = 42,
    dtype: BaseDtype = None,
) -> None:
    """A picture for each prompt of a file of questions, to be evaluated."""
    given = locals()
    from mole_kernels.cli.selma_stages import paint_for

    paint_for(given)


@selma.command()
def evaluate(
    questions: Questions,
    folder: Annotated[Path, typer.Argument(help="Pictures with metadata.jsonl.")],
    vqa: Annotated[
        str,
        typer.Option(
            help="A transformers model that answers questions about pictures (ViLT, BLIP): folder or hub name."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The figures as JSON.", show_default=False)] = None,
) -> None:
    """How faithful pictures are: DSG's score with its parent rule, or TIFA's accuracy. Answers are kept
    beside the pictures.
    """
    given = locals()
    from mole_kernels.cli.selma_stages import judge

    judge(given)


@selma.command()
def status(work: Work) -> None:
    """What each stage has done so far."""
    from mole_kernels.cli.selma_stages import tell

    tell(work)
