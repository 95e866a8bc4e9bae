"""Cases 1 to 30: files. Each is given to `patch` on a plain model and to `Handle.swap` on a patched one."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mole_kernels.errors import MoleFileError
from mole_kernels.files import reader
from mole_kernels.files.header import printable_metadata
from mole_kernels.files.reader import read_header, read_tensors
from mole_kernels.io import load_expert
from mole_kernels.patching.apply import patch
from tests.files import test_bad_files as there
from tests.raw import entry, raw, write
from tests.robustness.cases import Case, Ground

HERE = "tests/files/test_bad_files.py::"
SAYS = {
    1: "empty file",
    2: "seven bytes",
    3: "header length 2⁶³",
    4: "header longer than the file",
    5: "header over 100 MB",
    6: "header over 16 MB",
    7: "header is not JSON",
    8: "header is a JSON list",
    9: "header is not UTF-8",
    10: "header nested 100,000 deep",
    11: "truncated data",
    12: "trailing bytes, zip polyglot",
    13: "hole between tensors",
    14: "overlapping tensors",
    15: "end before begin",
    16: "negative or fractional shape",
    17: "shape × dtype ≠ bytes",
    18: "shape product overflows",
    19: "duplicate key",
    20: "decoy duplicate",
    21: "a million empty tensors",
    22: "metadata that is no text",
    44: "integer or bool dtype",
    45: "F8_E8M0, F4, F6",
    49: "hostile key text",
}


def broken(case: there.Broken) -> Case:
    return Case(
        case.id,
        SAYS[int(case.id[:2])],
        source=lambda g: write(g.folder, case.content),
        error=case.error,
        words=case.words,
        deeper=(HERE + "test_broken_file_is_refused_by_name",),
    )


BROKEN = [broken(case) for case in there.CASES if case.id[:2].isdigit()]


def long_header(size: int):
    def make(g: Ground) -> Path:
        path = g.folder / "long.safetensors"
        with path.open("wb") as file:
            file.write(size.to_bytes(8, "little"))
            file.truncate(size + 8)
        return path

    return make


def polyglot(g: Ground) -> Path:
    path = write(g.folder, raw({"a": entry()}, there.FOUR))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    return path


class Exploding:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def torch_zip(g: Ground) -> Path:
    torch.save({"a": Exploding()}, g.folder / "zip.safetensors")
    return g.folder / "zip.safetensors"


def factors(path: str = "first", K: int = 6, N: int = 10, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A.weight": torch.ones(rank, K), f"{path}.lora_B.weight": torch.ones(N, rank)}


def good_file(folder: Path, name: str = "good.safetensors", metadata: dict[str, str] | None = None) -> Path:
    save_file(factors(), folder / name, metadata)
    return folder / name


def metadata_is_escaped(g: Ground) -> None:
    evil = {
        "title": "\x1b]0;owned\x07<script>alert(1)</script>",
        "\x1b[2J": "{{7*7}}",
        "__import__('os')": "x" * 10_000,
    }
    path = good_file(g.folder, metadata=evil)
    found = read_header(path).metadata
    assert found == evil
    assert all(
        text.isprintable() and len(text) <= 120 for item in printable_metadata(found).items() for text in item
    )
    patch(g.model, {"a": path}).remove()


def fifo(g: Ground) -> Path:
    os.mkfifo(g.folder / "fifo.safetensors")
    return g.folder / "fifo.safetensors"


def folder_as_file(g: Ground) -> Path:
    (g.folder / "folder.safetensors").mkdir()
    return g.folder / "folder.safetensors"


def outside(g: Ground) -> None:
    (g.folder / "inside").mkdir()
    good_file(g.folder)
    read_tensors("../good.safetensors", root=g.folder / "inside")


def symlink_outside(g: Ground) -> None:
    (g.folder / "inside").mkdir()
    (g.folder / "inside" / "link.safetensors").symlink_to(good_file(g.folder))
    read_tensors("link.safetensors", root=g.folder / "inside")


def unreadable(g: Ground) -> Path:
    path = good_file(g.folder)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    g.monkeypatch.setattr(reader.os, "open", refuse)
    return path


def replaced_while_loading(g: Ground) -> None:
    path, new = good_file(g.folder), g.folder / "new.safetensors"
    save_file({key: tensor * 2 for key, tensor in factors().items()}, new)
    there.during_read(g.monkeypatch, lambda: os.replace(new, path))
    assert load_expert(path).layers["first"].down.eq(1).all()


def overwritten_while_loading(g: Ground) -> Path:
    path = good_file(g.folder)
    content, times = path.read_bytes(), iter(range(1, 10))
    there.during_read(
        g.monkeypatch,
        lambda: (path.write_bytes(content[:-4] + b"\0" * 4), os.utime(path, ns=(0, next(times)))),
    )
    return path


def index_naming(name: str):
    def make(g: Ground) -> Path:
        good_file(g.folder, "outside.safetensors")
        (g.folder / "inside").mkdir()
        text = json.dumps({"weight_map": dict.fromkeys(factors(), name)}).encode()
        return write(g.folder / "inside", text, "m.safetensors.index.json")

    return make


def refused(id: str, says: str, source, *words: str, deeper: str = "") -> Case:
    return Case(
        id, says, source=source, error=MoleFileError, words=words, deeper=(HERE + deeper,) if deeper else ()
    )


FILES = [
    refused(
        "05-header-over-100MB",
        SAYS[5],
        long_header(101 * 2**20),
        "at most 16,777,216",
        deeper="test_long_header_is_refused_unread",
    ),
    refused(
        "06-header-over-16MB",
        SAYS[6],
        long_header(2**24 + 1),
        "at most 16,777,216",
        deeper="test_long_header_is_refused_unread",
    ),
    refused(
        "12-zip-polyglot", SAYS[12], polyglot, "bytes follow the last tensor", deeper="test_12_zip_polyglot"
    ),
    refused(
        "21-tensors",
        SAYS[21],
        lambda g: write(g.folder, there.million(1_000_000)),
        "header",
        deeper="test_tensor_bomb_is_refused_unparsed",
    ),
    refused(
        "21-under-16MB", SAYS[21], lambda g: write(g.folder, there.million(250_000)), "at most 20,000 tensors"
    ),
    Case(
        "23-escapes-in-metadata",
        "terminal escapes, HTML or code in metadata",
        act=metadata_is_escaped,
        outcome="accepted as text; shown escaped and cut, never evaluated",
        deeper=(HERE + "test_23_metadata_is_text_and_escaped_when_shown",),
    ),
    refused(
        "24-pickle",
        "a pickle named `.safetensors`",
        lambda g: write(g.folder, pickle.dumps({"a": Exploding(), "pad": "x" * 99})),
        "a pickle or a zip",
        deeper="test_24_pickle_under_a_false_name",
    ),
    refused(
        "24-torch-zip",
        "a pickle named `.safetensors`",
        torch_zip,
        "a pickle or a zip",
        deeper="test_24_torch_zip_under_a_false_name",
    ),
    *(
        refused(
            f"25{suffix.replace('.', '-')}",
            "a `.pt`, `.pth`, `.bin` or `.ckpt` file",
            lambda g, suffix=suffix: write(g.folder, raw({"a": entry()}, there.FOUR), f"x{suffix}"),
            "can run code",
            "mole-kernels convert",
            deeper="test_25_pickle_suffix_names_the_converter",
        )
        for suffix in (".pt", ".pth", ".bin", ".ckpt")
    ),
    refused(
        "26-fifo",
        "a folder, FIFO or device",
        fifo,
        "a FIFO, socket or device",
        deeper="test_26_folder_fifo_and_device_do_not_block",
    ),
    refused("26-folder", "a folder, FIFO or device", folder_as_file, "got a folder"),
    refused("26-device", "a folder, FIFO or device", lambda g: "/dev/zero", "a FIFO, socket or device"),
    Case(
        "27-dots",
        "`../` or a link out of the given folder",
        act=outside,
        error=MoleFileError,
        words=("good.safetensors: lies outside the folder",),
        deeper=(HERE + "test_27_path_out_of_the_folder",),
    ),
    Case(
        "27-link",
        "`../` or a link out of the given folder",
        act=symlink_outside,
        error=MoleFileError,
        words=("lies outside the folder",),
    ),
    refused(
        "28-missing",
        "missing or unreadable",
        lambda g: g.folder / "none.safetensors",
        "no such file",
        deeper="test_28_missing_and_unreadable",
    ),
    refused("28-unreadable", "missing or unreadable", unreadable, "Permission denied"),
    Case(
        "29-replaced",
        "replaced while loading",
        act=replaced_while_loading,
        outcome="one handle, read once: the old file, whole",
        deeper=(HERE + "test_29_replaced_while_loading_reads_the_old_file_whole",),
    ),
    refused(
        "29-overwritten",
        "replaced while loading",
        overwritten_while_loading,
        "the file changed while it was read",
        deeper="test_29_overwritten_or_cut_while_loading",
    ),
    refused(
        "30-index-dots",
        "an index naming an outside path",
        index_naming("../outside.safetensors"),
        "a file beside the index",
        deeper="test_30_index_naming_an_outside_path",
    ),
    refused(
        "30-index-absolute",
        "an index naming an outside path",
        index_naming("/etc/passwd"),
        "a file beside the index",
    ),
]

CASES = BROKEN + FILES
