"""The header of a safetensors file, checked to the last byte before any data are read; the rules are in
`limits`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mole_kernels.errors import MoleFileError, MoleTypeError, printable
from mole_kernels.files.limits import (
    DTYPES,
    INTEGERS,
    MAX_DIMS,
    MAX_METADATA,
    MAX_SETTING,
    MAX_TENSORS,
    SETTINGS,
    check_key,
)


class TensorEntry(NamedTuple):
    """Where one tensor lies: its bytes are [begin, end) of the data after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        entries: key -> TensorEntry, in the file's order.
        metadata: Text as it came; escape it before printing.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def parse_header(fields: Any, size: int, where: str) -> Header:
    """The header's JSON, checked against `size` bytes of data: every byte belongs to exactly one tensor."""
    if not isinstance(fields, dict):
        raise MoleFileError(where, expected="a JSON object as header", got=f"a {type(fields).__name__}")
    metadata = fields.pop("__metadata__", {})
    if (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
        or len(metadata) > MAX_METADATA
    ):
        raise MoleFileError(where, expected="__metadata__ as an object of strings", got="something else")
    if len(fields) > MAX_TENSORS:
        raise MoleFileError(where, expected=f"at most {MAX_TENSORS:,} tensors", got=f"{len(fields):,}")
    entries = {key: parse_entry(key, value, size, where) for key, value in fields.items()}
    position, last = 0, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            kind = "overlaps" if entry.begin < position else "leaves a hole after"
            raise MoleFileError(
                where,
                f"'{printable(key)}' at bytes {entry.begin}:{entry.end} {kind} {last}, which ends at "
                f"{position}",
            )
        position, last = entry.end, f"'{printable(key)}'"
    if position != size:
        raise MoleFileError(
            where,
            f"{size - position:,} bytes follow the last tensor",
            hint="something was appended to this file",
        )
    return Header(entries, metadata)


def parse_entry(key: str, value: Any, size: int, where: str) -> TensorEntry:
    """One tensor's dtype, shape and bytes."""
    check_key(key, where)
    at = f"{where}, '{printable(key)}'"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise MoleFileError(
            at, expected="an object with dtype, shape and data_offsets", got=printable(value, 80)
        )
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise MoleFileError(at, expected="a shape of whole numbers >= 0", got=printable(shape, 80))
    # a scalar is a setting, such as an alpha, not a weight
    setting = key.endswith(SETTINGS) and math.prod(shape) <= MAX_SETTING
    if not isinstance(name, str) or (name not in DTYPES and not (setting and name in INTEGERS)):
        raise MoleTypeError(
            at,
            expected=f"dtype {', '.join(DTYPES)}",
            got=printable(name, 40),
            hint="integer, boolean and sub-byte weights are not supported in these files",
        )
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
    dtype = DTYPES[name] if name in DTYPES else INTEGERS[name]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise MoleFileError(
            at,
            expected=f"{math.prod(shape) * dtype.itemsize:,} bytes for {name} {shape}",
            got=f"{end - begin:,}",
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def printable_metadata(metadata: Mapping[str, str], limit: int = 120) -> dict[str, str]:
    """Metadata made safe to show: control characters escaped, long values cut."""
    return {printable(key, limit): printable(value, limit) for key, value in metadata.items()}
