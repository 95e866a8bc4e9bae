"""`mole-kernels report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mole_kernels.cli.files import ReportArgs
from mole_kernels.cli.pipelines import named_expert, read_pipeline
from mole_kernels.cli.place import ready_file
from mole_kernels.cli.scales import scale_of_text
from mole_kernels.cli.screen import done
from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.files.writer import atomic_write
from mole_kernels.io.bank import load_bank
from mole_kernels.io.convert import kind_of
from mole_kernels.io.gates import GateFile, load_gates
from mole_kernels.patching.apply import patch
from mole_kernels.patching.block_scales import Scale
from mole_kernels.reports.record import Recorder
from mole_kernels.reports.report import report_page


def run(asked: ReportArgs) -> None:
    """Read everything first, run the model if there is one, then write the page whole."""
    scale = scale_of_text(asked.scale)
    if asked.model is None and (asked.gates is not None or scale is not None):
        raise MoleStateError("report", "gates and scales show in a run alone", hint="add --model FOLDER")
    ready_file(asked.out)
    pipe = None if asked.model is None else read_pipeline(asked.model, command="report")
    bank, own = _read(asked.files, pipe)
    gates = load_gates(asked.gates) if asked.gates else own
    recorder = picture = None
    if pipe is not None:
        recorder, picture = _draw(pipe, bank, gates, scale, asked)
    text = report_page(bank, recorder, picture, title=", ".join(bank.names)[:120])

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(asked.out, write)
    done(str(asked.out), f"{len(text) / 1e6:.1f} MB")


def _read(files: Sequence[Path], pipe: Any) -> tuple[ExpertBank, GateFile | None]:
    if len(files) == 1 and kind_of(files[0]) == "bank":
        return load_bank(files[0])
    names = [file.stem for file in files]
    if len(set(names)) != len(names):
        raise MoleValueError(
            "report", expected="files of different names, which name the experts", got=", ".join(names)
        )
    pipeline = "auto" if pipe is None else pipe
    return ExpertBank({name: named_expert(file, pipeline) for name, file in zip(names, files)}), None


def _draw(
    pipe: Any, bank: ExpertBank, gates: GateFile | None, scale: Scale | None, asked: ReportArgs
) -> tuple[Recorder, Tensor]:
    with patch(pipe, bank, gates) as handle:
        if scale is not None:
            handle.set_scales(dict.fromkeys(bank.names, scale))
        seen = _Sized(handle)
        generator = torch.Generator().manual_seed(asked.seed)
        images = pipe(
            asked.prompt,
            num_inference_steps=asked.sampling_steps,
            generator=generator,
            output_type="pt",
            callback_on_step_end=seen.callback,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
    assert seen.recorder is not None
    return seen.recorder, images[-1].float().cpu()


class _Sized:
    """A Recorder that learns the latents' size at the first step."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.recorder = handle, None

    recorder: Recorder | None

    def callback(self, pipe: object, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.recorder is None:
            self.recorder = Recorder(self.handle, *kwargs["latents"].shape[-2:])
        return self.recorder.callback(pipe, step, timestep, kwargs)
