"""`mole-kernels mix-of-show` and `train mix-of-show`: options. Torch is imported by the commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mole_kernels.cli.grammar import MoleCommand, MoleGroup
from mole_kernels.cli.options import (
    WHAT,
    Dtype,
    Guidance,
    Model,
    OptionalModel,
    OptionalSamplingSteps,
    Out,
    Resolution,
    Resume,
    RunDir,
    Seed,
    Steps,
    Tracker,
    option,
    takes,
)
from mole_kernels.cli.train import train

mix_of_show = typer.Typer(
    help="Mix-of-Show: pictures of a trained or fused concept, whole or by regions (`train edlora`, `fuse`).",
    no_args_is_help=True,
    cls=MoleGroup,
)

ConceptFile = Annotated[
    Path, typer.Argument(help="A concept (.pth, .safetensors), or a folder that `fuse` has written.")
]
Negative = Annotated[str, option("What no picture shall show.")]


@dataclass(frozen=True, kw_only=True)
class PaperTrainArgs:
    """`train mix-of-show`."""

    options: Annotated[Path, typer.Argument(help="Options file of the paper's code (.yml).")]
    out: Out
    model: OptionalModel = None
    steps: Steps = None
    run_dir: RunDir = None
    resume: Resume = False
    tracker: Tracker = None
    dry_run: Annotated[bool, option("Check everything, say what would be done, and stop.", "--dry-run")] = (
        False
    )
    dtype: Dtype = None


@dataclass(frozen=True, kw_only=True)
class ConceptDrawArgs:
    """How pictures of a concept are drawn."""

    concept: ConceptFile
    model: Model
    out: Out
    negative: Negative = ""
    sampling_steps: OptionalSamplingSteps = None
    guidance: Guidance = None
    resolution: Resolution = None
    samples: Annotated[
        int, option("Pictures of each prompt; picture n has the same noise for all.", min=1)
    ] = 1
    seed: Seed = 0
    dtype: Dtype = None


@dataclass(frozen=True, kw_only=True)
class ConceptSampleArgs(ConceptDrawArgs):
    """`mix-of-show sample`."""

    prompt: Annotated[list[str] | None, option("What the model shall draw.", panel=WHAT)] = None
    options: Annotated[
        Path | None,
        option("Prompts, alphas and settings of an options file of the paper's code.", panel=WHAT),
    ] = None
    alphas: Annotated[
        str | None,
        option("Scales of the expert, as in 0,0.7,1; 0 is the embeddings alone.", show_default="1"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ConceptRegionsArgs(ConceptDrawArgs):
    """`mix-of-show regions`."""

    prompt: Annotated[str, option("What the model shall draw.", panel=WHAT)]
    regions: Annotated[
        str,
        option(
            "The paper's string [prompt]-*-[negative]-*-[y0, x0, y1, x1]|…, or a .json file of regions.",
            panel=WHAT,
        ),
    ]


@train.command(name="mix-of-show", cls=MoleCommand)
@takes(PaperTrainArgs)
def train_paper_command(asked: PaperTrainArgs) -> None:
    """ED-LoRA by an options file of Mix-of-Show's code; writes a concept for `fuse`."""
    from mole_kernels.cli.mix_of_show_stages import train_by_options

    train_by_options(asked)


@mix_of_show.command(name="sample", cls=MoleCommand)
@takes(ConceptSampleArgs)
def sample_command(asked: ConceptSampleArgs) -> None:
    """Pictures of prompts with concept tokens, for every alpha."""
    from mole_kernels.cli.mix_of_show_stages import sample

    sample(asked)


@mix_of_show.command(name="regions", cls=MoleCommand)
@takes(ConceptRegionsArgs)
def regions_command(asked: ConceptRegionsArgs) -> None:
    """A picture whose regions have prompts of their own."""
    from mole_kernels.cli.mix_of_show_stages import sample_regions

    sample_regions(asked)
