"""Which pictures of a folder belong to which questions: by the item's id where there is one, else by the
prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.methods.selma.pictures import METADATA
from mole_kernels.methods.selma.project import checked, read_lines
from mole_kernels.methods.selma.questions import Tree

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def join(folder: Path, trees: Sequence[Tree]) -> tuple[list[tuple[Path, Tree]], int]:
    """(picture, its questions), and how many pictures have none.

    A row of metadata.jsonl belongs to the item that its "id" names, or its file is called by (whoops_5.jpg,
    as the authors' scripts save it), else to every item with its text. Without metadata.jsonl files are
    called by ids.

    Raises:
        MoleKeyError: Prompts without a picture; without metadata.jsonl also pictures without a prompt.
        MoleFileError: No pictures, a file outside the folder, or two pictures of one id.
    """
    by_id = {tree.id: tree for tree in trees if tree.id}
    named = (folder / METADATA).exists() or not by_id
    rows = list(_rows(folder)) if named else _files(folder)
    pictures: list[tuple[Path, Tree]] = []
    rest: list[Mapping[str, Any]] = []
    have: set[str] = set()
    for row in rows:
        key = str(row["id"]) if "id" in row else Path(row["file_name"]).stem
        tree = by_id.get(key)
        if tree is None:
            rest.append(row)
        elif key in have:
            where = f"{printable(folder, 300)}, {printable(row['file_name'])}"
            raise MoleFileError(where, f"is a second picture of {printable(key)}")
        else:
            have.add(key)
            pictures.append((folder / row["file_name"], tree))
    by_prompt: dict[str, list[Tree]] = {}
    for tree in trees:
        if not tree.id or tree.id not in have:
            by_prompt.setdefault(tree.prompt, []).append(tree)
    unasked = []
    for row in rest:
        own = by_prompt.get(row.get("text", ""), [])
        pictures += [(folder / row["file_name"], tree) for tree in own]
        if not own:
            unasked.append(row["file_name"])
    _check(folder, trees, pictures, unasked, named)
    return pictures, len(unasked)


def _check(
    folder: Path,
    trees: Sequence[Tree],
    pictures: Sequence[tuple[Path, Tree]],
    unasked: Sequence[str],
    named: bool,
) -> None:
    asked = {id(tree) for _, tree in pictures}
    lost = [tree.id if tree.id and not named else tree.prompt for tree in trees if id(tree) not in asked]
    if lost:
        raise MoleKeyError(
            f"{printable(folder, 300)}",
            f"{len(lost)} of {len(trees)} prompts have no picture: {printable(sorted(set(lost)))}",
            hint="make them first: mole-kernels selma draw",
        )
    if unasked and not named:
        raise MoleKeyError(
            f"{printable(folder, 300)}",
            f"{len(unasked)} pictures have no questions: {printable(sorted(unasked))}",
            hint=f"name pictures by the ids of the question file, or give {METADATA} with their prompts",
        )


def _files(folder: Path) -> list[dict[str, str]]:
    """Pictures without metadata.jsonl, which their names tell apart."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in entries if path.suffix.lower() in ENDINGS]
    if not files:
        raise MoleFileError(
            printable(folder, 300),
            expected=f"a folder of pictures with {METADATA}, or named by ids",
            got="none",
        )
    return [{"file_name": path.name} for path in files]


def _rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    rows = read_lines(folder / METADATA)
    if not rows:
        raise MoleFileError(
            printable(folder, 300), expected=f"a folder of pictures with {METADATA}", got="none"
        )
    for number, row in enumerate(rows, 1):
        name = Path(checked(row, folder / METADATA, number, file_name=str, text=str)["file_name"])
        if name.is_absolute() or ".." in name.parts:
            where = f"{printable(folder / METADATA, 300)}, line {number}"
            raise MoleFileError(where, expected="a file in the folder", got=printable(row["file_name"]))
        yield row
