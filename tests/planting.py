"""Replace a piece of source text by its tokens, so that a formatter may lay the source out as it likes."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from pathlib import Path

_NUMBERS = itertools.count()


def pattern_of(piece: str) -> re.Pattern[str]:
    """Match the tokens of `piece` with any white space between them and any trailing comma before a closer."""
    tokens = re.findall(r"\w+|[^\w\s]", piece)
    words = [
        (r"(?:,\s*)?" if token in ")]}" and i and tokens[i - 1] != "," else "") + re.escape(token)
        for i, token in enumerate(tokens)
    ]
    edge = (r"(?<!\w)" if re.match(r"\w", piece) else "", r"(?!\w)" if re.search(r"\w$", piece) else "")
    return re.compile(edge[0] + r"\s*".join(words) + edge[1])


def count(text: str, old: str) -> int:
    """How often `text` holds `old`, whatever the layout."""
    return text.count(old) or len(pattern_of(old.strip()).findall(text))


def replaced(text: str, old: str, new: str, where: str = "source", *, anywhere: bool = False) -> str:
    """`text` with `old` replaced by `new`; with `anywhere`, at every place that holds it.

    Raises:
        ValueError: `text` does not hold `old` (exactly once, unless `anywhere`), or `old` equals `new`.
    """
    found = count(text, old)
    if old == new or not found or (found > 1 and not anywhere):
        raise ValueError(f"{where} holds this {found} times, expected once:\n{old}")
    if old in text:
        return text.replace(old, new)
    lead = old[: len(old) - len(old.lstrip())]
    return pattern_of(old.strip()).sub(lambda _: new.removeprefix(lead).rstrip("\n"), text)


def planted_room(room: Path, package: str, file: str, old: str, new: str, folder: Path) -> str:
    """The name of a copy of a package, in `folder`, with a piece of one file replaced.

    Its modules import one another, so that a fault in a helper reaches every kernel that calls it.

    Args:
        room: The package's folder; only its own modules are copied.
        package: Its import name.
        file: The file in it that changes.
        old, new: See `replaced`; every place that holds `old` changes.
        folder: An empty folder for the copy.
    """
    name = f"planted_{next(_NUMBERS)}"
    (folder / name).mkdir()
    for path in room.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            text = replaced(text, old, new, file, anywhere=True)
        (folder / name / path.name).write_text(text.replace(f"{package}.", f"{name}."))
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    return name
