"""`mole-kernels merge`: several experts' files into one."""

from __future__ import annotations

import torch

from mole_kernels.cli.files import MergeArgs
from mole_kernels.cli.pipelines import pipeline_of_name
from mole_kernels.cli.place import ready_file
from mole_kernels.cli.scales import scale_of_text
from mole_kernels.cli.screen import done, layer_bar
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.io.merge import merge_files


def run(asked: MergeArgs) -> None:
    """Merge, and say what was written."""
    weights = None if asked.weights is None else [_number(word) for word in asked.weights.split(",")]
    scale = scale_of_text(asked.scale)
    if isinstance(scale, dict) and any(isinstance(value, dict) for value in scale.values()):
        raise MoleValueError(
            "--scale", expected="a number, or a number for each component", got="scales of blocks"
        )
    ready_file(asked.out)
    with layer_bar(f"merge ({printable(asked.mode, 20)})") as on_layer:
        plan = merge_files(
            asked.files,
            asked.out,
            weights,
            asked.mode,
            to=asked.to,
            pipeline=pipeline_of_name(asked.pipeline),
            scale=scale,
            progress=on_layer,
            rank=asked.rank,
            density=asked.density,
            majority_sign_method=asked.sign,
            seed=asked.seed,
            dtype=getattr(torch, asked.dtype) if asked.dtype else None,
        )
    shares = ", ".join(f"{weight:g} {name}" for name, weight in plan.weights.items())
    done(str(asked.out), f"{len(plan.where)} layers, {asked.mode}: {shares}")


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise MoleValueError(
            "--weights", expected="numbers joined by commas, as in 0.5,0.5", got=f"'{printable(word, 40)}'"
        ) from None
