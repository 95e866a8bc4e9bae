"""Read untrusted text and JSON: regular files only, so that none blocks, and of a bounded size."""

from __future__ import annotations

import io
from typing import Any

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.files.limits import parse_json
from mole_kernels.files.opening import PathLike, open_regular

# the largest sets of questions and captions are a tenth of it
MOST_BYTES = 2**30


def read_text(path: PathLike, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a regular file.

    Args:
        path: The file.
        most: The largest size in bytes.

    Raises:
        MoleFileError: Missing, unreadable, a FIFO or device, larger than `most`, or not UTF-8.
    """
    where = printable(path, 300)
    with open_regular(path) as file:
        try:
            # buffered, for one read of the system may give less than was asked for
            content = io.BufferedReader(file).read(most + 1)
        except OSError as error:
            raise MoleFileError(where, f"cannot be read ({error.strerror})") from None
    if len(content) > most:
        raise MoleFileError(where, expected=f"a text of at most {most:,} bytes", got="more")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MoleFileError(where, f"cannot be read: byte {error.start} is not UTF-8") from None


def text_lines(text: str) -> list[str]:
    """The lines of a text, ended by \\n or \\r\\n alone; a last empty one is left out.

    `str.splitlines` also cuts at U+2028, U+2029, U+0085, \\v, \\f and \\x1c to \\x1e, which captions and
    strings of JSON may hold.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json_file(path: PathLike) -> Any:
    """The JSON of a regular file.

    Args:
        path: The file.

    Raises:
        MoleFileError: As `read_text`, and for what `parse_json` refuses.
    """
    return parse_json(read_text(path), printable(path, 300), "the file")
