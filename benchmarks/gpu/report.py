"""Markdown table and plots of a GPU's results file; matplotlib is used where it is, and nothing else is
needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import claim, weighted
from benchmarks.gpu.results import Row, grouped, rank, rows
from benchmarks.report import geometric

Result = dict[str, Any]
PEERS = ("ours", "stacked", "lorafusion", "compiled", "eager", "peft", "merged")


def others(result: Result) -> list[str]:
    """Our backends and ways, and what a user's file brought."""
    return sorted({r["method"] for r in result["cases"]} - {"plain", "plain again", *PEERS})


def head(result: Result) -> list[str]:
    gpu, soft = result["gpu"], ", ".join(f"{k} {v}" for k, v in result["software"].items())
    where = (
        f"{gpu['name']} (sm {gpu['sm']}, driver {gpu['driver']})"
        if gpu
        else f"{result['host']}: a dry run, its times say nothing"
    )
    checks, failed, dropped = result["checks"], len(result["failures"]), len(result["dropped"])
    state = "verified" if result["verified"] else "NOT verified"
    sanitizer = "; ".join(f"{tool}: {said}" for tool, said in checks.get("sanitizer", {}).items())
    return [
        f"# {where}",
        "",
        f"{result['utc']}, commit {result['commit']}{' with changes' if result['dirty'] else ''}; {soft}.",
        f"Ceilings of this run: {result['ceilings']}; clocks {(gpu or {}).get('clocks', {})}.",
        "",
        f"**{state}**: {checks.get('passed', 0)} checks passed, {failed} failed, {dropped} items dropped for lack of time. {sanitizer}",
        f"Plain layer against itself: |A/A − 1| {result['aa_spread']:.3f} (p80); a difference below {claim(result):.1%} is none.",
        "",
    ]


def goal_table(result: Result) -> list[str]:
    lines = ["## Goals", "", "| goal | target | found | | note |", "|---|---|---|---|---|"]
    for g in result["goals"]:
        word = {True: "met", False: "**missed**", None: "not measured"}[g["met"]]
        lines.append(
            f"| {g['goal']} | {g['target']} | {'–' if g['value'] is None else format(g['value'], '.3f')} | {word} | {g['note']} |"
        )
    return [*lines, ""]


def model_table(result: Result) -> list[str]:
    """Flop-weighted adapted ÷ plain of each model and rank."""
    found = {(m, rank(r)) for r in rows(result, E=2, gate="token+sample") for m in r["counts"]}
    lines = []
    for model, R in sorted(found):
        values = [weighted(result, model, R, method) for method in ("ours", "stacked")]
        cells = ["–" if v is None else f"{v:.3f}" for v, _ in values]
        lines.append(f"| {model} | {R} | {' | '.join(cells)} | {values[0][1]:.1%} |")
    head = [
        "## Whole models, weighted by operations",
        "",
        "| model | R | ours ÷ plain | stacked ÷ plain | measured |",
        "|---|---|---|---|---|",
    ]
    return [*head, *lines, ""] if lines else []


def step_table(result: Result) -> list[str]:
    peaks = {(r["id"], r["launch"]): r["peak_mem"] for r in result["models"] if r["method"] == "plain"}
    lines = []
    for r in result["models"]:
        plain = peaks.get((r["id"], r["launch"]))
        extra = "–" if r["peak_mem"] is None or plain is None else f"{(r['peak_mem'] - plain) / 2**20:.0f}"
        cells = (
            r["model"],
            r["R"],
            r["launch"],
            r["method"],
            f"{r['us']['p50'] / 1e3:.3f}",
            f"{r['ratio']['plain']:.3f}",
            extra,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    head = [
        "## One denoising step",
        "",
        "| model | R | launch | method | ms | ÷ un-adapted | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*head, *lines, ""] if lines else []


def case_table(result: Result, title: str, found: list[Row]) -> list[str]:
    table = grouped(found)
    if not table:
        return []
    names = [n for n in (*PEERS, *others(result)) if any(n in methods for methods in table.values())]
    lines = [
        f"## {title}",
        "",
        f"| case | plain µs | of ceiling | {' | '.join(names)} | kernels | A/A |",
        "|" + "---|" * (len(names) + 5),
    ]
    for case, methods in table.items():
        plain, ours = methods.get("plain"), methods.get("ours", {})
        if plain is None or not plain["us"]:
            continue
        cells = [_cell(methods.get(n)) for n in names]
        again = methods.get("plain again")
        tail = (
            f"{ours.get('launches') or '–'} | {again['ratio']['plain']:.3f}"
            if again and again["us"]
            else "– | –"
        )
        lines.append(
            f"| {case} | {plain['us']['p50']:.1f} | {plain['roofline']:.2f} | {' | '.join(cells)} | {tail} |"
        )
    return [*lines, ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row['ratio']['plain']:.3f}" if row["us"] else "**wrong**"


def failure_list(result: Result) -> list[str]:
    lines = []
    if result["failures"]:
        lines += [
            "## Failures",
            "",
            *(f"- {f['id']}, {f['method']}, {f['stage']}: {f['error']}" for f in result["failures"]),
            "",
        ]
    if result["dropped"]:
        lines += ["## Dropped", "", *(f"- {d['id']}: {d['why']}" for d in result["dropped"][:60])]
        lines += [f"- and {len(result['dropped']) - 60} more"] if len(result["dropped"]) > 60 else []
    return [*lines, ""]


def markdown(result: Result) -> str:
    text = [*head(result), *goal_table(result), *model_table(result), *step_table(result)]
    text += ["Below: time ÷ the plain `nn.Linear` of the same run, medians of paired rounds.", ""]
    kinds = [
        ("Forward, hot, in a graph", dict(mode="forward", cache="hot", launch="graph")),
        ("Forward, cold cache, in a graph", dict(mode="forward", cache="cold", launch="graph")),
        ("Forward, launched one by one", dict(mode="forward", cache="hot", launch="stream")),
        ("Forward and backward, in a graph", dict(mode="training", cache="hot", launch="graph")),
    ]
    for title, same in kinds:
        text += case_table(
            result, title, [r for r in result["cases"] if all(r[k] == v for k, v in same.items())]
        )
    return "\n".join([*text, *failure_list(result)])


def summary(result: Result) -> str:
    """For a terminal: state, goals, failures."""
    ours = [r["ratio"]["plain"] for r in rows(result)]
    lines = [*head(result)[4:7], *goal_table(result)[2:]]
    lines += (
        [f"ours ÷ plain over {len(ours)} forward cases: geometric mean {geometric(ours):.3f}"] if ours else []
    )
    return "\n".join([*lines, *failure_list(result)[:40]])


def plots(result: Result, folder: Path, stem: str) -> list[Path]:
    """stem-ratio.png and stem-roofline.png; [] where matplotlib is missing or nothing was timed."""
    try:
        import matplotlib
    except ImportError:
        print(
            "matplotlib is not installed: no plots (make gpu's --report FILE.json makes them elsewhere)",
            file=sys.stderr,
        )
        return []
    matplotlib.use("Agg")
    from benchmarks.gpu import figures

    made = []
    for name, draw in (("ratio", figures.ratio), ("roofline", figures.roofline)):
        path = folder / f"{stem}-{name}.png"
        if draw(result, path):
            made.append(path)
    return made


def write(result: Result, folder: Path, stem: str) -> list[Path]:
    """stem.md and the plots, beside the JSON."""
    path = folder / f"{stem}.md"
    path.write_text(markdown(result) + "\n")
    return [path, *plots(result, folder, stem)]
