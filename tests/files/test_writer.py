"""Atomic saves: what is written is read back bit for bit, by us and by safetensors; a failed save leaves the
old file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleTypeError
from mole_kernels.files import writer
from mole_kernels.files.limits import DTYPES
from mole_kernels.files.reader import read_header, read_tensors
from mole_kernels.files.writer import atomic_save, atomic_write

keys = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(
    lambda key: key != "__metadata__" and key.isprintable()
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(DTYPES))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bit pattern, NaN and denormals included, of any dtype and shape, sometimes not contiguous."""
    shape, dtype = draw(shapes), DTYPES[draw(dtypes)]
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(
        0,
        256,
        (count,),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 999))),
    )
    made = bits.view(dtype).reshape(shape)
    return (
        made.transpose(0, -1).contiguous().transpose(0, -1)
        if len(shape) > 1 and draw(st.booleans())
        else made
    )


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    saved=st.dictionaries(keys, tensors(), max_size=6),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
def test_round_trip_is_bitwise(saved: dict[str, Tensor], metadata: dict[str, str], tmp_path: Path):
    path = tmp_path / "x.safetensors"
    atomic_save(saved, path, metadata)
    found, said = read_tensors(path)
    assert list(found) == list(saved)
    assert said == metadata
    for key, tensor in saved.items():
        assert (found[key].dtype, found[key].shape, bits(found[key])) == (
            tensor.dtype,
            tensor.shape,
            bits(tensor),
        )


def test_safetensors_reads_what_we_write_and_aligns(tmp_path: Path):
    saved = {
        "half": torch.ones(3, dtype=torch.float16),
        "scalar": torch.tensor(2.0),
        "double": torch.rand(2, 3, dtype=torch.float64),
    }
    atomic_save(saved, tmp_path / "x.safetensors", {"note": "é\x1b"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"note": "é\x1b"}
        assert set(file.keys()) == set(saved)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in saved.items())
    assert all(
        entry.begin % entry.dtype.itemsize == 0
        for entry in read_header(tmp_path / "x.safetensors").entries.values()
    )


def fail_on(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """Make one step of the save raise."""

    def raising(*_, **__):
        raise error

    monkeypatch.setattr(writer.os, where, raising)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()],
    ids=lambda e: type(e).__name__,
)
def test_76_failed_save_keeps_the_old_file(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x.safetensors"
    atomic_save({"old": torch.ones(2)}, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        fail_on(patch, step, error)
        with pytest.raises(MoleFileError if isinstance(error, OSError) else type(error)):
            atomic_save({"new": torch.zeros(100)}, path)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == before


def test_76_ctrl_c_in_the_middle_of_the_data(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def write(file) -> None:
        file.write(b"half of it")
        file.flush()
        assert len(os.listdir(tmp_path)) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, write)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == b"old"


def test_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_on(monkeypatch, "fsync", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(MoleFileError, match="No space left") as caught:
        atomic_save({}, tmp_path / "x.safetensors")
    assert "untouched" in str(caught.value)


def test_link_and_mode_are_kept(tmp_path: Path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    atomic_save({"a": torch.ones(1)}, real)
    real.chmod(0o640)
    link.symlink_to(real)
    atomic_save({"b": torch.ones(1)}, link)
    assert link.is_symlink()
    assert list(read_tensors(real)[0]) == ["b"]
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("saved", "error", "words"),
    [
        ({"a\x1b": torch.ones(1)}, MoleFileError, "bad tensor key"),
        ({"k" * 513: torch.ones(1)}, MoleFileError, "bad tensor key"),
        ({"__metadata__": torch.ones(1)}, MoleFileError, "cannot be written"),
        ({"a": torch.ones(1, 1, 1, 1, 1)}, MoleFileError, "at most 4 dimensions"),
        ({"a": torch.ones(1, dtype=torch.int32)}, MoleTypeError, "got torch.int32"),
        ({"a": torch.ones(1, device="meta")}, MoleTypeError, "a dense tensor"),
        ({str(i): torch.empty(0) for i in range(20_001)}, MoleFileError, "at most 20,000 tensors"),
    ],
    ids=["key-escape", "key-long", "key-metadata", "dims", "dtype", "meta", "count"],
)
def test_what_the_reader_refuses_is_not_written(
    saved: dict, error: type[Exception], words: str, tmp_path: Path
):
    with pytest.raises(error, match=words):
        atomic_save(saved, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_no_such_folder_and_a_folder_as_file(tmp_path: Path):
    with pytest.raises(MoleFileError, match="no folder"):
        atomic_save({}, tmp_path / "none" / "x.safetensors")
    with pytest.raises(MoleFileError, match="a folder"):
        atomic_save({}, tmp_path)
    with pytest.raises(MoleTypeError, match="metadata of strings"):
        atomic_save({}, tmp_path / "x.safetensors", {"a": 1})  # type: ignore[dict-item]
