"""Writes safetensors so that a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleTypeError, printable
from mole_kernels.files.limits import DTYPE_NAMES, MAX_DIMS, MAX_HEADER, MAX_TENSORS, check_key
from mole_kernels.files.opening import PathLike


def atomic_save(
    tensors: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata as one safetensors file: a temporary file beside it, fsync, rename.

    Whatever happens before the rename (a full disk, Ctrl-C), the old file stays as it was and no temporary
    file is left. What the reader would refuse is refused here, before anything is written.

    Args:
        tensors: Dense tensors of floating dtypes by key, on any device.
        path: The file.
        metadata: Text for the header.

    Raises:
        MoleFileError: The file could not be written, or would be larger than the reader takes.
        MoleTypeError: A tensor of another dtype or layout.
    """
    where = printable(path, 300)
    header, order = header_of(tensors, metadata or {}, where)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for key in order:
            flat = tensors[key].detach().to("cpu").contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    atomic_write(path, write)


def atomic_write(path: PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it over `path`.

    Args:
        path: The file.
        write: Writes the content.

    Raises:
        MoleFileError: The file could not be written; the old one is untouched.
    """
    where = printable(path, 300)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        if os.path.isdir(target):
            raise MoleFileError(where, expected="a file name", got="a folder")
        try:
            with open(temporary, "xb") as file:
                if os.path.exists(target):
                    os.chmod(temporary, os.stat(target).st_mode & 0o777)
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise
    except FileNotFoundError:
        raise MoleFileError(where, f"there is no folder {printable(folder, 300)}") from None
    except OSError as error:
        raise MoleFileError(
            where,
            f"could not be written ({error.strerror})",
            hint="the file that was there before is untouched",
        ) from error
    try:
        _sync_folder(folder)
    except OSError as error:
        raise MoleFileError(
            where,
            f"was written, but its folder could not be brought to the disk ({error.strerror})",
            hint="it may not outlast a power cut",
        ) from error


def torch_save(value: object, file: BinaryIO) -> None:
    """`torch.save`, with a full disk as the OSError it is: torch's writer ends by complaining of where it
    stands instead.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str
) -> tuple[bytes, list[str]]:
    """The file's bytes up to the data, and the keys in the order of their data."""
    if len(tensors) > MAX_TENSORS:
        raise MoleFileError(where, expected=f"at most {MAX_TENSORS:,} tensors", got=f"{len(tensors):,}")
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
        raise MoleTypeError(where, expected="metadata of strings", got="other types")
    for key, tensor in tensors.items():
        check_key(key, where)
        if key == "__metadata__" or tensor.dim() > MAX_DIMS:
            raise MoleFileError(
                where,
                f"'{printable(key)}' cannot be written",
                expected=f"at most {MAX_DIMS} dimensions, not the key __metadata__",
            )
        if tensor.dtype not in DTYPE_NAMES or tensor.is_meta or tensor.layout != torch.strided:
            raise MoleTypeError(
                f"{where}, '{printable(key)}'",
                expected=f"a dense tensor of {', '.join(DTYPE_NAMES.values())}",
                got=tensor.dtype,
            )
    # widest elements first: then every tensor begins at a multiple of its element size
    order = sorted(tensors, key=lambda key: -tensors[key].element_size())
    spans, position = {}, 0
    for key in order:
        spans[key] = [position, position := position + tensors[key].numel() * tensors[key].element_size()]
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, tensor in tensors.items():
        fields[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": spans[key],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise MoleFileError(where, expected=f"a header of at most {MAX_HEADER:,} bytes", got=f"{len(text):,}")
    return len(text).to_bytes(8, "little") + text, order


def _sync_folder(folder: str) -> None:
    # a rename is durable once its folder is; where folders cannot be opened (Windows) there is nothing to do
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: PathLike, content: Any) -> None:
    """Write plain values as indented JSON, completely or not at all; `files.text.read_json_file` reads it.

    Args:
        path: The file.
        content: What `json.dumps` takes.

    Raises:
        MoleFileError: The file could not be written.
    """

    def write(file: BinaryIO) -> None:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    atomic_write(path, write)
