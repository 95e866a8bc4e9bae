"""Writes a safetensors file whose tensors come one after the other, sizes unknown beforehand, in the memory
of one of them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.files.opening import PathLike
from mole_kernels.files.writer import atomic_write, header_of

CHUNK = 4 * 2**20


def atomic_save_stream(
    parts: Iterable[tuple[str, Tensor]], path: PathLike, metadata: Callable[[], Mapping[str, str]] = dict
) -> None:
    """Write (key, tensor) pairs as they come, then the header that goes before them.

    The data wait in a nameless file in the target's folder, so that folder must hold them twice for a moment.
    Otherwise as `atomic_save`: a reader sees the old file or the new one, and nothing is left behind, not
    even by a kill before the last copy.

    Args:
        parts: (key, tensor), one after the other.
        path: The file.
        metadata: Asked after the last tensor.

    Raises:
        MoleFileError: A key that comes twice, or a file that could not be written.
    """
    where, folder = printable(path, 300), os.path.dirname(os.path.realpath(path))

    def write(file: BinaryIO) -> None:
        with tempfile.TemporaryFile(dir=folder) as spool:
            begins: dict[str, int] = {}
            # plain values, no tensors: a small tensor kept beside each large one would hold the freed memory
            # around it
            kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
            for key, tensor in parts:
                if key in kinds:
                    raise MoleFileError(where, f"the key '{printable(key)}' came twice")
                begins[key] = spool.tell()
                flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                spool.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
                kinds[key] = (tensor.dtype, tuple(tensor.shape))
            # shape and dtype without the memory
            blanks = {
                key: torch.empty((), dtype=dtype).expand(shape) for key, (dtype, shape) in kinds.items()
            }
            header, order = header_of(blanks, metadata(), where)
            file.write(header)
            for key in order:
                spool.seek(begins[key])
                _copy(spool, file, blanks[key].numel() * blanks[key].element_size())

    atomic_write(path, write)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = source.read(min(count, CHUNK))
        if not piece:
            raise OSError("the data written so far could not be read back")
        target.write(piece)
        count -= len(piece)
