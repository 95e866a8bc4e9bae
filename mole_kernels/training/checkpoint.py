"""Checkpoints of a run: one folder each, complete or not there at all.

run_dir/step-00000100/   weights.safetensors   the trained tensors
                         ema.safetensors       their running mean, if kept
                         optimiser.pt          its state, losses, random state of each process (tensors and
                                               plain values)
                         run.json              step, config, identity of what is trained
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole_kernels.errors import MoleError, MoleFileError, MoleStateError, MoleWarning, printable
from mole_kernels.files.text import read_json_file
from mole_kernels.files.writer import torch_save

FORMAT = "mole-kernels-run-2"
_PREFIX, _UNFINISHED = "step-", ".unfinished-"
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass
class Checkpoint:
    """All of a run between two steps.

    Args:
        step: Steps taken.
        weights: {name: tensor} of what trains.
        optimiser: Its `state_dict()`.
        losses: Losses of all steps so far.
        rng: Random states, one dict for each process.
        data: `BatchStream.state()`.
        config: `TrainConfig.to_dict()`.
        identity: What else must be the same on resume, by name, such as experts and ranks.
        scaler: State of fp16's loss scaler, else {}.
        ema: Running mean of the weights, if it is kept.
    """

    step: int
    weights: dict[str, Tensor]
    optimiser: dict[str, Any]
    losses: list[float]
    rng: list[dict[str, Tensor]]
    data: dict[str, Any]
    config: dict[str, Any]
    identity: dict[str, str]
    scaler: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Tensor] | None = None

    def check_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """MoleStateError naming the first tensor that differs from `parameters` in name, shape or dtype."""
        for name in [*self.weights, *parameters]:
            saved, here = (_describe(tensors.get(name)) for tensors in (self.weights, parameters))
            if saved != here:
                hint = (
                    "resume with the experts, ranks, gates and model the run began with, or begin "
                    "another run_dir"
                )
                raise MoleStateError(
                    f"resume: {name}", expected=f"{saved} as in the checkpoint", got=here, hint=hint
                )

    def check_kinds(self) -> None:
        """MoleStateError where an entry is not what a run writes, before anything is taken over."""
        with self.understood():
            _check_kinds(self)

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Turn what optimiser, batches and generators raise for a state that is not theirs into
        MoleStateError.
        """
        try:
            yield
        except MoleError:
            raise
        except _BROKEN as error:
            raise MoleStateError(
                "resume",
                f"the state in the checkpoint of step {self.step} cannot be taken over"
                f" ({type(error).__name__}: {printable(error, 200)})",
                hint="remove that checkpoint's folder to go on from the one before it",
            ) from error

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """MoleStateError naming the first entry of the run's identity that differs."""
        for key in sorted({*self.identity, *identity}):
            if self.identity.get(key) != identity.get(key):
                hint = "resume with what the run began with, or begin another run_dir"
                raise MoleStateError(
                    f"resume: {key}",
                    expected=repr(self.identity.get(key)),
                    got=repr(identity.get(key)),
                    hint=hint,
                )


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Writes the checkpoint's folder beside the others, renames it when it is on the disk, then drops the
    oldest.
    """
    final = run_dir / f"{_PREFIX}{checkpoint.step:08d}"
    draft = run_dir / f"{_UNFINISHED}{final.name}-{os.getpid()}"
    try:
        draft.mkdir(parents=True)
        _write(draft, checkpoint)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        _sync(run_dir)
    # whatever stops the write, Ctrl-C included, leaves no half folder
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        # safetensors has a name of its own for a full disk
        if isinstance(error, OSError | SafetensorError):
            hint = "earlier checkpoints are untouched"
            raise MoleFileError(
                str(final), f"the checkpoint could not be written ({error})", hint=hint
            ) from error
        raise
    for _, old in list_checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """[(step, folder)] of the finished checkpoints, oldest first."""
    folders = [(p.name.removeprefix(_PREFIX), p) for p in run_dir.glob(f"{_PREFIX}*") if p.is_dir()]
    return sorted((int(number), p) for number, p in folders if number.isdecimal())


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, with a warning for each one passed over; None where there is
    none yet.
    """
    folders = list_checkpoints(run_dir)
    for _, folder in reversed(folders):
        try:
            return load_checkpoint(folder)
        except MoleFileError as error:
            warnings.warn(f"{error} Trying the one before it.", MoleWarning, stacklevel=2)
    if folders:
        raise MoleStateError(str(run_dir), f"none of its {len(folders)} checkpoints can be read")
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads one checkpoint's folder; a broken one is a MoleFileError."""
    try:
        about = read_json_file(folder / "run.json")
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}, expected {FORMAT!r}")
        state = torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
        ema = load_file(folder / "ema.safetensors") if about["ema"] else None
        return Checkpoint(
            step=about["step"],
            weights=load_file(folder / "weights.safetensors"),
            config=about["config"],
            identity=about["identity"],
            ema=ema,
            optimiser=state["optimiser"],
            losses=state["losses"].tolist(),
            rng=state["rng"],
            data=state["data"],
            scaler=state["scaler"],
        )
    except (MoleFileError, *_BROKEN) as error:
        raise MoleFileError(
            str(folder), f"this checkpoint cannot be read ({type(error).__name__}: {error})"
        ) from error


def _check_kinds(c: Checkpoint) -> None:
    """TypeError or ValueError where an entry is not of its kind."""
    for name in ("config", "identity", "optimiser", "data", "scaler"):
        _check_kind(name, getattr(c, name), dict)
    for key, kind in (("position", int), ("processes", int), ("checksums", dict)):
        _check_kind(f"data.{key}", c.data.get(key), kind)
    _check_kind("rng", c.rng, list)
    for state in c.rng:
        _check_kind("rng", state, dict)
        _check_kind("rng.cpu", state.get("cpu"), Tensor)
    if type(c.step) is not int or c.step != len(c.losses):
        raise ValueError(f"step {c.step!r} with {len(c.losses)} losses")
    if len(c.rng) != c.data["processes"]:
        raise ValueError(f"random states of {len(c.rng)} processes of {c.data['processes']}")
    if (c.ema is None) != (c.config.get("ema_decay") is None):
        raise ValueError("a running mean where the settings have none, or none where they have one")
    shapes = {name: tensor.shape for name, tensor in c.weights.items()}
    if c.ema is not None and {name: tensor.shape for name, tensor in c.ema.items()} != shapes:
        raise ValueError("the running mean is not of the weights")


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")


def clear_unfinished(run_dir: Path) -> None:
    """Removes what a killed process left half-written."""
    for draft in run_dir.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(draft, ignore_errors=True)


def _write(folder: Path, c: Checkpoint) -> None:
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in c.weights.items()}, folder / "weights.safetensors"
    )
    if c.ema is not None:
        save_file({k: v.detach().cpu().contiguous() for k, v in c.ema.items()}, folder / "ema.safetensors")
    losses = torch.tensor(c.losses, dtype=torch.float64)
    state = {"optimiser": c.optimiser, "losses": losses, "rng": c.rng, "data": c.data, "scaler": c.scaler}
    with (folder / "optimiser.pt").open("wb") as file:
        torch_save(state, file)
    about = {
        "format": FORMAT,
        "step": c.step,
        "ema": c.ema is not None,
        "config": c.config,
        "identity": c.identity,
    }
    (folder / "run.json").write_text(json.dumps(about, indent=1))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Has the file, or the names in the folder, reach the disk before what follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
