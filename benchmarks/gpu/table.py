"""A results file's rows as a table for the dispatcher: the ways of each forward case, hot, in a graph.

`mole-kernels tune` measures more (training, backward, masks); this one costs nothing where a run is there
already.
"""

from __future__ import annotations

from typing import Any

from benchmarks.ours import candidate
from mole_kernels.dispatch.device import described
from mole_kernels.dispatch.tables import CANDIDATES, DTYPES, Table
from mole_kernels.dispatch.tables import TableRow as TableRow

NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def table(result: dict[str, Any]) -> Table:
    """Raises ValueError where the results are not of a GPU, or hold no case with the plain layer, stacked and
    a way.
    """
    gpu = result["gpu"]
    if gpu is None:
        raise ValueError("a dispatch table is made of a GPU's results; these are of a CPU")
    major, minor = (int(n) for n in gpu["sm"].split("."))
    device = described(gpu["name"], (major, minor), gpu["multiprocessors"])
    cases: dict[str, list[TableRow]] = {}
    for row in result["cases"]:
        if row["mode"] == "forward" and row["cache"] == "hot" and row["launch"] == "graph" and row["us"]:
            cases.setdefault(row["id"], []).append(row)
    made = tuple(r for rows in cases.values() if (r := _row(rows)) is not None)
    if not made:
        raise ValueError("no case with times of the plain layer, of stacked and of a way")
    software = {name: str(version) for name, version in result["software"].items()}
    return Table(device.name, device.key, device.capability, device.processors, software, result["utc"], made)


def _row(rows: list[TableRow]) -> TableRow | None:
    us = {candidate(r["method"]): r["us"]["p50"] for r in rows}
    us = {name: time for name, time in us.items() if name in (*CANDIDATES, "plain")}
    dtype = NAMES[rows[0]["dtype"]]
    if not {"plain", "stacked"} < set(us) or dtype not in DTYPES:
        return None
    r = rows[0]
    return TableRow(r["M"], r["K"], r["N"], tuple(r["ranks"]), 1, dtype, r["gate"], "forward", us)
