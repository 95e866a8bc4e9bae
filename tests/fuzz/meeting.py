"""What holds for every target: bytes from a stranger give a result or a MoleError that can be printed, and
nothing else.
"""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleError

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
NAMES = tuple(sorted(path.stem for path in (HERE / "targets").glob("[a-z]*.py")))
# the longest message: a path, a few keys and a hint
LONGEST = 4000
Check = Callable[[bytes], object]


def target(name: str) -> ModuleType:
    """`check(data)`: hands bytes to a reader and holds its promises; `JSON`: whether the bytes are mutated as
    JSON too.
    """
    return import_module(f"tests.fuzz.targets.{name}")


def meet(check: Check, data: bytes) -> MoleError | None:
    """Run one input; the error it met. Anything but a MoleError passes through and is a find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(data)
        except MoleError as error:
            text = str(error)
            assert len(text) <= LONGEST, f"a message of {len(text)} characters"
            assert all(c.isprintable() or c == "\n" for c in text), f"control characters in {text!r}"
            return error
    return None


def seeds(name: str) -> list[Path]:
    """The target's corpus: what it began with, and every input that once failed (`found-…`)."""
    return sorted((CORPUS / name).iterdir())


def text(data: bytes) -> str:
    """Bytes as a command line or a file's text would give them; half characters stay, as surrogates."""
    return data.decode("utf-8", "surrogateescape")


@functools.cache
def _temporary(process: int) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mole-fuzz-")


def folder() -> Path:
    """A folder that goes with the process; each has its own."""
    return Path(_temporary(os.getpid()).name)


def file_of(data: bytes, name: str) -> Path:
    """A file of these bytes."""
    path = folder() / name
    path.write_bytes(data)
    return path


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def numbers(*shape: int, start: float = 1.0) -> Tensor:
    """A tensor whose values all differ."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + start).reshape(shape) / 8


def assert_plain(values: Iterable[Any], *kinds: type) -> None:
    for value in values:
        assert isinstance(value, kinds) and not isinstance(value, bool), value
