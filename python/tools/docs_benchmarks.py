"""Benchmark pages of the site, from benchmarks/results/**.json: python python/tools/docs_benchmarks.py FOLDER
writes them there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """One page: where it goes below docs/, its name in the navigation, its markdown, and the pictures it
    shows.
    """

    path: str
    title: str
    text: str
    pictures: list[Path] = field(default_factory=list)


@lru_cache(maxsize=1)
def pages(root: Path) -> list[Page]:
    """How it is measured, one page for each results file (newest first), and the history."""
    found = [
        _result_page(path)
        for path in sorted((root / "benchmarks/results").rglob("*.json"), key=lambda p: p.stem, reverse=True)
    ]
    listing = "\n".join(f"- [{page.title}]({Path(page.path).name})" for page in found)
    how = _without_title((root / "benchmarks/README.md").read_text(encoding="utf-8"))
    history = (root / "benchmarks/HISTORY.md").read_text(encoding="utf-8")
    return [
        Page(
            "benchmarks/index.md",
            "How it is measured",
            f"# Benchmarks\n\nEvery results file as a page:\n\n{listing}\n\n{how}",
        ),
        *found,
        Page("benchmarks/history.md", "History", history),
    ]


def _result_page(path: Path) -> Page:
    result = json.loads(path.read_text(encoding="utf-8"))
    kind = re.sub(r"^\d{4}-\d{2}-\d{2}-?", "", path.stem) or "layers"
    title = f"{kind.replace('-', ' ').capitalize()}, {result['host']}"
    pictures = [path.with_suffix(".png")] if path.with_suffix(".png").exists() else []
    shown = "".join(f"![time over the plain layer's, by shape]({picture.name})\n\n" for picture in pictures)
    text = f"# {title}\n\n`{path.parent.name}/{path.name}`\n\n{shown}{_without_title(_renderer(kind, result)(result))}\n"
    short = f"{kind.replace('-', ' ').capitalize()}, {path.stem[:10]}"
    return Page(f"benchmarks/{path.parent.name}-{path.stem}.md", short, text, pictures)


def _renderer(kind: str, result: Result) -> Callable[[Result], str]:
    """What makes the tables of such a file beside its measuring code, else columns as they come."""
    if str(ROOT) not in sys.path:
        # mkdocs runs hooks with a path of its own
        sys.path.insert(0, str(ROOT))
    from benchmarks import report, serving, training
    from benchmarks.gpu import report as gpu
    from benchmarks.gpu import results

    known: dict[str, Callable[[Result], str]] = {
        "layers": report.markdown,
        "serving": serving.table,
        "training": training.markdown,
    }
    if result.get("gpu") and not results.problems(result):
        return gpu.markdown
    return known.get(kind, columns)


def columns(result: Result) -> str:
    """Any file of rows: the facts about its machine, then a column for each field."""
    facts = "; ".join(
        f"{name} {_cell(value)}"
        for name, value in result.items()
        if name != "cases" and value not in (None, [], {})
    )
    rows = [dict(_flat(row)) for row in result["cases"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, ["---"] * len(names), *([_cell(row.get(name, "–")) for name in names] for row in rows)]
    return f"{facts}.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table)


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", value


def _cell(value: Any) -> str:
    """Three numbers are p20, p50, p80."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        if len(value) == 3 and all(isinstance(one, float) for one in value):
            low, middle, high = map(_cell, value)
            return f"{middle} ({low} to {high})"
        return ", ".join(map(_cell, value))
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _without_title(text: str) -> str:
    return re.sub(r"\A# .*\n+", "", text)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for page in pages(ROOT):
        (out / page.path).parent.mkdir(parents=True, exist_ok=True)
        (out / page.path).write_text(page.text, encoding="utf-8")
    print(f"{len(pages(ROOT))} pages in {out}")
