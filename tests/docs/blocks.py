"""The python blocks of a page, with what the comments before them say.

<!-- before: statements -->     run first, and not shown: they put in place what the page takes for granted
<!-- not run: reason -->        cannot run on this machine, or is no program
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"(?:<!--\s*(?P<word>before|not run):(?P<said>.*?)-->\s*\n+)?^```python[^\n]*\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One block: its code, the line it begins on, statements to run before it, and why it is not run."""

    code: str
    line: int
    before: str = ""
    not_run: str = ""


def blocks(text: str) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        said = {"before": "", "not run": ""} | (
            {match["word"]: match["said"].strip()} if match["word"] else {}
        )
        found.append(Block(match["code"], line, said["before"], said["not run"]))
    return found


def pages() -> list[Path]:
    """README and every page below docs/ that holds python."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in candidates if blocks(page.read_text(encoding="utf-8"))]
