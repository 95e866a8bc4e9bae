"""`mole-kernels`: look into files, say what this machine can do, convert, show the demo, explain and tune the
choice of kernels.

Torch and diffusers are imported by the commands that need them, so that `--help` is immediate.
"""

from __future__ import annotations

import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from mole_kernels.cli.difflora import difflora
from mole_kernels.cli.screen import complain, remark
from mole_kernels.cli.selma import selma
from mole_kernels.cli.train import train
from mole_kernels.errors import MoleError, MoleWarning

app = typer.Typer(
    help="Mixtures of low-rank experts in diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train, name="train")
app.add_typer(selma, name="selma")
app.add_typer(difflora, name="difflora")


class Target(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"
    native = "native"
    official = "official"


class Lora(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


# typer reads these annotations when it runs, also on Python 3.10
File = Annotated[
    Path, typer.Argument(help="A safetensors file: an expert (LoRA), gates, or a single file of ours.")
]


@app.command()
def inspect(
    file: File,
    model: Annotated[
        str | None, typer.Option(help="What would it match: sd15, sdxl, or a folder in diffusers' layout.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every layer, not one line for each kind of layer.")
    ] = False,
) -> None:
    """Layers, ranks, scales, dialect and norms of a file, and what it would match in a model."""
    from mole_kernels.cli.inspect import show

    show(file, model, layers)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines and bug reports.")] = False,
) -> None:
    """Versions, the compiled extension, and which backends work here and why others do not; checks each
    against float64.

    Ends with exit code 1 where a backend computes wrongly.
    """
    from mole_kernels.cli.doctor import show

    if not show(as_json):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A safetensors file, or a Mix-of-Show .pth.")],
    target: Annotated[
        Path, typer.Argument(help="The safetensors file to write; replaced only once the new one is whole.")
    ],
    to: Annotated[
        Target,
        typer.Option(
            help="diffusers, kohya: one expert; native: our single file; official: MoLE's gate file."
        ),
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the factors; a value that would overflow is refused.")
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Which expert of a single file, or its name in a new one.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="A Mix-of-Show file's scale, which it does not hold (default 1).")
    ] = None,
    sdxl: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--sdxl/--no-sdxl",
            help="LDM block names in kohya and official files; without it the layers decide.",
        ),
    ] = None,
) -> None:
    """One file into another dialect: kohya, diffusers, ours; MoLE's gates; Mix-of-Show .pth."""
    import torch

    from mole_kernels.cli.screen import done
    from mole_kernels.io.convert import convert as run

    kind = getattr(torch, dtype.value) if dtype else None
    for path, what in run(
        source, target, to.value, dtype=kind, expert=expert, alpha=alpha, sdxl=sdxl
    ).written.items():
        done(path, what)


@app.command()
def merge(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Experts: LoRA files of any dialect, or single files of ours (all their experts)."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The safetensors file to write; replaced only once the new one is whole.")
    ],
    mode: Annotated[
        str,
        typer.Option(
            help="delta_mean (exact sum of the deltas), factor_mean, or PEFT's cat, svd, linear, ties, dare_linear, dare_ties, "
            "magnitude_prune, and the last four with _svd."
        ),
    ] = "delta_mean",
    weights: Annotated[
        str | None, typer.Option(help="As in 0.5,0.5; may be negative; without it exactly 1/T for each.")
    ] = None,
    rank: Annotated[Optional[int], typer.Option(help="Of the result, for svd and the _svd modes.")] = None,  # noqa: UP045
    density: Annotated[
        float | None, typer.Option(help="The part of the values that pruning keeps, in (0, 1].")
    ] = None,
    sign: Annotated[
        str, typer.Option(help="How ties elects a sign: total or frequency (PEFT's majority_sign_method).")
    ] = "total",
    seed: Annotated[int, typer.Option(help="Of dare's random numbers.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the result; without it the narrowest that holds all inputs.")
    ] = None,
    to: Annotated[
        Lora | None,
        typer.Option(help="The result's dialect; without it kohya where all are, else diffusers."),
    ] = None,
) -> None:
    """Several experts into one, layer by layer, from file to file."""
    import torch

    from mole_kernels.cli.merge import run

    kind, dialect = getattr(torch, dtype.value) if dtype else None, to.value if to else None
    run(
        files,
        out,
        mode,
        weights,
        kind,
        rank=rank,
        density=density,
        majority_sign_method=sign,
        seed=seed,
        to=dialect,
    )


@app.command()
def fuse(
    config: Annotated[
        Path,
        typer.Argument(
            help="Mix-of-Show's JSON: [{lora_path, unet_alpha, text_encoder_alpha, concept_name}, …]."
        ),
    ],
    pipeline: Annotated[
        str, typer.Option(help="A pipeline's folder in diffusers' layout, its name on the hub, or demo.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="The folder for the fused LoRA, embeddings, new_concept_cfg.json and report.json."),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each concept's sampling run.")] = 20,
    size: Annotated[
        str | None, typer.Option(help="Of its picture: a side, or HEIGHTxWIDTH; without it the pipeline's.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A prompt with {} for the concept; 'photo of a {}' and '{}'.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Megabytes for sums at once; with less, more runs.")
    ] = None,
    cutoff: Annotated[
        float, typer.Option(help="Directions weaker than this part of the strongest are left to the base.")
    ] = 1e-12,
    ridge: Annotated[
        float,
        typer.Option(help="Instead of a sharp cut: this part of the mean strength added to every direction."),
    ] = 0.0,
    lbfgs: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of the paper's optimiser on each layer too, for the report; it takes 500."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the first noise.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the model; without it float32 on a CPU, else float16.")
    ] = None,
    to: Annotated[Lora, typer.Option(help="The LoRA's dialect.")] = Lora.diffusers,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also write the whole pipeline with the fused weights.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
) -> None:
    """Several ED-LoRA concepts into one LoRA by gradient fusion in closed form (Mix-of-Show)."""
    from mole_kernels.cli.fuse import run, settings_of

    settings = settings_of(template, steps, size, seed, memory, cutoff, ridge, lbfgs)
    run(config, pipeline, out, settings, to.value, dtype.value if dtype else None, dense, layers, plan)


@app.command()
def compress(
    file: Annotated[
        Path, typer.Argument(help="An expert: a LoRA file of any dialect, or a single file of ours.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The safetensors file to write; without it only the report.")
    ] = None,
    rank: Annotated[Optional[int], typer.Option(help="At most this rank.")] = None,  # noqa: UP045
    energy: Annotated[
        float | None, typer.Option(help="The smallest rank that keeps this part of the squared norm.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="The smallest rank with this relative error, for any input.")
    ] = None,
    dtype: Annotated[Optional[Dtype], typer.Option(help="Of the result; without it the input's.")] = None,  # noqa: UP045
    to: Annotated[Optional[Lora], typer.Option(help="The result's dialect; without it the input's.")] = None,  # noqa: UP045
    expert: Annotated[Optional[str], typer.Option(help="Which expert of a single file.")] = None,  # noqa: UP045
    report: Annotated[
        Path | None,
        typer.Option(help="Write ranks, bounds, errors and predictions of each layer as JSON."),
    ] = None,
    spectrum: Annotated[
        Path | None, typer.Option(help="Write each layer's singular values as JSON; needs no rank.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    device: Annotated[str | None, typer.Option(help="The GPU that times are predicted for (h200).")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="The tokens of one call that times are predicted for (4096).")
    ] = None,
) -> None:
    """An expert of smaller rank by exactly one of --rank, --energy and --max-error; errors measured, speed
    predicted.
    """
    import torch

    from mole_kernels.cli.compress import run

    run(
        file,
        out,
        report=report,
        spectrum=spectrum,
        layers=layers,
        device=device,
        tokens=tokens,
        expert=expert,
        dtype=getattr(torch, dtype.value) if dtype else None,
        to=to.value if to else None,
        rank=rank,
        energy=energy,
        max_error=max_error,
    )


@app.command()
def report(
    files: Annotated[
        list[Path], typer.Argument(help="Experts (LoRA files of any dialect), or one single file of ours.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    pipeline: Annotated[
        Path | None, typer.Option(help="A folder in diffusers' layout: patched and run, to see its gates.")
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(help="A gates file; its expert names are the files' stems.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the pipeline shall draw.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the first noise.")] = 0,
) -> None:
    """Spectra and sizes of experts; with a pipeline also where its gates look, step by step. One HTML page
    with its plots inside.
    """
    from mole_kernels.cli.report import write

    write(files, out, pipeline, gates, prompt, steps, seed)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for pictures, metrics.json and report.html.")] = Path(
        "demo_out"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Take the shipped experts and gates instead of training them.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds the figures are over.")] = 3,
) -> None:
    """Train two experts and their gates on a small diffusion model of digits, and show what they do."""
    try:
        from mole_kernels.demo.run import run_demo
    except ImportError as error:
        from mole_kernels.errors import MoleStateError

        raise MoleStateError(
            "demo", f"needs {error.name}", hint='pip install "mole-kernels[demo]"'
        ) from error
    run_demo(out=out, quick=quick, seeds=seeds)


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="M,K,N: rows (tokens times samples), inputs, outputs.")],
    ranks: Annotated[str, typer.Option(help="The rank of each expert, as in 64,64.")],
    gate: Annotated[
        str, typer.Option(help="none, constant, mask, local, global, mole, softmax, top-1, …; joined by '+'.")
    ] = "none",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or tf32.")] = "bf16",
    gpu: Annotated[
        str, typer.Option(help="h200, h100, a100, rtx4090, b200, rtx5090; auto: the one here.")
    ] = "auto",
    batch: Annotated[int, typer.Option(help="How many samples the rows are of.")] = 1,
    per_sample: Annotated[
        bool, typer.Option("--per-sample", help="Every sample has its own experts.")
    ] = False,
    sets: Annotated[
        int, typer.Option(help="So many sets of experts, of which each sample names one (or none).")
    ] = 0,
    backward: Annotated[
        bool, typer.Option("--backward", help="The backward instead of the forward.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="A forward that keeps what its backward needs.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="A table of measurements, instead of the installed one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False,
) -> None:
    """Which kernels would compute a layer on a GPU, in what time, and why not the others; needs no GPU."""
    from mole_kernels.cli.explain import question, show

    problem, use = question(shape, ranks, gate, dtype, batch, per_sample, backward, training, sets)
    show(problem, use, gpu, table, as_json)


@app.command()
def tune(
    gpu: Annotated[str, typer.Option(help="auto, or the GPU that this machine must have.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few layers and ranks only.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; without it the installed table.")
    ] = None,
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
