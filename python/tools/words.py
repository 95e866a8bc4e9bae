"""Check names against docs/words.md.

    python python/tools/words.py                    every name in the package
    python python/tools/words.py mole_kernels/io    of one room

Exit code 1 where a name is on the list of words not to use, or where a public class or function is defined twice.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mole_kernels"
TABLE = ROOT / "docs/words.md"
# a variable's whole name; see the end of docs/words.md
EMPTY = frozenset("made found said one ones given thing things told kept taken".split())
# words that are right where a paper's or another package's files and functions are named
ALLOWED = {
    "local": ("io/gates.py", "io/dialects", "methods/mole", "cli", "demo", "gates/"),
    "pooled": ("gates/", "io/gates.py", "methods", "training", "demo"),
    "identity": ("methods", "training"),
}
# where a variable holds a given gate, as docs/words.md calls it
GIVEN_GATE = ("dispatch/cost.py", "layers/linear.py", "patching/patched.py")
# every backend, strategy, stage and command has these by contract
SHARED_NAMES = frozenset("forward backward reason_against main run name".split())


def forbidden() -> set[str]:
    """The words of the last column of the table."""
    rows = [line.strip("|").split("|") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {word.strip() for row in rows[1:] if len(row) == 3 for word in row[2].split(",") if word.strip()}


def names(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it is only a variable) of everything that the file itself names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name, False
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, True
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, False


def offences(path: Path) -> Iterator[str]:
    """One line for each name in the file that is not to be used."""
    relative = path.relative_to(PACKAGE).as_posix()
    banned = forbidden()
    for line, name, variable in names(ast.parse(path.read_text())):
        parts = re.split(r"_+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_"))
        words = {" ".join(parts), *parts, "_".join(parts)} & banned
        for word in words:
            if not relative.startswith(ALLOWED.get(word, ())):
                yield f"{relative}:{line}: {name}: {word!r} is not used here (docs/words.md)"
        if variable and name in EMPTY and not (name == "given" and relative in GIVEN_GATE):
            yield f"{relative}:{line}: {name}: says only that there is something"


def duplicates(paths: list[Path]) -> Iterator[str]:
    """Public classes and functions that more than one file defines."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.relative_to(PACKAGE).as_posix())
    for name, files in sorted(homes.items()):
        if (
            len(files) > 1
            and name not in SHARED_NAMES
            and not all(f.startswith(("cli/", "kernels/")) for f in files)
        ):
            yield f"{name} is defined in {', '.join(files)}"


def main(places: list[str]) -> int:
    roots = [Path(place).resolve() for place in places] or [PACKAGE]
    paths = sorted(p for root in roots for p in ([root] if root.is_file() else root.rglob("*.py")))
    lines = [line for path in paths for line in offences(path)]
    twice = [
        d
        for d in duplicates(sorted(PACKAGE.rglob("*.py")))
        if any(str(p.relative_to(PACKAGE)) in d for p in paths)
    ]
    print("\n".join([*lines, *twice, f"{len(lines)} names, {len(twice)} defined more than once"]))
    return 1 if lines or twice else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
