"""Read safetensors, one file or shards behind an index; all is checked in the header before a byte of data is
read.

One file handle is opened, once, and never blocks; only regular files are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from io import FileIO
from types import TracebackType

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.files.header import Header, TensorEntry, parse_header
from mole_kernels.files.limits import MAX_HEADER, MAX_TENSORS, check_json_size, check_key, parse_json
from mole_kernels.files.opening import PathLike, open_regular, refuse_other_formats, words_for_read_errors

INDEX = ".index.json"


def read_header(path: PathLike, *, root: PathLike | None = None) -> Header:
    """The checked header of a safetensors file; reads no data.

    Args:
        path: The file; of an index, all its shards' headers as one.
        root: When given, the file must lie inside this folder, links followed.

    Returns:
        Entries by key (dtype, shape, place) and the metadata.

    Raises:
        MoleFileError: The file cannot be read, or is broken.
        MoleTypeError: A dtype that is not supported.
    """
    if str(path).endswith(INDEX):
        return _sharded_header(read_index(path, root=root), _folder(path, root))
    with SafetensorsFile(path, root=root) as file:
        return file.header


def read_tensors(
    path: PathLike,
    *,
    keys: Iterable[str] | None = None,
    root: PathLike | None = None,
    check: Callable[[Header], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, or a sharded one through its `.index.json`.

    Args:
        path: The file or the index.
        keys: Only these are read; None reads all.
        root: When given, the file must lie inside this folder, links followed.
        check: Sees the header before any data are read, and may raise.

    Returns:
        (tensors by key, metadata). Each tensor owns fresh, aligned memory.

    Raises:
        MoleFileError: The file cannot be read, or is broken.
        MoleKeyError: A key that is not there.
        MoleTypeError: A dtype that is not supported.
    """
    if str(path).endswith(INDEX):
        return _read_sharded(path, keys, root, check)
    with SafetensorsFile(path, root=root) as file:
        if check is not None:
            check(file.header)
        return file.read(keys), file.header.metadata


class SafetensorsFile:
    """An open, checked safetensors file: `header`, and `read(keys)` from the same handle."""

    def __init__(self, path: PathLike, *, root: PathLike | None = None) -> None:
        self.where = printable(path, 300)
        self._file = open_regular(path, root=root)
        try:
            with words_for_read_errors(self.where):
                self._stat = _stat_of(self._file)
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
        refuse_other_formats(prefix, self.where)
        if len(prefix) < 8:
            raise MoleFileError(
                self.where,
                expected="a safetensors file",
                got="an empty file" if not prefix else f"only {len(prefix)} bytes",
                hint="the download or the upload of it did not finish",
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
        if length == 0:
            raise MoleFileError(
                self.where,
                f"begins with zeros, as a file of {size:,} bytes that was never written",
                hint="copy or download it again",
            )
        text = self._file.read(length)
        if len(text) != length:
            raise MoleFileError(self.where, "the file was cut while it was read")
        check_json_size(text, self.where)
        return 8 + length, parse_header(parse_json(text, self.where), size - 8 - length, self.where)

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these keys (None: all), in the file's order of keys.

        Raises:
            MoleFileError: The file changed while it was read, or reading failed.
            MoleKeyError: A key that is not there.
        """
        wanted = list(self.header.entries if keys is None else keys)
        missing = [key for key in wanted if key not in self.header.entries]
        if missing:
            raise MoleKeyError(
                self.where, f"has no tensor {', '.join(printable(key) for key in missing[:5])}"
            )
        tensors = {key: self._read(key, self.header.entries[key]) for key in wanted}
        if _stat_of(self._file) != self._stat:
            raise MoleFileError(
                self.where,
                "the file changed while it was read",
                hint="write to a temporary file, then rename",
            )
        return tensors

    def _read(self, key: str, entry: TensorEntry) -> Tensor:
        try:
            buffer = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        except RuntimeError as error:
            raise MoleFileError(
                self.where, f"no memory for the {entry.end - entry.begin:,} bytes of '{printable(key)}'"
            ) from error
        with words_for_read_errors(f"{self.where}, '{printable(key)}'"):
            self._file.seek(self._data + entry.begin)
            target, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
            while done < len(target):
                count = self._file.readinto(target[done:])
                if not count:
                    raise MoleFileError(self.where, f"the file was cut while '{printable(key)}' was read")
                done += count
        return buffer.view(entry.dtype).reshape(entry.shape)


def read_index(index: PathLike, *, root: PathLike | None = None) -> dict[str, str]:
    """key -> file name of a sharded file's index; a name that is more than a plain name of this folder is
    refused.

    Args:
        index: The `.index.json`.
        root: When given, it must lie inside this folder, links followed.

    Raises:
        MoleFileError: The index cannot be read, or names a file elsewhere.
    """
    where = printable(index, 300)
    with open_regular(index, root=root) as file, words_for_read_errors(where):
        if os.fstat(file.fileno()).st_size > MAX_HEADER:
            raise MoleFileError(where, expected=f"an index of at most {MAX_HEADER:,} bytes", got="more")
        text = file.read(MAX_HEADER)
    check_json_size(text, where)
    fields = parse_json(text, where, "the index")
    names = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(names, dict) or len(names) > MAX_TENSORS:
        raise MoleFileError(where, expected="an index with a weight_map", got="something else")
    for key, name in names.items():
        check_key(key, where)
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or name in ("", ".", "..")
            or any(c in name for c in "/\\:")
        ):
            raise MoleFileError(
                where,
                f"'{printable(key)}' is assigned to '{printable(name)}'",
                expected="a file beside the index",
            )
    return names


def _read_sharded(
    index: PathLike,
    keys: Iterable[str] | None,
    root: PathLike | None,
    check: Callable[[Header], None] | None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata of the shards together); every shard must lie in the index's own folder."""
    where = printable(index, 300)
    shard_of, folder = read_index(index, root=root), _folder(index, root)
    wanted = list(shard_of if keys is None else keys)
    missing = [key for key in wanted if key not in shard_of]
    if missing:
        raise MoleKeyError(where, f"names no tensor {', '.join(printable(key) for key in missing[:5])}")
    if check is not None:
        check(_sharded_header(shard_of, folder))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(shard_of[key] for key in wanted):
        with SafetensorsFile(shard, root=folder) as file:
            tensors.update(file.read([key for key in wanted if shard_of[key] == shard]))
            metadata.update(file.header.metadata)
    return {key: tensors[key] for key in wanted}, metadata


def _sharded_header(shard_of: dict[str, str], folder: str) -> Header:
    headers = {}
    for shard in dict.fromkeys(shard_of.values()):
        with SafetensorsFile(shard, root=folder) as file:
            headers[shard] = file.header
    entries, metadata = {}, {}
    for key, shard in shard_of.items():
        if key not in headers[shard].entries:
            raise MoleKeyError(printable(os.path.join(folder, shard), 300), f"has no tensor {printable(key)}")
        entries[key] = headers[shard].entries[key]
        metadata.update(headers[shard].metadata)
    return Header(entries, metadata)


def _folder(index: PathLike, root: PathLike | None) -> str:
    """The folder that the index lies in by its name: behind the links of the hub's cache lie nothing but
    hashes.
    """
    return os.path.dirname(os.path.abspath(os.path.join(root, index) if root is not None else index))


def _stat_of(file: FileIO) -> tuple[int, int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino
