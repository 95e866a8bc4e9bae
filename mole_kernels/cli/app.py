"""`mole-kernels`: look into files, say what this machine can do, convert, show the demo, explain and tune the choice of kernels.

Torch and diffusers are imported by the commands that need them, so that `--help` is immediate.
"""

from __future__ import annotations

import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from mole_kernels.cli.screen import complain, remark
from mole_kernels.errors import MoleError, MoleWarning

app = typer.Typer(
    help="Mixtures of low-rank experts in diffusion models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class Target(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"
    native = "native"
    official = "official"


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


# typer reads these annotations when it runs, also on Python 3.10
File = Annotated[Path, typer.Argument(help="A safetensors file: an expert (LoRA), gates, or a single file of ours.")]


@app.command()
def inspect(
    file: File,
    model: Annotated[Optional[str], typer.Option(help="What would it match: sd15, sdxl, or a folder in diffusers' layout.")] = None,  # noqa: UP045
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, not one line for each kind of layer.")] = False,
) -> None:
    """Layers, ranks, scales, dialect and norms of a file, and what it would match in a model."""
    from mole_kernels.cli.inspect import show

    show(file, model, layers)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines and bug reports.")] = False) -> None:
    """Versions, the compiled extension, and which backends work here and why others do not; checks each against float64.

    Ends with exit code 1 where a backend computes wrongly.
    """
    from mole_kernels.cli.doctor import show

    if not show(as_json):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A safetensors file, or a Mix-of-Show .pth.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write; replaced only once the new one is whole.")],
    to: Annotated[Target, typer.Option(help="diffusers, kohya: one expert; native: our single file; official: MoLE's gate file.")],
    dtype: Annotated[Optional[Dtype], typer.Option(help="Of the factors; a value that would overflow is refused.")] = None,  # noqa: UP045
    expert: Annotated[Optional[str], typer.Option(help="Which expert of a single file, or its name in a new one.")] = None,  # noqa: UP045
    alpha: Annotated[Optional[float], typer.Option(help="A Mix-of-Show file's scale, which it does not hold (default 1).")] = None,  # noqa: UP045
    sdxl: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--sdxl/--no-sdxl", help="LDM block names in kohya and official files; without it the layers decide."),
    ] = None,
) -> None:
    """One file into another dialect: kohya, diffusers, ours; MoLE's gates; Mix-of-Show .pth."""
    import torch

    from mole_kernels.cli.screen import done
    from mole_kernels.io.convert import convert as run

    kind = getattr(torch, dtype.value) if dtype else None
    for path, what in run(source, target, to.value, dtype=kind, expert=expert, alpha=alpha, sdxl=sdxl).written.items():
        done(path, what)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for pictures, metrics.json and report.html.")] = Path("demo_out"),
    quick: Annotated[bool, typer.Option("--quick", help="Take the shipped experts and gates instead of training them.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds the figures are over.")] = 3,
) -> None:
    """Train two experts and their gates on a small diffusion model of digits, and show what they do."""
    try:
        from mole_kernels.demo.run import run_demo
    except ImportError as error:
        from mole_kernels.errors import MoleStateError

        raise MoleStateError("demo", f"needs {error.name}", hint='pip install "mole-kernels[demo]"') from error
    run_demo(out=out, quick=quick, seeds=seeds)


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="M,K,N: rows (tokens times samples), inputs, outputs.")],
    ranks: Annotated[str, typer.Option(help="The rank of each expert, as in 64,64.")],
    gate: Annotated[str, typer.Option(help="none, constant, mask, local, global, mole; joined by '+'.")] = "none",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or tf32.")] = "bf16",
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, rtx4090, b200, rtx5090; auto: the one here.")] = "auto",
    batch: Annotated[int, typer.Option(help="How many samples the rows are of.")] = 1,
    per_sample: Annotated[bool, typer.Option("--per-sample", help="Every sample has its own experts.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="The backward instead of the forward.")] = False,
    training: Annotated[bool, typer.Option("--training", help="A forward that keeps what its backward needs.")] = False,
    table: Annotated[Optional[Path], typer.Option(help="A table of measurements, instead of the installed one.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False,
) -> None:
    """Which kernels would compute a layer on a GPU, in what time, and why not the others; needs no GPU."""
    from mole_kernels.cli.explain import question, show

    problem, use = question(shape, ranks, gate, dtype, batch, per_sample, backward, training)
    show(problem, use, gpu, table, as_json)


@app.command()
def tune(
    gpu: Annotated[str, typer.Option(help="auto, or the GPU that this machine must have.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few layers and ranks only.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="The file to write; without it the installed table.")] = None,  # noqa: UP045
) -> None:
    """Measure every candidate on this machine's GPU and write the table that later choices are made by."""
    from mole_kernels.cli.tune import tune as run

    run(gpu, quick, out)


def main() -> None:
    """The entry point: an error of ours is one or two lines in red and exit code 2, without a traceback."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def shown(message, category, *rest, **more):
            if issubclass(category, MoleWarning):
                remark(str(message))
            else:
                plain(message, category, *rest, **more)

        warnings.showwarning = shown
        try:
            app()
        except MoleError as error:
            complain(str(error))
            sys.exit(2)


if __name__ == "__main__":
    main()
