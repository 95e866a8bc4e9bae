"""Pictures that are measured: a folder, with metadata.jsonl or by their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.files.text import read_text, text_lines
from mole_kernels.training.pictures import SUFFIXES, decode

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One picture.

    Args:
        path: Its file.
        text: What it was drawn for; "" where nothing says so.
        subject: Whom or what it shall show, for metrics against references; "" for all the same.
    """

    path: Path
    text: str = ""
    subject: str = ""

    def image(self) -> Image:
        """The picture, RGB."""
        return decode(self.path)


def read_samples(folder: str | Path) -> list[Sample]:
    """The pictures of a folder: those of its metadata.jsonl (file_name, text, subject), else all below
    it, where
    the folder that a picture lies in is its subject.

    Raises:
        MoleFileError: No pictures, a line that is no such object, or a file that is not there.
    """
    root = Path(folder)
    where = printable(root, 300)
    if not root.is_dir():
        raise MoleFileError(where, expected="a folder of pictures", got="no folder")
    if (root / METADATA).exists():
        return _listed(root)
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise MoleFileError(where, expected=f"pictures ({', '.join(SUFFIXES)}) or {METADATA}", got="neither")
    return [Sample(p, "", "" if p.parent == root else p.parent.relative_to(root).as_posix()) for p in paths]


def _listed(root: Path) -> list[Sample]:
    samples = []
    for number, line in enumerate(text_lines(read_text(root / METADATA)), 1):
        where = f"{printable(root / METADATA, 300)}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise MoleFileError(where, expected='an object with "file_name"', got=printable(line))
        name = Path(row["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise MoleFileError(where, expected="a file in the folder", got=printable(row["file_name"]))
        if not (root / name).is_file():
            raise MoleFileError(where, f"there is no picture {printable(row['file_name'])}")
        samples.append(Sample(root / name, str(row.get("text") or ""), str(row.get("subject") or "")))
    if not samples:
        raise MoleFileError(printable(root / METADATA, 300), expected="pictures", got="none")
    return samples


def with_texts(samples: Sequence[Sample], metric: str) -> list[Sample]:
    """The samples, all of which have a text.

    Raises:
        MoleValueError: Pictures without a prompt, by name; or no pictures.
    """
    if not samples:
        raise MoleValueError(metric, expected="at least one picture", got="none")
    lacking = [printable(sample.path.name) for sample in samples if not sample.text.strip()]
    if lacking:
        raise MoleValueError(
            metric,
            f"{len(lacking)} of {len(samples)} pictures have no prompt: {', '.join(lacking[:5])}",
            hint=f'{METADATA} beside them holds {{"file_name": …, "text": …}} for each',
        )
    return list(samples)


def references_of(sample: Sample, references: Sequence[Sample], metric: str) -> list[int]:
    """Places of the references that show a sample's subject; of all where the references name none.

    Raises:
        MoleValueError: No reference shows it.
    """
    named = any(reference.subject for reference in references)
    places = [i for i, r in enumerate(references) if not named or r.subject == sample.subject]
    if not places:
        known = sorted({reference.subject for reference in references})
        raise MoleValueError(
            f"{metric}, {printable(sample.path.name)}",
            expected=f"a subject among {', '.join(map(printable, known)) or 'none'}",
            got=printable(sample.subject) or "none",
        )
    return places
