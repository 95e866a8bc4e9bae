"""The commands on this machine and its kernels: doctor, explain, tune, and the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mole_kernels.cli.grammar import MoleCommand
from mole_kernels.cli.options import BatchSize, Device, DtypeName, Json, OptionalOut, Out, option, takes


@dataclass(frozen=True, kw_only=True)
class DoctorArgs:
    """`doctor`."""

    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ExplainArgs:
    """`explain`."""

    shape: Annotated[str, option("M,K,N: rows (tokens times samples), inputs, outputs.")]
    ranks: Annotated[str, option("Rank of each expert, as in 64,64.")]
    gate: Annotated[
        str, option("Gates joined by '+': none, constant, mask, local, global, mole, softmax, top-1 ….")
    ] = "none"
    dtype: Annotated[DtypeName | None, option("Dtype of the base, or of the factors that are written.")] = (
        "bfloat16"
    )
    tf32: Annotated[bool, option("Float32 products in TF32.", "--tf32")] = False
    device: Device = "auto"
    batch_size: BatchSize = 1
    per_sample: Annotated[bool, option("Every sample has its own experts.", "--per-sample")] = False
    sets: Annotated[int, option("Sets of experts, of which each sample takes one or none.", min=0)] = 0
    backward: Annotated[bool, option("The backward instead of the forward.", "--backward")] = False
    training: Annotated[bool, option("A forward that keeps what its backward needs.", "--training")] = False
    table: Annotated[Path | None, option("Table of measurements, instead of the installed one.")] = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class TuneArgs:
    """`tune`."""

    device: Device = "auto"
    quick: Annotated[bool, option("Less work, coarser results.", "--quick")] = False
    out: OptionalOut = None


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """`demo`."""

    out: Out = Path("demo_out")
    quick: Annotated[bool, option("Less work, coarser results.", "--quick")] = False
    seeds: Annotated[int, option("How many seeds the figures are over.", min=1)] = 3


@takes(DoctorArgs)
def doctor_command(asked: DoctorArgs) -> None:
    """Versions, the extension, every backend checked against float64; exit code 1 if one is wrong."""
    from mole_kernels.cli.doctor import show

    if not show(asked.json):
        raise typer.Exit(1)


@takes(ExplainArgs)
def explain_command(asked: ExplainArgs) -> None:
    """Which kernels would compute a layer on a GPU, in what time, and why not the others; needs no GPU."""
    from mole_kernels.cli.explain import question, show

    problem, use = question(asked)
    show(problem, use, asked.device, asked.table, asked.json)


@takes(TuneArgs)
def tune_command(asked: TuneArgs) -> None:
    """Measure every candidate on this machine's GPU and write the table that later choices are made by."""
    from mole_kernels.cli.tune import run

    run(asked)


@takes(DemoArgs)
def demo_command(asked: DemoArgs) -> None:
    """Train two experts and their gates on a small diffusion model of digits, and show what they do."""
    from mole_kernels.cli.place import ready_folder
    from mole_kernels.errors import MoleStateError

    try:
        from mole_kernels.demo.run import run_demo
    except ImportError as error:
        raise MoleStateError(
            "demo", f"needs {error.name}", hint='pip install "mole-kernels[demo]"'
        ) from error
    run_demo(out=ready_folder(asked.out), quick=asked.quick, seeds=asked.seeds)


def register(app: typer.Typer) -> None:
    """Add these commands, in this order."""
    app.command(name="doctor", cls=MoleCommand)(doctor_command)
    app.command(name="explain", cls=MoleCommand)(explain_command)
    app.command(name="tune", cls=MoleCommand)(tune_command)
    app.command(name="demo", cls=MoleCommand)(demo_command)
