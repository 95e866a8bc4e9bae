"""Captions of a folder of pictures: `metadata.jsonl` as Hugging Face's imagefolder has it, or a `.txt` beside
each picture.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.files.text import read_text, text_lines

METADATA = "metadata.jsonl"


def read_captions(root: Path, column: str = "text") -> tuple[dict[str, str], dict[str, str]]:
    """({picture: caption}, {line: what is wrong with it}) of every metadata.jsonl below root; names relative
    to root, in posix form.

    A line is {"file_name": …, column: …}; file_name is relative to the folder that its metadata.jsonl lies
    in.
    """
    captions: dict[str, str] = {}
    bad: dict[str, str] = {}
    for path in sorted(root.rglob(METADATA)):
        name = path.relative_to(root).as_posix()
        try:
            lines = text_lines(read_text(path).removeprefix("\ufeff"))
        except MoleFileError as error:
            bad[name] = f"cannot be read as text ({error.problem or error})"
            continue
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parsed = _parse(line, column, root, path.parent)
            if isinstance(parsed, str):
                bad[f"{name} line {number}"] = parsed
            elif captions.setdefault(parsed[0], parsed[1]) != parsed[1]:
                bad[f"{name} line {number}"] = f"a second caption for {printable(parsed[0])}"
    return captions, bad


def read_beside(picture: Path) -> str | None:
    """The text of the .txt beside a picture, None where there is none.

    Raises:
        MoleFileError: The text cannot be read, or is not UTF-8.
    """
    path = picture.with_suffix(".txt")
    return read_text(path).removeprefix("\ufeff").strip() if path.is_file() else None


def _parse(line: str, column: str, root: Path, folder: Path) -> tuple[str, str] | str:
    """(picture, caption) of a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        return 'has no "file_name"'
    if not isinstance(row.get(column), str):
        return f'has no "{column}" for {printable(row["file_name"])}'
    # by its letters: a link to elsewhere is the owner's affair (Hugging Face's cache is made of them), a name
    # that climbs out is not
    name = os.path.normpath(os.path.join(folder.relative_to(root).as_posix(), row["file_name"])).replace(
        os.sep, "/"
    )
    if name.startswith(("../", "/")) or "\0" in name:
        return f"names a file outside the folder: {printable(row['file_name'])}"
    # os.path, which takes a name that no file can have for one that is not there
    if not os.path.isfile(root / name):
        return f"names a file that is not there: {printable(row['file_name'])}"
    return name, row[column].strip()
