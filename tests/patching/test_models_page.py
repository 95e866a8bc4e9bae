"""docs/models.md: every cell of the table of models and features names tests that exist, and every letter is
used.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()
LEGEND = dict(re.findall(r"^- `(\w+)` (tests/\S+\.py::\w+)$", PAGE, re.M))


def table() -> list[tuple[str, str, list[str]]]:
    """(model, feature, entries) of every cell of the first table."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, body = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    return [
        (row[0], feature, [] if cell == "–" else cell.split(" "))
        for row in body
        for feature, cell in zip(header[1:], row[1:], strict=True)
    ]


@cache
def functions(file: str) -> dict[str, str]:
    """name -> source with decorators, of every test of a file."""
    text = (ROOT / file).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.lineno])
    return found


def resolved(entry: str) -> tuple[str, str, str]:
    """(file, function, parameter or "") of `P[sd15]`."""
    match = re.fullmatch(r"`(\w+)(?:\[([^\]`]+)\])?`", entry)
    assert match, f"{entry} is no entry of the legend's form"
    letter, parameter = match.groups()
    assert letter in LEGEND, f"{letter} is not in the legend"
    file, _, function = LEGEND[letter].partition("::")
    return file, function, parameter or ""


def test_every_cell_names_a_test():
    cells = table()
    assert len({model for model, _, _ in cells}) == 14 and sum(bool(entries) for _, _, entries in cells) > 90
    for model, feature, entries in cells:
        for entry in entries:
            file, function, parameter = resolved(entry)
            assert function in functions(file), f"{model}, {feature}: {file} has no {function}"
            assert bool(parameter) <= (
                "parametrize" in functions(file)[function] or "fixture" in (ROOT / file).read_text()
            ), entry


def test_every_letter_is_used_and_is_a_test():
    used = {re.match(r"`(\w+)", entry).group(1) for _, _, entries in table() for entry in entries}  # type: ignore[union-attr]
    assert used == set(LEGEND)


def test_every_parameter_exists(request: pytest.FixtureRequest):
    """As far as the tests named were collected in this run; a slow one may have been left out."""
    collected: dict[tuple[str, str], set[str]] = {}
    for item in request.session.items:
        path, _, name = item.nodeid.partition("::")
        function, _, parameter = name.partition("[")
        collected.setdefault((path, function), set()).add(parameter.removesuffix("]"))
    for _, _, entries in table():
        for entry in entries:
            file, function, parameter = resolved(entry)
            known = collected.get((file, function))
            if known and "slow" not in functions(file)[function]:
                # another test alone may have been asked for by its name
                whole = len(known) > 1 or known == {""}
                assert parameter in known or not whole, f"{entry}: {file}::{function} has no [{parameter}]"
