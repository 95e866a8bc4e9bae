"""`mole-kernels evaluate`: options. Torch is imported by the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mole_kernels.cli.grammar import MoleCommand
from mole_kernels.cli.options import WHAT, Json, OptionalOut, Seed, option, takes

METRICS = "clip-t clip-i dino face fid kid diversity pick-score hps image-reward".split()


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """`evaluate`."""

    folder: Annotated[
        Path, typer.Argument(help="Folder of pictures: metadata.jsonl, or folders named by their subjects.")
    ]
    metric: Annotated[
        list[str],
        option(
            f"METRIC=MODEL, repeated: {', '.join(METRICS)}; MODEL is a local folder or file, or random for a "
            "small model of random weights.",
            panel=WHAT,
        ),
    ]
    reference: Annotated[
        Path | None,
        option("Pictures of the subjects, or real ones: clip-i, dino, face, fid, kid.", panel=WHAT),
    ] = None
    against: Annotated[
        list[str] | None,
        option("NAME=FOLDER, repeated: pictures of the same prompts to compare with.", panel=WHAT),
    ] = None
    html: Annotated[Path | None, option("HTML page with figures and pictures to write.", panel=WHAT)] = None
    sheet: Annotated[Path | None, option("Contact sheet (.png) to write.", panel=WHAT)] = None
    out: OptionalOut = None
    seed: Seed = 0
    json: Json = False


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(name="evaluate", cls=MoleCommand)
    @takes(EvaluateArgs)
    def evaluate_command(asked: EvaluateArgs) -> None:
        """Measure pictures by the metrics of papers, alone or against others."""
        from mole_kernels.cli.evaluate_run import evaluate

        evaluate(asked)
