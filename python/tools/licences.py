"""The licences of everything this package is developed, tested and run with, into docs/licences.md: python
python/tools/licences.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "licences.md"
HEAD = """# Licences of what this package depends on

Made by `make robustness` from the packages' own metadata, at the versions pinned in `constraints.txt`; do not edit. "runs with" are the
dependencies of the package itself and of its extras (`pyproject.toml`), the others come with those or are needed for development and tests.
This package is under Apache-2.0 (`LICENSE`) and copies no code of theirs; nothing of them is part of what is distributed here.

| package | version | licence | |
|---|---|---|---|
"""
# no licence field, or one that begins with something else; read from the licence files
_BY_HAND = {
    "insightface": "MIT",
    "atheris": "Apache-2.0",
    "kiwisolver": "BSD-3-Clause",
    "sigstore-models": "MIT",
}
_DEVELOPMENT = ("test", "docs", "fuzz", "dev")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    """Package -> pinned version, in the order of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))  # type: ignore[misc]


def direct() -> set[str]:
    """What the package itself and its extras for use name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = [extra for name, extra in project["optional-dependencies"].items() if name not in _DEVELOPMENT]
    found = {normal(re.split(r"[\s\[<>=!~;]", line)[0]) for line in chain(project["dependencies"], *used)}
    # extras name the package itself for what they share
    return found - {"mole-kernels"}


def licence(package: Distribution) -> str:
    """The SPDX expression where the package gives one, else its classifiers, else the first line of its
    licence field.
    """
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classes = [
        value.split("::")[-1].strip()
        for value in metadata.get_all("Classifier") or []
        if value.startswith("License ::")
    ]
    line = (metadata.get("License") or "").strip().split("\n")[0]
    return _BY_HAND.get(normal(package.name)) or (", ".join(classes) if classes else line[:80]) or "unknown"


def rows() -> Iterator[str]:
    used = direct()
    for name, version in sorted(pinned().items(), key=lambda item: normal(item[0])):
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if package.version.split("+")[0] == version:
            yield f"| {name} | {version} | {licence(package)} | {'runs with' if normal(name) in used else ''} |"


if __name__ == "__main__":
    found = list(rows())
    # extras that are pinned but not part of the development environment keep the rows they have
    here, pins = {row.split(" | ")[0].removeprefix("| ") for row in found}, pinned()
    for line in DOC.read_text().splitlines():
        name, *rest = line.removeprefix("| ").split(" | ")
        if line.startswith("| ") and name not in here and pins.get(name) == rest[0]:
            found.append(line)
    found.sort(key=lambda row: normal(row.split(" | ")[0].removeprefix("| ")))
    DOC.write_text(HEAD + "\n".join(found) + "\n")
    print(f"{len(found)} packages: {DOC.relative_to(ROOT)}")
