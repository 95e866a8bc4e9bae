"""Streaming saves write the same file as a save at once, and leave nothing behind when they fail."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from mole_kernels.errors import MoleFileError
from mole_kernels.files.reader import read_header, read_tensors
from mole_kernels.files.stream import atomic_save_stream
from mole_kernels.files.writer import atomic_save


def mixed() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=draw).half(),
        "alpha": torch.tensor(2.0),
        "turned": torch.randn(4, 6, generator=draw).mT,
        "double": torch.randn(2, 2, 1, 1, generator=draw).double(),
        "eight": torch.randn(7, generator=draw).to(torch.float8_e4m3fn),
        "large": torch.randn(1200, 1000, generator=draw),
    }


def test_the_same_bytes_as_a_save_at_once(tmp_path: Path):
    atomic_save(mixed(), tmp_path / "whole.safetensors", {"note": "x"})
    said = {}

    def parts():
        yield from mixed().items()
        said["note"] = "x"

    atomic_save_stream(parts(), tmp_path / "stream.safetensors", lambda: said)
    assert (tmp_path / "stream.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert list(read_tensors(tmp_path / "stream.safetensors")[0]) == list(mixed())
    assert sorted(os.listdir(tmp_path)) == ["stream.safetensors", "whole.safetensors"]


def test_nothing_is_a_file_too(tmp_path: Path):
    atomic_save_stream((), tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors").entries == {}


def broken(error: BaseException):
    yield "a", torch.ones(1000)
    raise error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), ValueError("b")], ids=lambda e: type(e).__name__
)
def test_76_what_stops_the_stream_leaves_the_old_file(error: BaseException, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        atomic_save_stream(broken(error), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("count", [3, 1000], ids=["in the last copy", "in the data"])
def test_76_full_disk(count: int, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # three tensors fit to the byte, and the header before them no more
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 40_000, hard))
    try:
        with pytest.raises(MoleFileError, match="could not be written") as caught:
            atomic_save_stream(((str(i), torch.ones(10_000)) for i in range(count)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "untouched" in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]


def test_a_key_twice_and_what_the_reader_would_refuse(tmp_path: Path):
    with pytest.raises(MoleFileError, match="'a' came twice"):
        atomic_save_stream([("a", torch.ones(1)), ("a", torch.ones(1))], tmp_path / "x.safetensors")
    with pytest.raises(MoleFileError, match="bad tensor key"):
        atomic_save_stream([("a\n", torch.ones(1))], tmp_path / "x.safetensors")
    with pytest.raises(MoleFileError, match="no folder"):
        atomic_save_stream([("a", torch.ones(1))], tmp_path / "none" / "x.safetensors")
    assert os.listdir(tmp_path) == []
