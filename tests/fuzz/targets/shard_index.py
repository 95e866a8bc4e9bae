"""The index of a sharded file: names beside it only."""

from __future__ import annotations

import os

from mole_kernels.files.reader import read_index
from tests.fuzz.meeting import file_of, folder

JSON = True


def check(data: bytes) -> None:
    names = read_index(file_of(data, "m.safetensors.index.json"))
    for name in names.values():
        assert os.path.dirname(os.path.normpath(os.path.join(folder(), name))) == str(folder())
