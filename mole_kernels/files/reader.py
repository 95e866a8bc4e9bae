"""Reads safetensors with its own checks: everything is checked in the header before a byte of data is read.

The rules are in `limits`. One file handle is opened, once, and never blocks; only regular files are read.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleTypeError, printable
from mole_kernels.files.limits import (
    DTYPES,
    MAX_DIMS,
    MAX_HEADER,
    MAX_METADATA,
    MAX_TENSORS,
    check_json_size,
    check_key,
    parse_json,
)

PathLike = str | os.PathLike[str]
CONVERTER = "mole-kernels convert FILE OUT.safetensors reads Mix-of-Show .pth files safely"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


class Entry(NamedTuple):
    """Where one tensor lies: its bytes are [begin, end) of the data after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """entries: key -> Entry, in the file's order; metadata: text as it came, escape it before printing."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: PathLike, *, root: PathLike | None = None) -> Header:
    """The checked header of a safetensors file; reads no data.

    root  when given, the file must lie inside this folder, symlinks followed
    Raises MoleFileError, MoleTypeError.
    """
    with SafetensorsFile(path, root=root) as file:
        return file.header


def read_tensors(
    path: PathLike, *, keys: Iterable[str] | None = None, root: PathLike | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file, or of a sharded one through its `.index.json`.

    keys  only these are read; None reads all. Each tensor owns fresh, aligned memory.
    root  when given, the file must lie inside this folder, symlinks followed
    Raises MoleFileError, MoleKeyError (a key that is not there), MoleTypeError.
    """
    if str(path).endswith(".index.json"):
        from mole_kernels.files.index import read_sharded

        return read_sharded(path, keys=keys, root=root)
    with SafetensorsFile(path, root=root) as file:
        return file.read(keys), file.header.metadata


class SafetensorsFile:
    """An open, checked safetensors file: `header`, and `read(keys)` from the same handle."""

    def __init__(self, path: PathLike, *, root: PathLike | None = None) -> None:
        self.where = printable(path, 300)
        self._file = open_regular(path, root=root)
        try:
            self._stat = _identity(self._file)
            self._data, self.header = self._read_header(self._stat[0])
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_header(self, size: int) -> tuple[int, Header]:
        prefix = self._file.read(8)
        _refuse_pickle(prefix, self.where)
        if len(prefix) < 8:
            raise MoleFileError(
                self.where,
                expected="a safetensors file",
                got="an empty file" if not prefix else f"only {len(prefix)} bytes",
            )
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise MoleFileError(
                self.where,
                f"its header says it is {length:,} bytes long, the file holds {size - 8:,} more",
                hint="truncated, or not safetensors",
            )
        if length > MAX_HEADER:
            raise MoleFileError(
                self.where, expected=f"a header of at most {MAX_HEADER:,} bytes", got=f"{length:,}"
            )
        text = self._file.read(length)
        if len(text) != length:
            raise MoleFileError(self.where, "the file was cut while it was read")
        check_json_size(text, self.where)
        return 8 + length, parse_header(parse_json(text, self.where), size - 8 - length, self.where)

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these keys (None: all), in the file's order of keys."""
        wanted = list(self.header.entries if keys is None else keys)
        missing = [key for key in wanted if key not in self.header.entries]
        if missing:
            raise MoleKeyError(
                self.where, f"has no tensor {', '.join(printable(key) for key in missing[:5])}"
            )
        tensors = {key: self._read(key, self.header.entries[key]) for key in wanted}
        if _identity(self._file) != self._stat:
            raise MoleFileError(
                self.where,
                "the file changed while it was read",
                hint="write to a temporary file, then rename",
            )
        return tensors

    def _read(self, key: str, entry: Entry) -> Tensor:
        try:
            buffer = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        except RuntimeError as error:
            raise MoleFileError(
                self.where, f"no memory for the {entry.end - entry.begin:,} bytes of '{printable(key)}'"
            ) from error
        self._file.seek(self._data + entry.begin)
        target, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise MoleFileError(self.where, f"the file was cut while '{printable(key)}' was read")
            done += count
        return buffer.view(entry.dtype).reshape(entry.shape)


def open_regular(path: PathLike, *, root: PathLike | None = None, pickles: bool = False) -> FileIO:
    """A handle on a regular, readable file; never blocks on a FIFO and never touches a device; pickle
    suffixes only where asked for.
    """
    if not isinstance(path, str | os.PathLike):
        raise MoleTypeError("file", expected="a path", got=type(path).__name__)
    name = os.fsdecode(path)
    where = printable(name, 300)
    if name.lower().endswith(PICKLES) and not pickles:
        raise MoleFileError(where, "pickle-based files can run code and are not read", hint=CONVERTER)
    try:
        if root is not None:
            name = _inside(name, root, where)
        mode = os.stat(name).st_mode
        if stat.S_ISREG(mode):
            handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            mode = os.fstat(handle).st_mode
            if stat.S_ISREG(mode):
                return FileIO(handle, "rb")
            os.close(handle)
    # it is a ValueError too
    except MoleFileError:
        raise
    except FileNotFoundError:
        raise MoleFileError(where, "there is no such file") from None
    except (OSError, ValueError) as error:
        raise MoleFileError(where, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    raise MoleFileError(
        where, expected="a regular file", got="a folder" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
    )


def parse_header(found: Any, size: int, where: str) -> Header:
    """The header's JSON, checked against `size` bytes of data: every byte belongs to exactly one tensor."""
    if not isinstance(found, dict):
        raise MoleFileError(where, expected="a JSON object as header", got=f"a {type(found).__name__}")
    metadata = found.pop("__metadata__", {})
    if (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
        or len(metadata) > MAX_METADATA
    ):
        raise MoleFileError(where, expected="__metadata__ as an object of strings", got="something else")
    if len(found) > MAX_TENSORS:
        raise MoleFileError(where, expected=f"at most {MAX_TENSORS:,} tensors", got=f"{len(found):,}")
    entries = {key: parse_entry(key, value, size, where) for key, value in found.items()}
    position, last = 0, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            kind = "overlaps" if entry.begin < position else "leaves a hole after"
            raise MoleFileError(
                where,
                f"'{printable(key)}' at bytes {entry.begin}:{entry.end} {kind} {last}, which ends at {position}",
            )
        position, last = entry.end, f"'{printable(key)}'"
    if position != size:
        raise MoleFileError(
            where,
            f"{size - position:,} bytes follow the last tensor",
            hint="something was appended to this file",
        )
    return Header(entries, metadata)


def parse_entry(key: str, value: Any, size: int, where: str) -> Entry:
    """One tensor's dtype, shape and bytes."""
    check_key(key, where)
    at = f"{where}, '{printable(key)}'"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise MoleFileError(
            at, expected="an object with dtype, shape and data_offsets", got=printable(value, 80)
        )
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise MoleTypeError(
            at,
            expected=f"dtype {', '.join(DTYPES)}",
            got=printable(name, 40),
            hint="integer, boolean and sub-byte tensors are not supported in these files",
        )
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise MoleFileError(at, expected="a shape of whole numbers >= 0", got=printable(shape, 80))
    if len(shape) > MAX_DIMS:
        raise MoleFileError(at, expected=f"at most {MAX_DIMS} dimensions", got=len(shape))
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and n >= 0 for n in offsets)
    ):
        raise MoleFileError(at, expected="data_offsets of two whole numbers >= 0", got=printable(offsets, 80))
    begin, end = offsets
    if end < begin:
        raise MoleFileError(at, f"its data end at byte {end}, before they begin at {begin}")
    if end > size:
        raise MoleFileError(
            at,
            f"its data end at byte {end:,}, the file holds {size:,}",
            hint="the file is truncated; copy or download it again",
        )
    # the product of the nonzero dimensions: a zero must not hide an overflow
    if math.prod(n for n in shape if n) * 8 >= 2**63:
        raise MoleFileError(at, f"the size of shape {printable(shape, 80)} overflows")
    dtype = DTYPES[name]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise MoleFileError(
            at,
            expected=f"{math.prod(shape) * dtype.itemsize:,} bytes for {name} {shape}",
            got=f"{end - begin:,}",
        )
    return Entry(dtype, tuple(shape), begin, end)


def printable_metadata(metadata: Mapping[str, str], limit: int = 120) -> dict[str, str]:
    """Metadata made safe to show: control characters escaped, long values cut."""
    return {printable(key, limit): printable(value, limit) for key, value in metadata.items()}


def _inside(name: str, root: PathLike, where: str) -> str:
    folder = os.path.realpath(root)
    real = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([folder, real]) != folder:
        raise MoleFileError(
            where,
            f"lies outside the folder {printable(folder, 300)}",
            hint="links and .. may not leave the folder",
        )
    return real


def _refuse_pickle(prefix: bytes, where: str) -> None:
    # a safetensors length below 16 MB has zeros in its last five bytes, a pickle does not
    pickle = len(prefix) > 1 and prefix[0] == 0x80 and prefix[1] <= 5 and prefix[3:] != bytes(5)
    if pickle or prefix.startswith(b"PK\x03\x04"):
        raise MoleFileError(
            where, "is a pickle or a zip, whatever its name says; it is not read", hint=CONVERTER
        )


def _identity(file: FileIO) -> tuple[int, int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino
