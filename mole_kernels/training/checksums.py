"""Checksums of batches, by which a resumed run knows the data it began with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleStateError, printable

Checksums = dict[str, int]


def checksums(batch: Mapping[str, Any], before: Mapping[str, int] | None = None) -> Checksums:
    """CRC-32 of each entry's values, by name.

    Args:
        batch: Tensors of any dtype and device, or strings, numbers and lists of them. Of any other object
            the type alone counts.
        before: Checksums of the batches that came earlier, to be continued.

    Returns:
        The checksums of `before` continued by `batch`; a name that `batch` lacks keeps its value.
    """
    out = dict(before or {})
    for name, value in batch.items():
        out[str(name)] = _continued(value, out.get(str(name), 0))
    return out


def check_same_data(before: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Raise unless the data of a resumed run are those that it began with.

    Args:
        before: What the checkpoint says of the data, by name of the entry.
        here: The same for the data at hand.

    Raises:
        MoleStateError: Names the first entry that differs.
    """
    for name in sorted({*before, *here}):
        if before.get(name) != here.get(name):
            change = "is new" if name not in before else "is gone" if name not in here else "has other values"
            raise MoleStateError(
                f"resume: batches, {printable(name)}",
                f"{change} since the run began: other pictures, captions or settings made it",
                hint="resume with the data the run began with, or begin another run_dir",
            )


def _continued(value: Any, checksum: int) -> int:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return zlib.crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b"", checksum)
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            checksum = _continued(value[key], zlib.crc32(repr(key).encode(), checksum))
        return checksum
    if isinstance(value, (list, tuple)):
        for item in value:
            checksum = _continued(item, zlib.crc32(b"item", checksum))
        return checksum
    plain = value is None or isinstance(value, (str, bytes, int, float))
    return zlib.crc32((repr(value) if plain else type(value).__name__).encode("utf-8", "replace"), checksum)
