"""`mole-kernels selma` and `train selma`: the stages and their options. Torch is imported by the commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from mole_kernels.cli.grammar import MoleCommand, MoleGroup
from mole_kernels.cli.options import (
    WHAT,
    Accumulation,
    BatchSize,
    Cache,
    Dtype,
    Guidance,
    Json,
    Mode,
    Model,
    OptionalBatchSize,
    OptionalOut,
    OptionalSamplingSteps,
    OptionalSeed,
    Out,
    Rank,
    Rate,
    Resolution,
    Scale,
    Seed,
    Skill,
    Steps,
    Work,
    option,
    setting,
    takes,
)
from mole_kernels.cli.train import Preset, train

selma = typer.Typer(
    help="SELMA: prompts by skill, pictures by the model, an expert per skill (`train selma`), all merged.",
    no_args_is_help=True,
    cls=MoleGroup,
)

WRITER = "Who writes (one of)"
Questions = Annotated[Path, typer.Argument(help="DSG's .csv or TIFA's .json.")]


@dataclass(frozen=True, kw_only=True)
class SelmaPromptsArgs:
    """`selma prompts`."""

    work: Work
    skill: Skill = None
    skill_file: Annotated[
        Path | None,
        option('JSON {name: {"seeds": [three], "about": …}} instead of the known skills.', panel=WHAT),
    ] = None
    llm: Annotated[
        str | None,
        option("A transformers language model, or with --url the server's name for one.", panel=WRITER),
    ] = None
    url: Annotated[
        str | None, option("OpenAI-compatible endpoint, as in http://127.0.0.1:8000/v1.", panel=WRITER)
    ] = None
    text_file: Annotated[
        Path | None, option("Text file of prompts, or a folder of SKILL.txt.", panel=WRITER)
    ] = None
    endpoint_kind: Annotated[Literal["chat", "completion"], option("Kind of endpoint.")] = "chat"
    api_key: Annotated[
        str | None, option("Key of the endpoint; never kept.", envvar="MOLE_API_KEY", show_default=False)
    ] = None
    count: Annotated[int, option("Prompts of each skill, exactly.", min=1)] = 1000
    per_request: Annotated[int, option("Prompts asked for in each request.", min=1)] = 20
    max_rouge: Annotated[float, option("ROUGE-L F1 above which a prompt is too like another.")] = 0.8
    temperature: Annotated[float, option("Temperature of the language model.")] = 1.0
    timeout: Annotated[float, option("Seconds for one answer of an endpoint.")] = 120.0
    attempts: Annotated[int, option("Attempts for each request.", min=1)] = 6
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class DrawArgs:
    """How SELMA's pictures are drawn."""

    model: Model
    sampling_steps: OptionalSamplingSteps = None
    guidance: Guidance = None
    resolution: Resolution = None
    batch_size: BatchSize = 1
    seed: Seed = 42
    dtype: Dtype = None


@dataclass(frozen=True, kw_only=True)
class SelmaPicturesArgs(DrawArgs):
    """`selma pictures`."""

    work: Work
    skill: Skill = None


@dataclass(frozen=True, kw_only=True)
class SelmaTrainArgs:
    """`train selma`."""

    work: Work
    model: Model
    skill: Skill = None
    preset: Preset = "small"
    joint: Annotated[
        bool, option("One expert on the pictures of all skills, for comparison.", "--joint", panel=WHAT)
    ] = False
    rank: Rank = None
    steps: Steps = None
    lr: Rate = None
    batch_size: OptionalBatchSize = None
    accumulation: Accumulation = None
    resolution: Resolution = None
    flip: Annotated[bool | None, setting("Pictures also mirrored.")] = None
    seed: OptionalSeed = None
    dtype: Dtype = None
    cache: Cache = None


@dataclass(frozen=True, kw_only=True)
class SelmaMergeArgs:
    """`selma merge`."""

    work: Work
    skill: Skill = None
    step: Annotated[
        int | None, option("Experts of the checkpoints of this step (the paper's script: 3000).", min=1)
    ] = None
    mode: Mode = "delta_mean"
    rank: Rank = None


@dataclass(frozen=True, kw_only=True)
class SelmaDrawArgs(DrawArgs):
    """`selma draw`."""

    questions: Questions
    out: Out
    adapter: Annotated[Path | None, option("LoRA file, such as merged.safetensors.", panel=WHAT)] = None
    scale: Scale = None


@dataclass(frozen=True, kw_only=True)
class SelmaEvaluateArgs:
    """`selma evaluate`."""

    questions: Questions
    folder: Annotated[
        Path, typer.Argument(help="Folder of pictures with metadata.jsonl, or named by the items' ids.")
    ]
    vqa: Annotated[
        str, option("A transformers model that answers questions about pictures: folder or hub name.")
    ]
    sentence_encoder: Annotated[
        str | None,
        option("Model that finds the choice nearest to an answer that is none (TIFA): folder or name."),
    ] = None
    strict: Annotated[bool, option("Refuse a DSG file with unknown parents or rings.", "--strict")] = False
    out: OptionalOut = None
    json: Json = False


@selma.command(name="prompts", cls=MoleCommand)
@takes(SelmaPromptsArgs)
def prompts_command(asked: SelmaPromptsArgs) -> None:
    """Stage 1: from three seeds of each skill to so many prompts, by a local model, an endpoint or a file."""
    from mole_kernels.cli.selma_stages import write_skills

    write_skills(asked)


@selma.command(name="pictures", cls=MoleCommand)
@takes(SelmaPicturesArgs)
def pictures_command(asked: SelmaPicturesArgs) -> None:
    """Stage 2: a picture for each prompt, shared out among the processes of `accelerate launch`."""
    from mole_kernels.cli.selma_stages import draw_skills

    draw_skills(asked)


@train.command(name="selma", cls=MoleCommand)
@takes(SelmaTrainArgs)
def train_selma_command(asked: SelmaTrainArgs) -> None:
    """SELMA, stage 3: an expert for each skill from its pictures; goes on from the last checkpoint."""
    from mole_kernels.cli.selma_stages import train_skills

    train_skills(asked)


@selma.command(name="merge", cls=MoleCommand)
@takes(SelmaMergeArgs)
def merge_command(asked: SelmaMergeArgs) -> None:
    """Stage 4: the experts as one, each with weight exactly 1/T; a LoRA file that diffusers reads."""
    from mole_kernels.cli.selma_stages import merge_experts

    merge_experts(asked)


@selma.command(name="draw", cls=MoleCommand)
@takes(SelmaDrawArgs)
def draw_command(asked: SelmaDrawArgs) -> None:
    """A picture for each prompt of a file of questions, to be evaluated."""
    from mole_kernels.cli.selma_stages import draw_questions

    draw_questions(asked)


@selma.command(name="evaluate", cls=MoleCommand)
@takes(SelmaEvaluateArgs)
def evaluate_command(asked: SelmaEvaluateArgs) -> None:
    """How faithful pictures are: DSG's score with its parent rule, or TIFA's accuracy."""
    from mole_kernels.cli.selma_stages import evaluate_pictures

    evaluate_pictures(asked)


@selma.command(name="status", cls=MoleCommand)
def status_command(work: Work) -> None:
    """What each stage has done so far."""
    from mole_kernels.cli.selma_stages import show_status

    show_status(work)
