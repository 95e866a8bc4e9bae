"""Docstrings as written: a first line, prose, and arguments one to a line, which markdown would run
together.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# a name, then two blanks or more, then what it is; or a line that was moved in
_ROW = re.compile(r"^\S.*?\S {2,}\S|^ +\S")
_CODE = re.compile(r"(`[^`]*`)")


class Lines(Extension):
    """Paragraphs that hold a table keep their lines."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)


def shown(docstring: str) -> str:
    """The docstring as markdown: tables in code blocks, angle brackets as such."""
    found = []
    for paragraph in re.split(r"\n{2,}", docstring.strip("\n")):
        lines = paragraph.split("\n")
        if any(_ROW.match(line) for line in lines):
            # sentences before the first row, and after the last, stay prose
            rows = [i for i, line in enumerate(lines) if _ROW.match(line)]
            before, table, after = lines[: rows[0]], lines[rows[0] : rows[-1] + 1], lines[rows[-1] + 1 :]
            found += [
                _prose("\n".join(before)),
                "```text\n" + "\n".join(table) + "\n```",
                _prose("\n".join(after)),
            ]
        else:
            found.append(_prose(paragraph))
    return "\n\n".join(part for part in found if part)


def _prose(text: str) -> str:
    parts = _CODE.split(text)
    return "".join(
        part if i % 2 else part.replace("<", "&lt;").replace("*", "\\*") for i, part in enumerate(parts)
    )
