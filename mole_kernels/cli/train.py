"""`mole-kernels train`: what can be trained, and its options. Torch is imported by the commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mole_kernels.cli.grammar import MoleCommand, MoleGroup
from mole_kernels.cli.options import (
    WHAT,
    Alpha,
    DryRun,
    Dtype,
    LoopArgs,
    Lora,
    PictureArgs,
    Rank,
    Resume,
    RunArgs,
    option,
    setting,
    takes,
)


class TrainGroup(MoleGroup):
    """A group that takes a config file in the place of a command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith((".yaml", ".yml")):
            args = ["config", *args]
        return super().resolve_command(ctx, args)


train = typer.Typer(
    help="Train experts and gates on a folder of captioned pictures: train CONFIG.yaml, or a paper's stage.",
    no_args_is_help=True,
    cls=TrainGroup,
)
mole = typer.Typer(
    help="MoLE's three stages: the UNet (optional), an expert for each set of close-ups, the gates alone.",
    no_args_is_help=True,
    cls=MoleGroup,
)
train.add_typer(mole, name="mole")

Config = Annotated[Path, typer.Argument(help="YAML file of the run; docs/training.md lists its keys.")]


@dataclass(frozen=True, kw_only=True)
class ConfigArgs:
    """`train CONFIG` and `train-many CONFIG`."""

    config: Config
    resume: Resume = False
    dry_run: DryRun = False


@train.command(name="config", cls=MoleCommand)
@takes(ConfigArgs)
def config_command(asked: ConfigArgs) -> None:
    """The run of a YAML file; `train CONFIG.yaml` is short for it."""
    from mole_kernels.cli.train_config import run_config

    run_config(asked.config, resume=asked.resume, dry_run=asked.dry_run)


@takes(ConfigArgs)
def many_command(asked: ConfigArgs) -> None:
    """Many experts on one base in one step, each as if trained alone; writes a LoRA file for each."""
    from mole_kernels.cli.train_config import run_many

    run_many(asked.config, resume=asked.resume, dry_run=asked.dry_run)


Preset = Annotated[
    Literal["small", "sd15", "sdxl", "demo", "sd"],
    option("Settings: the paper's for its models, or small for one small GPU or a CPU.", panel=WHAT),
]
LoraTo = Annotated[Lora, option("Dialect of the LoRA file.")]


@dataclass(frozen=True, kw_only=True)
class MoleUnetArgs(LoopArgs, RunArgs, PictureArgs):
    """`train mole unet`."""

    preset: Preset = "small"


@dataclass(frozen=True, kw_only=True)
class MoleExpertArgs(MoleUnetArgs):
    """`train mole expert`."""

    name: Annotated[str, option("Name of the expert; presets know face and hand.", panel=WHAT)]
    rank: Rank = None
    alpha: Alpha = None
    to: LoraTo = "diffusers"
    dtype: Dtype = None


@dataclass(frozen=True, kw_only=True)
class MoleGatesArgs(MoleUnetArgs):
    """`train mole gates`."""

    expert_file: Annotated[
        list[str], option("NAME=FILE, repeated; their order is that of the gates' rows.", panel=WHAT)
    ]
    gate_kind: Annotated[
        Literal["both", "token", "sample"], option("Token gates, sample gates, or both.", panel=WHAT)
    ] = "both"
    initial_gates: Annotated[
        Path | None, option("Gates file to begin from, instead of fresh gates.", panel=WHAT)
    ] = None
    to: Annotated[
        Literal["native", "official"],
        option("Dialect of the gates file; official is MoLE's, for experts face and hand.", panel=WHAT),
    ] = "native"
    dtype: Dtype = None


@mole.command(name="unet", cls=MoleCommand)
@takes(MoleUnetArgs)
def unet_command(asked: MoleUnetArgs) -> None:
    """Stage 1 (optional): the whole UNet, trained further; writes the pipeline's folder."""
    from mole_kernels.cli.train_mole import run_unet

    run_unet(asked)


@mole.command(name="expert", cls=MoleCommand)
@takes(MoleExpertArgs)
def expert_command(asked: MoleExpertArgs) -> None:
    """Stage 2: one expert on one set of pictures, everything else frozen; writes a LoRA file."""
    from mole_kernels.cli.train_mole import run_expert

    run_expert(asked)


@mole.command(name="gates", cls=MoleCommand)
@takes(MoleGatesArgs)
def gates_command(asked: MoleGatesArgs) -> None:
    """Stage 3: gates alone, experts and model frozen bit for bit; writes a gates file."""
    from mole_kernels.cli.train_mole import run_gates

    run_gates(asked)


@dataclass(frozen=True, kw_only=True)
class EDLoRAArgs(LoopArgs, RunArgs, PictureArgs):
    """`train edlora`."""

    token: Annotated[
        list[str],
        option(
            "TOKEN=START, repeated: a new token of the captions, and <rand-0.013> or the class word that it "
            "starts from.",
            panel=WHAT,
        ),
    ]
    masks: Annotated[
        Path | None, option("Folder of masks named like the pictures: the loss counts where they are.")
    ] = None
    rank: Rank = 4
    alpha: Alpha = 1.0
    embedding_lr: Annotated[float, setting("Learning rate of the tokens' embeddings.")] = 1e-3
    text_encoder_lr: Annotated[float, setting("Learning rate of the text encoders' experts.")] = 1e-5
    norm_limit: Annotated[float, setting("Mean norm at which the embeddings stop; 0 for none.")] = 0.55
    noise_offset: Annotated[float, setting("σ of a constant added to the noise of each channel.")] = 0.01
    attention: Annotated[float, setting("Weight of the attention loss, which needs --masks.")] = 0.0
    dtype: Dtype = None


@train.command(name="edlora", cls=MoleCommand)
@takes(EDLoRAArgs)
def edlora_command(asked: EDLoRAArgs) -> None:
    """ED-LoRA (Mix-of-Show): a concept's token embeddings and its expert; writes a concept for `fuse`."""
    from mole_kernels.cli.train_edlora import run

    run(asked)
