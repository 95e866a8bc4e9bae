"""`mole-kernels report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.screen import done
from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.files.writer import atomic_write
from mole_kernels.io.bank import load_bank
from mole_kernels.io.experts import load_expert
from mole_kernels.io.gates import GateFile, load_gates
from mole_kernels.patching.apply import patch
from mole_kernels.reports.record import Recorder
from mole_kernels.reports.report import report_page


def write(
    files: Sequence[Path],
    out: Path,
    pipeline: Path | None,
    gates: Path | None,
    prompt: str,
    steps: int,
    seed: int,
) -> None:
    """Read everything first, run the pipeline if there is one, then write the page whole."""
    bank, own = _read(files)
    chosen = load_gates(gates) if gates else own
    if chosen is not None and pipeline is None and gates is not None:
        raise MoleStateError("report", "gates say something only of a run", hint="add --pipeline FOLDER")
    seen = picture = None
    if pipeline is not None:
        seen, picture = _run(bank, chosen, str(pipeline), prompt, steps, seed)
    text = report_page(bank, seen, picture, title=", ".join(bank.names)[:120])

    def whole(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(out, whole)
    done(str(out), f"{len(text) / 1e6:.1f} MB")


def _read(files: Sequence[Path]) -> tuple[ExpertBank, GateFile | None]:
    if len(files) == 1:
        try:
            return load_bank(files[0])
        except MoleFileError:
            # no single file of ours: one expert by itself
            pass
    names = [file.stem for file in files]
    if len(set(names)) != len(names):
        raise MoleValueError(
            "report", expected="files of different names, which name the experts", got=", ".join(names)
        )
    return ExpertBank({name: load_expert(file) for name, file in zip(names, files)}), None


def _run(
    bank: ExpertBank, gates: GateFile | None, folder: str, prompt: str, steps: int, seed: int
) -> tuple[Recorder, Tensor]:
    pipe = read_pipeline(folder, command="report")
    with patch(pipe, bank, gates) as handle:
        seen = _Sized(handle)
        generator = torch.Generator().manual_seed(seed)
        images = pipe(
            prompt,
            num_inference_steps=steps,
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
