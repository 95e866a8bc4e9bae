"""All cases by number, and the lines of docs/robustness.md made of them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from mole_kernels.errors import printable
from tests.robustness import of_arguments, of_files, of_keys, of_peers, of_states
from tests.robustness.cases import Case

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "robustness.md"
NUMBERS = [f"{n:02d}" for n in range(1, 78)] + [f"P{n:02d}" for n in range(1, len(of_peers.SAYS) + 1)]
CASES = sorted(
    [*of_files.CASES, *of_keys.CASES, *of_arguments.CASES, *of_states.CASES, *of_peers.CASES],
    key=lambda case: NUMBERS.index(case.number),
)


@functools.cache
def shown() -> tuple[Case, ...]:
    """The case of each number whose outcome the table tells: the first."""
    first: dict[str, Case] = {}
    for case in CASES:
        first.setdefault(case.number, case)
    return tuple(first.values())


def row(case: Case, outcome: str) -> str:
    """| number | bad input | what happens | tests |"""
    same = [other for other in CASES if other.number == case.number]
    nodes = dict.fromkeys(node for other in same for node in other.deeper)
    tests = (
        f"`{case.id}`"
        + (f" and {len(same) - 1} more" if len(same) > 1 else "")
        + "".join(f", `{short(node)}`" for node in nodes)
    )
    return f"| {case.number} | {case.says} | {cell(outcome)} | {tests} |"


def cell(text: str) -> str:
    return printable(text, 170).replace("|", "\\|")


def short(node: str) -> str:
    return node.removeprefix("tests/")


@functools.cache
def written() -> tuple[str, ...]:
    return tuple(DOC.read_text().splitlines()) if DOC.exists() else ()


@functools.cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    named = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    # a state machine is a test by the name that its TestCase is given
    machines = {
        t.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for t in node.targets
        if isinstance(t, ast.Name)
    }
    return frozenset(named | {name for name in machines if name.startswith("Test")})


def exists(node: str) -> bool:
    """Whether the test `path::function` is there."""
    path, _, name = node.partition("::")
    return (ROOT / path).is_file() and name in functions(ROOT / path)
