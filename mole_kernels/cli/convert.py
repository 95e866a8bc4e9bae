"""`mole-kernels convert`: one file into another dialect."""

from __future__ import annotations

import torch

from mole_kernels.cli.files import ConvertArgs
from mole_kernels.cli.pipelines import pipeline_of_name
from mole_kernels.cli.place import ready_file
from mole_kernels.cli.screen import done
from mole_kernels.io.convert import convert


def run(asked: ConvertArgs) -> None:
    """Convert, and say what was written."""
    ready_file(asked.out)
    converted = convert(
        asked.source,
        asked.out,
        asked.to,
        dtype=getattr(torch, asked.dtype) if asked.dtype else None,
        expert=asked.expert,
        alpha=asked.concept_scale,
        sdxl=asked.sdxl,
        pipeline=pipeline_of_name(asked.pipeline),
    )
    for path, what in converted.written.items():
        done(path, what)
