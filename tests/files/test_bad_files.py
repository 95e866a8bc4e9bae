"""Broken and hostile files: each is refused in words that name the file and the fault, before its data is
touched.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mole_kernels.errors import MoleError, MoleFileError, MoleKeyError, MoleTypeError, printable
from mole_kernels.files import limits, reader
from mole_kernels.files.header import printable_metadata
from mole_kernels.files.reader import read_header, read_tensors
from tests.raw import entry, raw, write

FOUR = b"\0\0\x80\x3f"


@dataclass(frozen=True)
class Broken:
    """A file and the words its refusal must hold."""

    id: str
    content: bytes
    words: tuple[str, ...]
    error: type[MoleError] = MoleFileError

    def __str__(self) -> str:
        return self.id


def pair(first: dict, second: dict, data: bytes) -> bytes:
    return raw({"a": first, "b": second}, data)


def duplicate(inner: bytes) -> bytes:
    return b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + inner + b"}"


SECOND = b'{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'

CASES = [
    Broken("01-empty", b"", ("an empty file",)),
    Broken("02-seven-bytes", b"\x10" + bytes(6), ("only 7 bytes",)),
    Broken("03-length-2^63", raw(b"{}", length=2**63), ("header says", "9,223,372,036,854,775,808")),
    Broken("03-length-2^64-1", raw(b"{}", length=2**64 - 1), ("header says", "18,446,744,073,709,551,615")),
    Broken("04-header-longer-than-file", raw(b"{}", length=3), ("header says it is 3 bytes", "2 more")),
    Broken("07-not-json", raw(b"{'a': 1}"), ("not JSON",)),
    Broken("07-half-json", raw(b'{"a":'), ("not JSON",)),
    Broken("07-nan", raw(b'{"a":NaN}'), ("NaN is not JSON",)),
    Broken(
        "07-digits",
        raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', FOUR),
        ("not JSON",),
    ),
    Broken("08-list", raw([1, 2]), ("a JSON object", "list")),
    Broken("08-string", raw(b'"a"'), ("a JSON object", "str")),
    Broken("09-not-utf8", raw(b'{"\xff\xfe":1}'), ("not UTF-8", "byte 2")),
    Broken("10-deep-lists", raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ("names more",)),
    Broken("10-deep-lists-few", raw(b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"), ("nested too deep",)),
    Broken("10-deep-objects", raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), ("names more",)),
    Broken("10-deep-objects-few", raw(b'{"a":' * 15_000 + b"1" + b"}" * 15_000), ("nested too deep",)),
    Broken("11-truncated", raw({"a": entry((2,), 0, 8)}, FOUR), ("'a'", "end at byte 8", "holds 4")),
    Broken("12-trailing", raw({"a": entry()}, FOUR + b"x"), ("1 bytes follow",)),
    Broken("12-trailing-no-tensors", raw({}, b"xx"), ("2 bytes follow",)),
    Broken("13-hole", pair(entry(), entry(begin=8, end=12), FOUR * 3), ("'b'", "leaves a hole after 'a'")),
    Broken(
        "13-hole-at-start",
        raw({"a": entry(begin=4, end=8)}, FOUR * 2),
        ("'a'", "leaves a hole after the header"),
    ),
    Broken("14-overlap", pair(entry((2,), 0, 8), entry(begin=4, end=8), FOUR * 2), ("'b'", "overlaps 'a'")),
    Broken("14-same-range", pair(entry(), entry(), FOUR), ("'b'", "overlaps 'a'")),
    Broken(
        "15-end-before-begin",
        raw({"a": entry(begin=4, end=0)}, FOUR),
        ("'a'", "end at byte 0, before they begin at 4"),
    ),
    Broken("15-negative-offset", raw({"a": entry(begin=-4, end=0)}, FOUR), ("'a'", "data_offsets", "-4")),
    Broken("15-float-offset", raw({"a": entry(begin=0.0)}, FOUR), ("'a'", "data_offsets", "0.0")),
    Broken(
        "15-one-offset",
        raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, FOUR),
        ("data_offsets of two",),
    ),
    Broken("16-negative-shape", raw({"a": entry((-1,))}, FOUR), ("'a'", "whole numbers", "-1")),
    Broken("16-two-negative-shapes", raw({"a": entry((-1, -1))}, FOUR), ("'a'", "whole numbers")),
    Broken("16-float-shape", raw({"a": entry((1.0,))}, FOUR), ("'a'", "whole numbers", "1.0")),
    Broken("16-bool-shape", raw({"a": entry((True,))}, FOUR), ("'a'", "whole numbers", "True")),
    Broken("16-text-shape", raw({"a": entry("1")}, FOUR), ("'a'", "whole numbers")),
    Broken(
        "16-five-dimensions", raw({"a": entry((1, 1, 1, 1, 1))}, FOUR), ("'a'", "at most 4 dimensions", "5")
    ),
    Broken("17-size", raw({"a": entry((3,))}, FOUR), ("'a'", "expected 12 bytes for F32 [3], got 4")),
    Broken("18-overflow", raw({"a": entry((2**32, 2**32), 0, 0)}), ("'a'", "overflows")),
    Broken("18-overflow-behind-zero", raw({"a": entry((0, 2**40, 2**40), 0, 0)}), ("'a'", "overflows")),
    Broken("19-duplicate", raw(duplicate(b'"a":' + SECOND), FOUR * 2), ("'a' occurs twice",)),
    Broken("20-decoy-escaped", raw(duplicate(b'"\\u0061":' + SECOND), FOUR * 2), ("'a' occurs twice",)),
    Broken(
        "20-decoy-inside",
        raw(b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}}', FOUR),
        ("'shape' occurs twice",),
    ),
    Broken(
        "20-decoy-metadata",
        raw(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}'),
        ("'__metadata__' occurs twice",),
    ),
    Broken("20-decoy-in-metadata", raw(b'{"__metadata__":{"a":"1","a":"2"}}'), ("'a' occurs twice",)),
    Broken("20-decoy-invisible", raw({"a\u200b": entry()}, FOUR), ("bad tensor key", "\\u200b")),
    Broken("22-metadata-number", raw({"__metadata__": {"a": 1}}), ("__metadata__ as an object of strings",)),
    Broken(
        "22-metadata-nested",
        raw({"__metadata__": {"a": {"b": "c"}}}),
        ("__metadata__ as an object of strings",),
    ),
    Broken("22-metadata-list", raw({"__metadata__": ["a"]}), ("__metadata__ as an object of strings",)),
    Broken("22-metadata-null", raw({"__metadata__": None}), ("__metadata__ as an object of strings",)),
    Broken("entry-not-object", raw({"a": 1}), ("'a'", "dtype, shape and data_offsets")),
    Broken(
        "entry-extra-field", raw({"a": entry() | {"x": 1}}, FOUR), ("'a'", "dtype, shape and data_offsets")
    ),
    Broken("44-integer", raw({"a": entry(dtype="I32")}, FOUR), ("'a'", "got I32", "integer"), MoleTypeError),
    Broken("44-bool", raw({"a": entry(dtype="BOOL", end=1)}, b"\1"), ("'a'", "got BOOL"), MoleTypeError),
    Broken(
        "45-F8_E8M0",
        raw({"a": entry(dtype="F8_E8M0", end=1)}, b"\1"),
        ("'a'", "got F8_E8M0", "not supported"),
        MoleTypeError,
    ),
    Broken(
        "45-F4",
        raw({"a": entry((2,), dtype="F4", end=1)}, b"\1"),
        ("'a'", "got F4", "not supported"),
        MoleTypeError,
    ),
    Broken(
        "45-F6",
        raw({"a": entry((4,), dtype="F6_E2M3", end=3)}, b"\1\1\1"),
        ("'a'", "got F6_E2M3", "not supported"),
        MoleTypeError,
    ),
    Broken("45-list-as-dtype", raw({"a": entry(dtype=["F32"])}, FOUR), ("'a'", "dtype"), MoleTypeError),
    Broken("49-escape-in-key", raw({"\x1b[31mred": entry()}, FOUR), ("bad tensor key", "\\x1b[31mred")),
    Broken("49-newline-in-key", raw({"a\nb": entry()}, FOUR), ("bad tensor key", "a\\nb")),
    Broken("49-right-to-left", raw({"a\u202eb": entry()}, FOUR), ("bad tensor key", "\\u202e")),
    Broken(
        "49-lone-surrogate",
        raw(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        ("bad tensor key", "\\ud800"),
    ),
    Broken("49-long-key", raw({"k" * 513: entry()}, FOUR), ("bad tensor key", "got 513")),
    Broken("49-empty-key", raw({"": entry()}, FOUR), ("bad tensor key", "got 0")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken_file_is_refused_by_name(case: Broken, tmp_path: Path):
    path = write(tmp_path, case.content)
    for read in (read_header, read_tensors):
        with pytest.raises(case.error) as caught:
            read(path)
        text = str(caught.value)
        assert str(path) in text
        assert [word for word in case.words if word not in text] == [], text
        assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize(
    ("size", "words"),
    [
        pytest.param(101 * 2**20, "at most 16,777,216", id="05-header-over-100MB"),
        pytest.param(limits.MAX_HEADER + 1, "at most 16,777,216", id="06-header-over-16MB"),
    ],
)
def test_long_header_is_refused_unread(
    size: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(size + 8)
    monkeypatch.setattr(reader, "parse_json", forbidden)
    assert words in refusal(path, peak=2**20)


def million(count: int, key: str = "{}") -> bytes:
    text = ",".join(
        f'"{key.format(i)}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)
    )
    return raw(("{" + text + "}").encode())


@pytest.mark.parametrize(
    "count", [1_000_000, 250_000, limits.MAX_TENSORS + 3], ids=lambda n: f"21-{n}-tensors"
)
def test_tensor_bomb_is_refused_unparsed(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, million(count))
    monkeypatch.setattr(reader, "parse_json", forbidden)
    refused = refusal(path, peak=6 * limits.MAX_HEADER)
    assert "header" in refused


def test_21_one_tensor_too_many(tmp_path: Path):
    assert len(read_header(write(tmp_path, million(limits.MAX_TENSORS))).entries) == limits.MAX_TENSORS
    with pytest.raises(MoleFileError, match="at most 20,000 tensors"):
        read_header(write(tmp_path, million(limits.MAX_TENSORS + 1)))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", id="21-empty-lists"),
        pytest.param(b'{"a":[' + b"0," * 8_000_000 + b"0]}", id="21-numbers"),
        pytest.param(b'{"a":[' + b'"",' * 5_000_000 + b'""]}', id="21-strings"),
        pytest.param(
            b'{"a":"' + rb"\"" * 8_000_000 + b'","b":[' + b'"",' * 300_000 + b'""]}', id="21-behind-escapes"
        ),
    ],
)
def test_json_bomb_is_refused_unparsed(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, raw(text))
    monkeypatch.setattr(reader, "parse_json", forbidden)
    assert "tensors" in refusal(path, peak=6 * limits.MAX_HEADER)


def test_metadata_may_hold_brackets_and_quotes(tmp_path: Path):
    """kohya stores JSON of megabytes as text; that is no bomb."""
    text = json.dumps({str(i): [{"tag": '"\\'}] * 3 for i in range(30_000)})
    path = write(tmp_path, raw({"__metadata__": {"ss_tag_frequency": text}, "a": entry()}, FOUR))
    assert read_header(path).metadata == {"ss_tag_frequency": text}


def test_23_metadata_is_text_and_escaped_when_shown(tmp_path: Path):
    evil = {"title": "\x1b]0;owned\x07<script>alert(1)</script>", "\x1b[2J": "{{7*7}}", "long": "x" * 10_000}
    found = read_header(write(tmp_path, raw({"__metadata__": evil, "a": entry()}, FOUR))).metadata
    assert found == evil
    shown = printable_metadata(found)
    assert all(text.isprintable() and len(text) <= 120 for item in shown.items() for text in item)
    assert shown["title"] == "\\x1b]0;owned\\x07<script>alert(1)</script>"


class Exploding:
    def __reduce__(self):
        return (sys.exit, (77,))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_24_pickle_under_a_false_name(protocol: int, tmp_path: Path):
    path = write(tmp_path, pickle.dumps({"a": Exploding(), "pad": "x" * 100}, protocol))
    with pytest.raises(MoleFileError, match="a pickle or a zip") as caught:
        read_tensors(path)
    assert "mole-kernels convert" in str(caught.value)


def test_24_torch_zip_under_a_false_name(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(MoleFileError, match="a pickle or a zip"):
        read_tensors(tmp_path / "a.safetensors")


def test_12_zip_polyglot(tmp_path: Path):
    path = write(tmp_path, raw({"a": entry()}, FOUR))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    assert zipfile.is_zipfile(path)
    with pytest.raises(MoleFileError, match="bytes follow the last tensor"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_25_pickle_suffix_names_the_converter(suffix: str, tmp_path: Path):
    path = write(tmp_path, raw({"a": entry()}, FOUR), f"x{suffix}")
    with pytest.raises(MoleFileError, match="not read") as caught:
        read_tensors(path)
    assert "mole-kernels convert" in str(caught.value)


def test_26_folder_fifo_and_device_do_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path, words in (
        (tmp_path / "folder.safetensors", "a folder"),
        (tmp_path / "fifo.safetensors", "a FIFO"),
        ("/dev/zero", "device"),
    ):
        with pytest.raises(MoleFileError, match=words):
            read_tensors(path)


def test_26_fifo_put_in_place_after_the_look_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    regular, fifo = write(tmp_path, raw({"a": entry()}, FOUR)), tmp_path / "fifo"
    os.mkfifo(fifo)
    looked, real, flags = os.stat(regular), os.open, []
    monkeypatch.setattr(reader.os, "stat", lambda path: looked)
    monkeypatch.setattr(
        reader.os, "open", lambda path, how: (flags.append(how), real(path, how | os.O_NONBLOCK))[1]
    )
    with pytest.raises(MoleFileError, match="a FIFO"):
        read_tensors(fifo)
    assert flags[0] & os.O_NONBLOCK


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir()
    write(folder, raw({"a": entry()}, FOUR), "good.safetensors")
    write(tmp_path, raw({"a": entry()}, FOUR), "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "near.safetensors").symlink_to(folder / "good.safetensors")
    (tmp_path / "inside-not").mkdir()
    write(tmp_path / "inside-not", raw({"a": entry()}, FOUR), "x.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "link.safetensors",
        "../inside-not/x.safetensors",
        "x/../../outside.safetensors",
    ],
)
def test_27_path_out_of_the_folder(name: str, inside: Path):
    with pytest.raises(MoleFileError, match="lies outside the folder"):
        read_tensors(name, root=inside)
    with pytest.raises(MoleFileError, match="lies outside the folder"):
        read_tensors(inside / name, root=inside)


def test_27_paths_that_stay_inside(inside: Path):
    for name in ("good.safetensors", "near.safetensors", "../inside/good.safetensors"):
        assert read_tensors(name, root=inside)[0]["a"].item() == 1.0


def test_28_missing_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MoleFileError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(MoleFileError, match="cannot be read"):
        read_tensors("a\0b.safetensors")
    with pytest.raises(MoleFileError, match="cannot be read"):
        read_tensors(write(tmp_path, b"", "x") / "below.safetensors")
    path = write(tmp_path, raw({"a": entry()}, FOUR))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reader.os, "open", refuse)
    with pytest.raises(MoleFileError, match="Permission denied"):
        read_tensors(path)


@pytest.mark.parametrize("wrong", [None, 3, b"x", ["a"]])
def test_28_not_a_path(wrong: object):
    with pytest.raises(MoleTypeError, match="expected a path"):
        read_tensors(wrong)  # type: ignore[arg-type]


def during_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Run `act` between the header and the data."""
    real = reader.SafetensorsFile.read

    def read(self, keys=None):
        act()
        return real(self, keys)

    monkeypatch.setattr(reader.SafetensorsFile, "read", read)


def test_29_replaced_while_loading_reads_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, raw({"a": entry()}, FOUR))
    new = write(tmp_path, raw({"b": entry((2,), 0, 8)}, b"\xff" * 8), "new.safetensors")
    during_read(monkeypatch, lambda: os.replace(new, path))
    assert {key: tensor.tolist() for key, tensor in read_tensors(path)[0].items()} == {"a": [1.0]}


def test_29_overwritten_or_cut_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, raw({"a": entry()}, FOUR))
    with monkeypatch.context() as patch:
        during_read(
            patch, lambda: (path.write_bytes(raw({"a": entry()}, b"\xff" * 4)), os.utime(path, ns=(0, 0)))
        )
        with pytest.raises(MoleFileError, match="changed while it was read"):
            read_tensors(path)
    during_read(monkeypatch, lambda: os.truncate(path, 60))
    with pytest.raises(MoleFileError, match="cut while 'a' was read"):
        read_tensors(path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/good.safetensors",
        "..",
        "",
        "link.safetensors",
        "a\\b",
        "c:x",
    ],
)
def test_30_index_naming_an_outside_path(name: str, inside: Path):
    index = write(inside, json.dumps({"weight_map": {"a": name}}).encode(), "m.safetensors.index.json")
    with pytest.raises(MoleFileError, match=r"a file beside the index|lies outside the folder"):
        read_tensors(index)


def test_30_index_of_shards_beside_it(inside: Path):
    save_file({"b": torch.arange(3.0), "unused": torch.ones(1)}, inside / "two.safetensors")
    index = write(
        inside,
        json.dumps({"weight_map": {"b": "two.safetensors", "a": "good.safetensors"}}).encode(),
        "m.safetensors.index.json",
    )
    assert {key: tensor.tolist() for key, tensor in read_tensors(index)[0].items()} == {
        "b": [0, 1, 2],
        "a": [1],
    }
    assert list(read_tensors(index, keys=["a"])[0]) == ["a"]
    with pytest.raises(MoleKeyError, match="names no tensor zzz"):
        read_tensors(index, keys=["zzz"])


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a":"x","a":"y"}}',
        b"[" * 10_000,
    ],
)
def test_30_index_that_is_no_index(text: bytes, tmp_path: Path):
    with pytest.raises(MoleFileError):
        read_tensors(write(tmp_path, text, "m.safetensors.index.json"))


def test_46_unaligned_tensors_are_copied_to_aligned_memory(tmp_path: Path):
    data = b"\x38" + torch.arange(1.0, 4.0, dtype=torch.float64).numpy().tobytes()
    header = {"a": entry((1,), 0, 1, "F8_E4M3"), "b": entry((3,), 1, 25, "F64")}
    tensors, _ = read_tensors(write(tmp_path, raw(header, data)))
    assert tensors["b"].tolist() == [1, 2, 3]
    assert tensors["a"].float().tolist() == [1.0]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors.values())
    tensors["b"][0] = 7  # its own memory: writing is allowed
    assert read_tensors(tmp_path / "file.safetensors")[0]["b"][0] == 1


def test_only_wanted_keys_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"a": torch.ones(2), "b": torch.ones(3), "c": torch.zeros(0, 5)}, tmp_path / "x.safetensors")
    read_keys = []
    real = reader.SafetensorsFile._read
    monkeypatch.setattr(
        reader.SafetensorsFile, "_read", lambda self, key, at: (read_keys.append(key), real(self, key, at))[1]
    )
    tensors, _ = read_tensors(tmp_path / "x.safetensors", keys=["c", "a"])
    assert read_keys == ["c", "a"] == list(tensors)
    assert tensors["c"].shape == (0, 5)
    with pytest.raises(MoleKeyError, match="has no tensor zzz"):
        read_tensors(tmp_path / "x.safetensors", keys=["zzz"])


def forbidden(*_: object) -> None:
    raise AssertionError("the header was parsed")


def refusal(path: Path, peak: int) -> str:
    """The refusal's text; Python's own memory must stay below `peak` bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(MoleFileError) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    assert printable(path, 300) in str(caught.value)
    return str(caught.value)
