"""The result file: its schema, checked before it is written and when it is read; rows looked up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import SCHEMA

Row = dict[str, Any]
NUMBER, TEXT = (int, float), str
HEAD: dict[str, Any] = {
    "schema": int,
    "commit": TEXT,
    "dirty": bool,
    "utc": TEXT,
    "host": TEXT,
    "gpu": (dict, type(None)),
    "software": dict,
    "ceilings": dict,
    "aa_spread": NUMBER,
    "cases": list,
    "proxies": list,
}
CASE: dict[str, Any] = {
    "id": TEXT,
    "op": TEXT,
    "dtype": TEXT,
    "M": int,
    "K": int,
    "N": int,
    "E": int,
    "ranks": list,
    "gate": TEXT,
    "mode": TEXT,
    "cache": TEXT,
    "method": TEXT,
    "us": (dict, type(None)),
    "ratio": (dict, type(None)),
    "flops": int,
    "bytes_min": int,
    "err": (*NUMBER, type(None)),
    "peak_mem": (int, type(None)),
}
# what a GPU's file has besides
GPU_HEAD: dict[str, Any] = {
    "verified": bool,
    "checks": dict,
    "failures": list,
    "dropped": list,
    "goals": list,
    "models": list,
}
GPU_CASE: dict[str, Any] = {
    "launch": TEXT,
    "roofline": (*NUMBER, type(None)),
    "launches": (int, type(None)),
    "counts": dict,
}


def problems(result: Any) -> list[str]:
    """What is wrong with a result file; [] where it keeps the schema."""
    if not isinstance(result, dict):
        return [f"an object expected, got {type(result).__name__}"]
    suite = result.get("suite", "cpu")
    found = list(_fields(result, HEAD | (GPU_HEAD if suite == "gpu" else {}), "the file"))
    if found:
        return found
    if result["schema"] != SCHEMA:
        found.append(f"schema {SCHEMA} expected, got {result['schema']}")
    for i, row in enumerate(result["cases"]):
        if not isinstance(row, dict):
            found.append(f"case {i}: an object expected")
            continue
        found += _fields(row, CASE | (GPU_CASE if suite == "gpu" else {}), f"case {i}")
        if not any(p.startswith(f"case {i}:") for p in found):
            found += _times(row, f"case {i}")
    for failure in result.get("failures", []):
        found += _fields(failure, dict.fromkeys(("id", "method", "stage", "error"), TEXT), "a failure")
    return found


def _fields(given: dict[str, Any], wanted: dict[str, Any], where: str) -> Iterator[str]:
    for name, kind in wanted.items():
        if name not in given:
            yield f"{where}: {name} is missing"
        elif not isinstance(given[name], kind) or (isinstance(given[name], bool) and kind in (int, NUMBER)):
            yield f"{where}: {name} is a {type(given[name]).__name__}"


def _times(row: Row, where: str) -> Iterator[str]:
    if row["us"] is None:
        if not row.get("wrong"):
            yield f"{where}: no time, and no word on what is wrong"
        return
    values = [row["us"].get(name) for name in ("p20", "p50", "p80")]
    if not all(isinstance(v, NUMBER) and math.isfinite(v) and v > 0 for v in values) or values != sorted(
        values
    ):
        yield f"{where}: us is {row['us']}"
    if "plain" not in (row["ratio"] or {}):
        yield f"{where}: no ratio to the plain layer"


def grouped(found: list[Row]) -> dict[str, dict[str, Row]]:
    """case id -> method -> row, in the file's order."""
    table: dict[str, dict[str, Row]] = {}
    for row in found:
        table.setdefault(row["id"], {})[row["method"]] = row
    return table


def text(result: dict[str, Any]) -> str:
    """One case a line."""
    head = {k: v for k, v in result.items() if k != "cases"}
    rows = ",\n".join(json.dumps(row) for row in result["cases"])
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "cases": [\n' + rows + "\n]}\n"


def save(result: dict[str, Any], path: Path) -> Path:
    """Raises ValueError where the schema is not kept: better no file than one that nobody can read."""
    wrong = problems(result)
    if wrong:
        raise ValueError(f"{path.name}: {'; '.join(wrong[:5])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(result))
    return path


def load(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    wrong = problems(result)
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong[:5])}")
    return result


def rows(
    result: dict[str, Any],
    method: str = "ours",
    *,
    where: Callable[[Row], bool] = lambda row: True,
    **same: Any,
) -> list[Row]:
    """Timed rows of a method; hot and graphed unless `same` says otherwise."""
    wanted = {"cache": "hot", "launch": "graph", "mode": "forward"} | same
    return [
        r
        for r in result["cases"]
        if r["method"] == method and r["us"] and all(r[k] == v for k, v in wanted.items()) and where(r)
    ]


def rank(row: Row) -> int:
    return sum(row["ranks"])


def free(folder: Path, stem: str) -> str:
    """`stem`, or with a number where that file is there already: an earlier run of the day is kept."""
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(name for name in names if not (folder / f"{name}.json").exists())
