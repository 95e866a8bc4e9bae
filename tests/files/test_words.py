"""What a file is that cannot be read, in words: other formats, downloads that stopped, disks that fail,
links.
"""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mole_kernels.errors import MoleError, MoleFileError
from mole_kernels.files.reader import SafetensorsFile, read_header, read_tensors

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
BEGINNINGS = {
    "lfs": (POINTER, "Git LFS pointer", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html>not found</html>", "web page", "download"),
    "page-lower": (b"<!doctype html>", "web page", "download"),
    "page-bare": (b"<html><body>login</body></html>", "web page", "login"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF", "safetensors"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(40), "gzip", "unpack"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "picture", ""),
    "zeros": (bytes(4096), "begins with zeros", "download it again"),
    "empty": (b"", "an empty file", "did not finish"),
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_other_formats_are_named(case: str, tmp_path: Path):
    content, words, hint = BEGINNINGS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_tensors):
        with pytest.raises(MoleFileError, match=words) as caught:
            read(path)
        assert hint in caught.value.hint


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path_factory, share):
    """However far a download came, the file is named, and what to do."""
    folder = tmp_path_factory.mktemp("cut")
    save_file(
        {"a.lora_A.weight": torch.ones(4, 8), "a.lora_B.weight": torch.ones(8, 4)},
        folder / "whole.safetensors",
    )
    content = (folder / "whole.safetensors").read_bytes()
    path = folder / "x.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(MoleFileError, match=r"x\.safetensors") as caught:
        read_tensors(path)
    assert caught.value.hint


class FailingFile(FileIO):
    """A file on a disk that fails after some reads."""

    def __init__(self, handle: int, good: int, code: int) -> None:
        super().__init__(handle, "rb")
        self.good, self.code = good, code

    def _count(self) -> None:
        self.good -= 1
        if self.good < 0:
            raise OSError(self.code, os.strerror(self.code))

    def read(self, size: int = -1) -> bytes:
        self._count()
        return super().read(size)

    def readinto(self, buffer) -> int:
        self._count()
        return super().readinto(buffer)


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENODEV], ids=errno.errorcode.get
)
@pytest.mark.parametrize("good", range(4))
def test_read_errors_have_words(code: int, good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the length, at the header, and at the tensors."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    monkeypatch.setattr(
        "mole_kernels.files.opening.FileIO", lambda handle, mode: FailingFile(handle, good, code)
    )
    with pytest.raises(MoleFileError, match=f"x.safetensors.*reading failed .{os.strerror(code)}"):
        read_tensors(path)


def test_a_file_that_goes_away_between_header_and_data(tmp_path: Path):
    """An open handle outlives its name; a file cut under it does not."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(400)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 200)
        with pytest.raises(MoleFileError, match="cut while 'a' was read"):
            file.read()
    save_file({"a": torch.ones(400)}, path)
    with SafetensorsFile(path) as file:
        path.unlink()
        assert file.read()["a"].sum() == 400


def hub_cache(folder: Path, shards: int = 2) -> Path:
    """A repository in the hub's cache: names in a snapshot link to blobs; returns the index."""
    repository = folder / "models--someone--lora"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    names = {}
    for i in range(shards):
        blob = blobs / f"{i:064x}"
        save_file({f"k{i}": torch.full((3,), float(i))}, blob)
        name = f"model-{i}.safetensors"
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
        names[f"k{i}"] = name
    index = blobs / f"{99:064x}"
    index.write_text(json.dumps({"weight_map": names}))
    (snapshot / "model.safetensors.index.json").symlink_to(Path("../../blobs") / index.name)
    return snapshot / "model.safetensors.index.json"


@pytest.mark.parametrize("relative", [False, True])
def test_shards_behind_the_links_of_the_hubs_cache(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index = hub_cache(tmp_path)
    if relative:
        monkeypatch.chdir(index.parent)
        index = Path(index.name)
    tensors, _ = read_tensors(index)
    assert {key: t[0].item() for key, t in tensors.items()} == {"k0": 0.0, "k1": 1.0}
    assert set(read_header(index).entries) == {"k0", "k1"}


@pytest.mark.parametrize("target", ["../../../outside.safetensors", "../../../other/blobs/x"])
def test_links_out_of_the_repository_stay_refused(target: str, tmp_path: Path):
    """Another repository of the same cache is outside, too."""
    index = hub_cache(tmp_path)
    outside = (index.parent / target).resolve()
    outside.parent.mkdir(parents=True, exist_ok=True)
    save_file({"k0": torch.ones(3)}, outside)
    shard = index.parent / "model-0.safetensors"
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(MoleFileError, match="lies outside the folder"):
        read_tensors(index)


def test_a_folder_that_only_looks_like_a_cache(tmp_path: Path):
    """Blobs that are a link lead anywhere, so they count for nothing."""
    index = hub_cache(tmp_path / "cache")
    repository = index.parents[2]
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MoleFileError, match="lies outside the folder"):
        read_tensors(index)


def test_a_link_to_nothing_says_so(tmp_path: Path):
    (tmp_path / "x.safetensors").symlink_to("gone")
    with pytest.raises(MoleError, match="link to a file that is not there") as caught:
        read_tensors(tmp_path / "x.safetensors")
    assert "download" in caught.value.hint
