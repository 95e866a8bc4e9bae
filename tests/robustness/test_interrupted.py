"""76: kill -9 and a full disk while files are written; what was there before loads, bit for bit."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_kernels.errors import MoleFileError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.compress import compress
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import load_expert, save_expert
from mole_kernels.io.convert import convert
from mole_kernels.io.gates import GateFile, GateTensors, save_gates
from mole_kernels.io.merge import compress_file, merge_files
from mole_kernels.io.mix_of_show import save_mix_of_show
from mole_kernels.patching.apply import patch
from mole_kernels.training.checkpoint import Checkpoint, list_checkpoints, load_latest, save_checkpoint
from tests.robustness.cases import Ground

LAYERS = [f"unet.mid_block.attentions.{i}.proj_in" for i in range(3)]


def expert(seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    draw = {
        path: (torch.randn(4, 256, generator=generator), torch.randn(256, 4, generator=generator))
        for path in LAYERS
    }
    return Expert({path: LowRank(down, up, 0.5) for path, (down, up) in draw.items()})


def gates() -> GateFile:
    tensors = GateTensors(torch.randn(2, 256), torch.zeros(2), torch.randn(2, 256), torch.zeros(2))
    return GateFile(dict.fromkeys(LAYERS, tensors), ("a", "b"))


def checkpoint(step: int) -> Checkpoint:
    weights = {"w": torch.full((64, 256), float(step))}
    state = {"optimiser": {"m": torch.full((64, 256), float(step))}, "rng": {}, "data": {}, "scaler": {}}
    return Checkpoint(step=step, weights=weights, config={}, identity={}, ema=None, losses=[], **state)


def patched_save(path: Path, tmp: Path) -> None:
    ground = Ground(tmp, pytest.MonkeyPatch())
    wide = torch.nn.Linear(256, 256)
    ground.model.add_module("wide", wide)
    handle = patch(ground.model, {"a": Expert({"wide": LowRank(torch.ones(4, 256), torch.ones(256, 4))})})
    handle.save(path)


# what is written, to `path`, from files in `tmp`
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "bank": lambda path, tmp: ExpertBank({"a": expert(), "b": expert(1)}).save(path),
    "diffusers": lambda path, tmp: save_expert(expert(), path, "diffusers"),
    "kohya": lambda path, tmp: save_expert(expert(), path, "kohya"),
    "gates": lambda path, tmp: save_gates(gates(), path),
    "handle": patched_save,
    "convert": lambda path, tmp: convert(tmp / "in.safetensors", path, "kohya"),
    "merge": lambda path, tmp: merge_files([tmp / "in.safetensors", tmp / "in2.safetensors"], path),
    "compress-file": lambda path, tmp: compress_file(tmp / "in.safetensors", path, rank=3),
    "compressed": lambda path, tmp: save_expert(compress(expert(), rank=3)[0], path),
    "mix-of-show": lambda path, tmp: save_mix_of_show(expert(), {}, path),
    "mix-of-show-large": lambda path, tmp: save_mix_of_show(
        expert(), {"text_encoder": {"<a>": torch.zeros(16, 7680)}}, path
    ),
}


@pytest.mark.parametrize("what", WRITERS)
def test_76_a_full_disk_is_said_and_leaves_the_old_file(what: str, tmp_path: Path):
    """RLIMIT_FSIZE ends every file at 2,000 bytes, as a quota does."""
    tmp, out = tmp_path / "in", tmp_path / "out"
    tmp.mkdir()
    out.mkdir()
    save_expert(expert(), tmp / "in.safetensors")
    save_expert(expert(1), tmp / "in2.safetensors")
    path = out / ("x.pth" if "mix-of-show" in what else "x.safetensors")
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(MoleFileError, match="could not be written"):
            WRITERS[what](path, tmp)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(out) == [path.name]
    # and with room again it is written
    WRITERS[what](path, tmp)
    assert path.stat().st_size > 2000


@pytest.mark.parametrize("room", [2000, 70_000], ids=["in-the-weights", "in-the-optimiser"])
def test_76_a_full_disk_while_training_saves(room: int, tmp_path: Path):
    save_checkpoint(tmp_path, checkpoint(1), keep_last=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    second = checkpoint(2)
    second.optimiser["more"] = torch.zeros(10_000)
    try:
        with pytest.raises(MoleFileError, match="could not be written"):
            save_checkpoint(tmp_path, second, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1] and len(list(tmp_path.iterdir())) == 1
    found = load_latest(tmp_path)
    assert found is not None and found.weights["w"].eq(1).all()


def killed(work: Callable[[int], object], after: float, begun: Callable[[], bool]) -> None:
    """Do `work(1)`, `work(2)`, … in a child, and kill -9 it `after` seconds after `begun`."""
    child = os.fork()
    if child == 0:
        try:
            for i in range(1, 10**6):
                work(i)
        finally:
            os._exit(1)
    try:
        until = time.monotonic() + 60
        while not begun():
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < until
            time.sleep(0.001)
        time.sleep(after)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


MOMENTS = [0.0, 0.003, 0.007, 0.011, 0.023]


@pytest.mark.parametrize("after", MOMENTS)
def test_76_kill_9_while_a_bank_is_saved(after: float, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    atomic_save({"a": torch.zeros(100_000), "b": torch.zeros(100_000)}, path)
    first = path.stat().st_ino

    def save(i: int) -> None:
        atomic_save({name: torch.full((100_000,), float(i)) for name in "ab"}, path)

    killed(save, after, lambda: path.stat().st_ino != first)
    tensors, _ = read_tensors(path)
    # one save or another, never parts of two
    assert all(tensor.eq(tensors["a"][0]).all() for tensor in tensors.values()) and tensors["a"][0] >= 1
    atomic_save({"a": torch.ones(1)}, path)
    assert read_tensors(path)[0]["a"].tolist() == [1.0]


@pytest.mark.parametrize("after", MOMENTS)
def test_76_kill_9_while_files_are_merged(after: float, tmp_path: Path):
    inputs, out = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out.safetensors"
    for seed, path in enumerate(inputs):
        save_expert(expert(seed), path)
    merge_files(inputs, out)
    want, first = load_expert(out), out.stat().st_ino
    killed(lambda i: merge_files(inputs, out), after, lambda: out.stat().st_ino != first)
    found = load_expert(out)
    assert all(torch.equal(found.layers[path].delta(), layer.delta()) for path, layer in want.layers.items())
    assert all(
        torch.equal(load_expert(path).layers[LAYERS[0]].down, expert(seed).layers[LAYERS[0]].down)
        for seed, path in enumerate(inputs)
    )


@pytest.mark.parametrize("after", MOMENTS)
def test_76_kill_9_while_checkpoints_are_saved(after: float, tmp_path: Path):
    killed(
        lambda i: save_checkpoint(tmp_path, checkpoint(i), keep_last=2),
        after,
        lambda: len(list_checkpoints(tmp_path)) == 2,
    )
    last = load_latest(tmp_path)
    assert last is not None and last.step == list_checkpoints(tmp_path)[-1][0] >= 2
    assert last.weights["w"].eq(last.step).all() and last.optimiser["m"].eq(last.step).all()
