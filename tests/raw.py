"""Safetensors files byte by byte, so that tests can break every rule of the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw(header: bytes | dict[str, Any] | list[Any], data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with this header; `length` lies about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any = (1,), begin: Any = 0, end: Any = 4, dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [begin, end],
    }


def write(folder: Path, content: bytes, name: str = "file.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
