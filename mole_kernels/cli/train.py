"""`mole-kernels train`: what can be trained, and its options. Torch is imported by the commands that need
it.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

train = typer.Typer(help="Train experts and gates on a folder of captioned pictures.", no_args_is_help=True)
mole = typer.Typer(
    help="MoLE's three stages: the UNet (optional), one expert for each set of close-ups, then the gates alone.",
    no_args_is_help=True,
)
train.add_typer(mole, name="mole")


class Preset(str, Enum):
    small = "small"
    sd15 = "sd15"
    sdxl = "sdxl"
    demo = "demo"


class OnBad(str, Enum):
    refuse = "refuse"
    skip = "skip"


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kind(str, Enum):
    both = "both"
    local = "local"
    pooled = "global"


class ExpertDialect(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"


class GateDialect(str, Enum):
    native = "native"
    official = "official"


WHAT, DATA, RUN, TUNE = "What", "Data", "Run", "Settings (of the preset, where not given)"


def _setting(help: str, **more):
    return typer.Option(help=help, rich_help_panel=TUNE, show_default=False, **more)


# typer reads these annotations when it runs, also on Python 3.10
Model = Annotated[
    str,
    typer.Option(
        help="A pipeline's folder in diffusers' layout, or its name on the hub.", rich_help_panel=WHAT
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="What is written in the end; replaced only once it is whole.", rich_help_panel=WHAT),
]
Named = Annotated[
    Preset, typer.Option(help="sd15, sdxl: the paper's; small: one small GPU or a CPU.", rich_help_panel=WHAT)
]
Data = Annotated[
    Path,
    typer.Option(help="Pictures with captions: metadata.jsonl, or a .txt beside each.", rich_help_panel=DATA),
]
Resolution = Annotated[
    str | None,
    typer.Option(
        help="Side in pixels, or HEIGHTxWIDTH; the preset's, where not given.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Buckets = Annotated[
    bool,
    typer.Option(
        "--buckets/--square", help="Many aspect ratios of one area, or all alike.", rich_help_panel=DATA
    ),
]
Bad = Annotated[
    OnBad, typer.Option(help="Pictures that cannot be read or have no caption.", rich_help_panel=DATA)
]
Multiple = Annotated[int, typer.Option(help="Sides are multiples of this.", rich_help_panel=DATA)]
Column = Annotated[str, typer.Option(help="Of metadata.jsonl that holds the caption.", rich_help_panel=DATA)]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Of latents and text states.", rich_help_panel=DATA, show_default="cache, beside --out"
    ),
]
RunDir = Annotated[
    Path | None, typer.Option(help="Of checkpoints and logs.", rich_help_panel=RUN, show_default="OUT.run")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=RUN)
]
Tracker = Annotated[
    list[str] | None,
    typer.Option(help="tensorboard, or another of accelerate's; may be repeated.", rich_help_panel=RUN),
]
Dry = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show settings, data and the cache's size; train nothing.", rich_help_panel=RUN
    ),
]
BaseDtype = Annotated[
    Dtype | None,
    typer.Option(
        help="Of the frozen model.", rich_help_panel=RUN, show_default="float32 on a CPU, else as --precision"
    ),
]
Steps = Annotated[Optional[int], _setting("Optimiser steps in all.")]  # noqa: UP045
Rate = Annotated[Optional[float], _setting("Peak learning rate.")]  # noqa: UP045
Batch = Annotated[Optional[int], _setting("Pictures a batch and process.")]  # noqa: UP045
Accumulation = Annotated[Optional[int], _setting("Batches a step and process.")]  # noqa: UP045
Optimiser = Annotated[Optional[str], _setting("adamw or lion.")]  # noqa: UP045
Schedule = Annotated[Optional[str], _setting("constant, linear or cosine.")]  # noqa: UP045
Warmup = Annotated[Optional[int], _setting("Steps over which the rate rises.")]  # noqa: UP045
Decay = Annotated[Optional[float], _setting("Decoupled weight decay.")]  # noqa: UP045
Snr = Annotated[Optional[float], _setting("Gamma of the min-SNR weighting; 0 for none.")]  # noqa: UP045
Dropout = Annotated[Optional[float], _setting("Probability of an empty caption.")]  # noqa: UP045
Ema = Annotated[Optional[float], _setting("Decay of a running mean, which then is the result; 0 for none.")]  # noqa: UP045
Mixed = Annotated[Optional[Precision], _setting("Mixed precision.")]  # noqa: UP045
Recompute = Annotated[Optional[bool], _setting("Compute activations again in the backward.")]  # noqa: UP045
Every = Annotated[Optional[int], _setting("Steps between checkpoints.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="Of noise, order and fresh weights.", rich_help_panel=RUN)]


@mole.command()
def unet(
    model: Model,
    data: Data,
    out: Out,
    preset: Named = Preset.small,
    resolution: Resolution = None,
    buckets: Buckets = True,
    on_bad: Bad = OnBad.refuse,
    multiple: Multiple = 64,
    column: Column = "text",
    cache: Cache = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    tracker: Tracker = None,
    dry_run: Dry = False,
    seed: Seed = 0,
    steps: Steps = None,
    lr: Rate = None,
    batch_size: Batch = None,
    accumulation: Accumulation = None,
    optimiser: Optimiser = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: Decay = None,
    snr_gamma: Snr = None,
    cond_dropout: Dropout = None,
    ema_decay: Ema = None,
    precision: Mixed = None,
    gradient_checkpointing: Recompute = None,
    checkpoint_every: Every = None,
) -> None:
    """Stage 1 (optional): the whole UNet, trained further; writes the pipeline's folder."""
    given = locals()
    from mole_kernels.cli.train_mole import run_unet

    run_unet(given)


@mole.command()
def expert(
    model: Model,
    data: Data,
    out: Out,
    name: Annotated[
        str,
        typer.Option(
            help="The expert's; settings of a preset go by it, as in face and hand.", rich_help_panel=WHAT
        ),
    ],
    preset: Named = Preset.small,
    rank: Annotated[Optional[int], _setting("Of the expert.")] = None,  # noqa: UP045
    alpha: Annotated[Optional[float], _setting("Scale times rank.")] = None,  # noqa: UP045
    to: Annotated[
        ExpertDialect, typer.Option(help="kohya: what the official MoLE code reads.", rich_help_panel=WHAT)
    ] = ExpertDialect.diffusers,
    dtype: BaseDtype = None,
    resolution: Resolution = None,
    buckets: Buckets = True,
    on_bad: Bad = OnBad.refuse,
    multiple: Multiple = 64,
    column: Column = "text",
    cache: Cache = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    tracker: Tracker = None,
    dry_run: Dry = False,
    seed: Seed = 0,
    steps: Steps = None,
    lr: Rate = None,
    batch_size: Batch = None,
    accumulation: Accumulation = None,
    optimiser: Optimiser = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: Decay = None,
    snr_gamma: Snr = None,
    cond_dropout: Dropout = None,
    ema_decay: Ema = None,
    precision: Mixed = None,
    gradient_checkpointing: Recompute = None,
    checkpoint_every: Every = None,
) -> None:
    """Stage 2: one expert on one set of pictures, everything else frozen; writes a LoRA file."""
    given = locals()
    from mole_kernels.cli.train_mole import run_expert

    run_expert(given)


@mole.command()
def gates(
    model: Model,
    data: Data,
    out: Out,
    expert: Annotated[
        list[str],
        typer.Option(
            help="NAME=FILE, repeated; their order is the order of the gates' rows.", rich_help_panel=WHAT
        ),
    ],
    preset: Named = Preset.small,
    kind: Annotated[
        Kind, typer.Option(help="Token gates, sample gates, or both.", rich_help_panel=WHAT)
    ] = Kind.both,
    start: Annotated[
        Path | None,
        typer.Option(help="A gates file to begin from, instead of fresh gates.", rich_help_panel=WHAT),
    ] = None,
    to: Annotated[
        GateDialect,
        typer.Option(help="official: MoLE's six tensors a layer, for face and hand.", rich_help_panel=WHAT),
    ] = GateDialect.native,
    dtype: BaseDtype = None,
    resolution: Resolution = None,
    buckets: Buckets = True,
    on_bad: Bad = OnBad.refuse,
    multiple: Multiple = 64,
    column: Column = "text",
    cache: Cache = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    tracker: Tracker = None,
    dry_run: Dry = False,
    seed: Seed = 0,
    steps: Steps = None,
    lr: Rate = None,
    batch_size: Batch = None,
    accumulation: Accumulation = None,
    optimiser: Optimiser = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: Decay = None,
    snr_gamma: Snr = None,
    cond_dropout: Dropout = None,
    ema_decay: Ema = None,
    precision: Mixed = None,
    gradient_checkpointing: Recompute = None,
    checkpoint_every: Every = None,
) -> None:
    """Stage 3: gates alone, experts and model frozen bit for bit; writes a gates file."""
    given = locals()
    from mole_kernels.cli.train_mole import run_gates

    run_gates(given)
