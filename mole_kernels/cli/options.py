"""The options of all commands: one name, one type, one meaning.

A command takes one frozen dataclass whose fields are its arguments and options (`takes`), so what typer
parsed keeps its type to the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

DtypeName = Literal["float32", "float16", "bfloat16"]
Lora = Literal["diffusers", "kohya"]
Merging = Literal[
    "delta_mean",
    "factor_mean",
    "cat",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
Args = TypeVar("Args")

WHAT, DATA, RUN, TUNE = "What", "Data", "Run", "Settings"
BASE = (
    "The base: a folder in diffusers' layout, a name on the hub, or demo; sd15 or sdxl too where no weights "
    "are read."
)


def option(help: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """typer's option, with its panel."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def setting(help: str, **more: Any) -> Any:
    """A setting that a preset gives where the command line does not."""
    return typer.Option(help=help, rich_help_panel=TUNE, show_default=False, **more)


# what every command means by these names
Adapter = Annotated[
    Path, typer.Argument(help="A LoRA file or folder, gates, or a single file of mole_kernels.")
]
Out = Annotated[Path, option("File or folder to write; replaced only once the new one is whole.", panel=WHAT)]
OptionalOut = Annotated[
    Path | None, option("File or folder to write; replaced only once the new one is whole.", panel=WHAT)
]
Model = Annotated[
    str,
    option(BASE, panel=WHAT),
]
OptionalModel = Annotated[
    str | None,
    option(BASE, panel=WHAT),
]
PipelineName = Annotated[
    str,
    option(
        "Model that the files' names are resolved against: a pipeline class of diffusers, a folder in its "
        "layout, or auto (told from the keys).",
        panel=WHAT,
    ),
]
Dtype = Annotated[DtypeName | None, option("Dtype of the base, or of the factors that are written.")]
Device = Annotated[str, option("GPU: auto (the one here), h200, h100, a100, rtx4090, b200 or rtx5090.")]
Json = Annotated[bool, option("Print JSON and nothing else.", "--json")]
DryRun = Annotated[
    bool, option("Check everything, say what would be done, and stop.", "--dry-run", panel=RUN)
]
Layers = Annotated[bool, option("Show every layer.", "--layers")]
Seed = Annotated[int, option("Seed of every random draw.", panel=RUN)]
OptionalSeed = Annotated[int | None, option("Seed of every random draw.", panel=RUN)]
To = Annotated[Lora, option("Dialect of the LoRA file.")]
OptionalTo = Annotated[
    Lora | None, option("Dialect of the LoRA file.", show_default="the sources', else diffusers")
]
Mode = Annotated[Merging, option("How experts are merged; delta_mean is the exact sum of the deltas.")]
ExpertName = Annotated[str | None, option("Expert in a single file of mole_kernels.")]
Rank = Annotated[int | None, option("Rank of the result.", min=1, panel=TUNE, show_default=False)]
Alpha = Annotated[float | None, option("Scale times rank.", panel=TUNE, show_default=False)]
Sdxl = Annotated[
    bool | None,
    option(
        "LDM's block names in kohya's and official files.",
        "--sdxl/--no-sdxl",
        show_default="told by the layers",
    ),
]
Scale = Annotated[
    str | None,
    option(
        "Scale of the adapters: a number, or by component, as in unet=1.0,text_encoder=0.5.", show_default="1"
    ),
]

# drawing
SamplingSteps = Annotated[int, option("Denoising steps of one picture.", min=1)]
OptionalSamplingSteps = Annotated[int | None, option("Denoising steps of one picture.", min=1)]
Resolution = Annotated[
    str | None,
    option("Side in pixels, or HEIGHTxWIDTH.", panel=DATA, show_default="the model's or the preset's"),
]
Guidance = Annotated[float | None, option("Scale of classifier-free guidance; 1 is none.")]
BatchSize = Annotated[int, option("Pictures or samples at once, on each process.", min=1, panel=RUN)]
OptionalBatchSize = Annotated[
    int | None, option("Pictures or samples at once, on each process.", min=1, panel=RUN)
]

# training
Steps = Annotated[int | None, setting("Optimiser steps in all.", min=0)]
Rate = Annotated[float | None, setting("Peak learning rate.")]
Accumulation = Annotated[int | None, setting("Batches in one step, on each process.", min=1)]
Schedule = Annotated[Literal["constant", "linear", "cosine"] | None, setting("Course of the learning rate.")]
CheckpointEvery = Annotated[int | None, setting("Steps between checkpoints.", min=1)]
CondDropout = Annotated[float | None, setting("Probability of an empty condition, for guidance.")]
Resume = Annotated[bool, option("Go on from the newest checkpoint.", "--resume", panel=RUN)]
Cache = Annotated[Path | None, option("Folder of cached latents and text states.", panel=DATA)]
RunDir = Annotated[Path | None, option("Folder of checkpoints and logs.", panel=RUN, show_default="OUT.run")]
Tracker = Annotated[
    list[str] | None,
    option("tensorboard, or another of accelerate's; may be repeated.", panel=RUN, show_default=False),
]
Work = Annotated[Path, typer.Argument(help="Folder of the run; every stage goes on where it stopped.")]
Skill = Annotated[
    list[str] | None, option("Skill by name; may be repeated.", panel=WHAT, show_default="all of the run")
]


@dataclass(frozen=True, kw_only=True)
class PictureArgs:
    """The pictures that training reads."""

    data: Annotated[
        Path, option("Folder of captioned pictures: metadata.jsonl, or a .txt beside each.", panel=DATA)
    ]
    resolution: Resolution = None
    buckets: Annotated[
        bool, option("Many aspect ratios of one area, or all square.", "--buckets/--square", panel=DATA)
    ] = True
    on_bad: Annotated[
        Literal["refuse", "skip"], option("Pictures that cannot be read or have no caption.", panel=DATA)
    ] = "refuse"
    multiple: Annotated[int, option("Sides are multiples of this.", panel=DATA)] = 64
    column: Annotated[str, option("Column of metadata.jsonl that holds the caption.", panel=DATA)] = "text"
    cache: Cache = None


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """A run of training."""

    model: Model
    out: Out
    run_dir: RunDir = None
    resume: Resume = False
    tracker: Tracker = None
    dry_run: DryRun = False
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class LoopArgs:
    """Settings of a preset's training loop; None: the preset's."""

    steps: Steps = None
    lr: Rate = None
    batch_size: OptionalBatchSize = None
    accumulation: Accumulation = None
    optimiser: Annotated[Literal["adamw", "lion"] | None, setting("Optimiser.")] = None
    schedule: Schedule = None
    warmup: Annotated[int | None, setting("Steps over which the learning rate rises.", min=0)] = None
    weight_decay: Annotated[float | None, setting("Decoupled weight decay.")] = None
    snr_gamma: Annotated[float | None, setting("Gamma of the min-SNR weighting; 0 for none.")] = None
    cond_dropout: CondDropout = None
    ema_decay: Annotated[
        float | None, setting("Decay of a running mean, which then is the result; 0 for none.")
    ] = None
    mixed_precision: Annotated[
        Literal["no", "bfloat16", "float16"] | None, setting("Dtype of the arithmetic under autocast.")
    ] = None
    gradient_checkpointing: Annotated[bool | None, setting("Compute activations again in the backward.")] = (
        None
    )
    checkpoint_every: CheckpointEvery = None


def takes(options: type[Args]) -> Callable[[Callable[[Args], None]], Callable[..., None]]:
    """Make a command of a function of one dataclass: each field becomes an argument or option.

    Args:
        options: A dataclass whose fields are annotated as typer wants them.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)  # type: ignore[arg-type]
    ]

    def decorate(run: Callable[[Args], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(options(**values))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate
