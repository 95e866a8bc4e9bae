"""The commands on adapter files: inspect, convert, merge, compress, report, fuse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from mole_kernels.cli.grammar import MoleCommand
from mole_kernels.cli.options import (
    Adapter,
    Device,
    DryRun,
    Dtype,
    ExpertName,
    Json,
    Layers,
    Mode,
    Model,
    OptionalModel,
    OptionalOut,
    OptionalTo,
    Out,
    PipelineName,
    Rank,
    Resolution,
    SamplingSteps,
    Scale,
    Sdxl,
    Seed,
    To,
    option,
    takes,
)

Adapters = Annotated[
    list[Path],
    typer.Argument(help="LoRA files or folders of any dialect, or single files of mole_kernels."),
]


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    """`inspect`."""

    file: Adapter
    model: OptionalModel = None
    pipeline: PipelineName = "auto"
    layers: Layers = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """`convert`."""

    source: Annotated[Path, typer.Argument(help="File or folder of an adapter, or a Mix-of-Show .pth.")]
    out: Out
    to: Annotated[
        Literal["diffusers", "kohya", "native", "official"],
        option("Dialect: diffusers, kohya (an expert), native (our single file), official (MoLE's gates)."),
    ]
    pipeline: PipelineName = "auto"
    dtype: Dtype = None
    expert: ExpertName = None
    concept_scale: Annotated[
        float | None, option("Scale of a Mix-of-Show file, which does not hold it.", show_default="1")
    ] = None
    sdxl: Sdxl = None


@dataclass(frozen=True, kw_only=True)
class MergeArgs:
    """`merge`."""

    files: Adapters
    out: Out
    mode: Mode = "delta_mean"
    weights: Annotated[
        str | None,
        option("Weight of each file, as in 0.7,0.3; may be negative.", show_default="exactly 1/T each"),
    ] = None
    scale: Scale = None
    pipeline: PipelineName = "auto"
    rank: Rank = None
    density: Annotated[float | None, option("Part of the values that pruning keeps, in (0, 1].")] = None
    sign: Annotated[
        Literal["total", "frequency"], option("How ties elects a sign (PEFT's majority_sign_method).")
    ] = "total"
    seed: Seed = 0
    dtype: Dtype = None
    to: OptionalTo = None


@dataclass(frozen=True, kw_only=True)
class CompressArgs:
    """`compress`."""

    file: Adapter
    out: OptionalOut = None
    rank: Rank = None
    energy: Annotated[
        float | None, option("Instead of --rank: the smallest that keeps this part of the squared norm.")
    ] = None
    max_error: Annotated[
        float | None, option("Instead of --rank: the smallest with this relative error, for any input.")
    ] = None
    pipeline: PipelineName = "auto"
    dtype: Dtype = None
    to: OptionalTo = None
    expert: ExpertName = None
    spectrum: Annotated[bool, option("Each layer's singular values too; needs no rank.", "--spectrum")] = (
        False
    )
    layers: Layers = False
    json: Json = False
    device: Device = "h200"
    tokens: Annotated[int, option("Tokens of one call that times are predicted for.", min=1)] = 4096


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """`report`."""

    files: Adapters
    out: Out = Path("report.html")
    model: OptionalModel = None
    gates: Annotated[Path | None, option("Gates file; its expert names are the files' stems.")] = None
    scale: Scale = None
    prompt: Annotated[str, option("What the model shall draw.")] = ""
    sampling_steps: SamplingSteps = 20
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class FuseArgs:
    """`fuse`."""

    config: Annotated[
        Path,
        typer.Argument(
            help="Mix-of-Show's JSON: [{lora_path, unet_alpha, text_encoder_alpha, concept_name}, …]."
        ),
    ]
    model: Model
    out: Out
    sampling_steps: SamplingSteps = 20
    resolution: Resolution = None
    template: Annotated[
        list[str] | None,
        option(
            "Prompt with {} for the concept that is fitted; may be repeated.",
            show_default="photo of a {}, {}, and four more",
        ),
    ] = None
    choose_template: Annotated[
        list[str] | None,
        option(
            "Prompt that chooses the ridge; may be repeated.", show_default="two, with the default prompts"
        ),
    ] = None
    held_template: Annotated[
        list[str] | None,
        option("Prompt that judges the result; may be repeated.", show_default="two, likewise"),
    ] = None
    words: Annotated[
        int,
        option("Prompts with a word of random embedding that are fitted too (the paper: 0).", min=0),
    ] = 256
    runs: Annotated[int, option("Sampling runs of each concept that are fitted (the paper: 1).", min=1)] = 8
    choose_runs: Annotated[int, option("Sampling runs that choose the ridge.", min=0)] = 4
    held_runs: Annotated[int, option("Sampling runs that judge the result, for the report.", min=0)] = 2
    fused_text_layers: Annotated[
        bool,
        option("Sample with the fused K and V in place, as the paper's code.", "--fused-text-layers"),
    ] = False
    memory_mb: Annotated[float | None, option("Megabytes for sums at once; with less, more runs.")] = None
    cutoff: Annotated[
        float, option("Directions weaker than this part of the strongest are left to the base.")
    ] = 1e-12
    ridge: Annotated[
        float | None,
        option(
            "This part of the mean strength added to every direction, instead of a cut; 0: the paper's.",
            show_default="chosen on other runs, layer by layer",
        ),
    ] = None
    lbfgs: Annotated[
        int,
        option(
            "Steps of the paper's optimiser on each layer, for the report (the paper: 500, and 50 on most).",
            min=0,
        ),
    ] = 0
    seed: Seed = 0
    dtype: Dtype = None
    to: To = "diffusers"
    dense: Annotated[bool, option("Also write the whole pipeline with the fused weights.", "--dense")] = False
    layers: Layers = False
    dry_run: DryRun = False


@takes(InspectArgs)
def inspect_command(asked: InspectArgs) -> None:
    """Layers, ranks, scales, dialect and norms of a file, and what it would match in a model."""
    from mole_kernels.cli.inspect import show

    show(asked)


@takes(ConvertArgs)
def convert_command(asked: ConvertArgs) -> None:
    """One file into another dialect: kohya, diffusers, ours; MoLE's gates; Mix-of-Show's .pth."""
    from mole_kernels.cli.convert import run

    run(asked)


@takes(MergeArgs)
def merge_command(asked: MergeArgs) -> None:
    """Several experts into one, layer by layer, from file to file."""
    from mole_kernels.cli.merge import run

    run(asked)


@takes(CompressArgs)
def compress_command(asked: CompressArgs) -> None:
    """An expert of smaller rank by --rank, --energy or --max-error; without --out only the figures."""
    from mole_kernels.cli.compress import run

    run(asked)


@takes(ReportArgs)
def report_command(asked: ReportArgs) -> None:
    """Spectra and sizes of experts, and with --model where its gates look, step by step: one HTML page."""
    from mole_kernels.cli.report import run

    run(asked)


@takes(FuseArgs)
def fuse_command(asked: FuseArgs) -> None:
    """Several ED-LoRA concepts into one LoRA by gradient fusion in closed form (Mix-of-Show)."""
    from mole_kernels.cli.fuse import run

    run(asked)


def register(app: typer.Typer) -> None:
    """Add these commands, in this order."""
    app.command(name="inspect", cls=MoleCommand)(inspect_command)
    app.command(name="convert", cls=MoleCommand)(convert_command)
    app.command(name="merge", cls=MoleCommand)(merge_command)
    app.command(name="compress", cls=MoleCommand)(compress_command)
    app.command(name="report", cls=MoleCommand)(report_command)
    app.command(name="fuse", cls=MoleCommand)(fuse_command)
