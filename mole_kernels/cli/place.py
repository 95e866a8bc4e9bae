"""Where commands write: looked at before the work, not after."""

from __future__ import annotations

import os
from pathlib import Path

from mole_kernels.errors import MoleFileError, printable


def ready_folder(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        MoleFileError: It cannot be made, or cannot be written to; names the folder that stands in the way.
    """
    where = printable(folder, 300)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        block = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
        if block is not None and not block.is_dir():
            reason = f"{printable(block, 300)} is a file"
        raise MoleFileError(
            where, f"the folder cannot be made ({reason})", hint="choose another --out"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MoleFileError(where, "the folder cannot be written to", hint="choose another --out")
    return folder


def ready_file(path: Path) -> Path:
    """The path of a file to be written, its folder made.

    Raises:
        MoleFileError: As `ready_folder`, or the path is a folder.
    """
    ready_folder(path.parent)
    if path.is_dir():
        raise MoleFileError(printable(path, 300), expected="a file name", got="a folder")
    return path
