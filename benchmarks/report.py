"""Table and plot of a results file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

COLOURS = {"ours": "#d1495b", "stacked": "#30638e", "peft": "#7a9e7e", "eager": "#edae49"}
LABELS = {
    "ours": "ours (layer, gates included)",
    "stacked": "stacked addmm",
    "peft": "PEFT (no gates)",
    "eager": "the paper's layer",
}


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def ratios(result: dict[str, Any], mode: str, dtype: str) -> dict[str, dict[str, dict[str, Any]]]:
    """case id -> method -> row"""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["cases"]:
        if row["mode"] == mode and row["dtype"] == dtype:
            table.setdefault(row["id"], {})[row["method"]] = row
    return table


def summary(result: dict[str, Any]) -> str:
    """Geometric means over the shapes: adapted ÷ plain, and that against the flop ratio."""
    lines = [
        "| mode | dtype | cases | flop ratio | ours ÷ plain | ÷ flop ratio | operator ÷ flop ratio | stacked ÷ plain | PEFT ÷ plain "
        "| eager ÷ plain | ours ÷ stacked: worst |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in ("forward", "backward"):
        for dtype in ("fp32", "bf16"):
            table = ratios(result, mode, dtype)
            if not table:
                continue

            def mean(method: str, table=table, against_flops: bool = False) -> str:
                rows = [rows[method] for rows in table.values() if method in rows]
                return (
                    f"{geometric([r['ratio']['plain'] / (r['flop_ratio'] if against_flops else 1) for r in rows]):.3f}"
                    if rows
                    else "–"
                )

            flops = geometric([rows["ours"]["flop_ratio"] for rows in table.values()])
            worst = [
                rows["ours"]["ratio"]["plain"] / rows["stacked"]["ratio"]["plain"]
                for rows in table.values()
                if "stacked" in rows
            ]
            lines.append(
                f"| {mode} | {dtype} | {len(table)} | {flops:.3f} | {mean('ours')} | {mean('ours', against_flops=True)} "
                f"| {mean('operator', against_flops=True)} | {mean('stacked')} | {mean('peft')} | {mean('eager')} "
                f"| {f'{max(worst):.3f}' if worst else '–'} |"
            )
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    again = sorted(
        abs(row["ratio"]["plain"] - 1) for row in result["cases"] if row["method"] == "plain again"
    )
    noise = f"|A/A − 1|: median {again[len(again) // 2]:.3f}, largest {again[-1]:.3f}" if again else ""
    host, soft = result["host"], ", ".join(f"{k} {v}" for k, v in result["software"].items())
    text = [
        f"# {host}",
        "",
        f"{result['utc']}, commit {result['commit']}{' with changes' if result['dirty'] else ''}; {soft}; {result['threads']} thread(s), "
        f"clock: {result['clock']}. Ceilings: {result['ceilings']}. {noise}.",
        "",
        "Ratios are medians of paired, interleaved runs to the plain `nn.Linear` of the same shape; means are geometric. E = 2 experts,",
        "local and global gates (PEFT: the same adapters without gates). The flop ratio is what the mathematics needs.",
        "",
        summary(result),
        "",
    ]
    for mode in ("forward", "backward"):
        for dtype in ("fp32", "bf16"):
            table = ratios(result, mode, dtype)
            if table:
                text += [f"## {mode}, {dtype}", "", *case_table(table), ""]
    return "\n".join(text)


def case_table(table: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    names = [
        n
        for n in ("ours", "operator", "stacked", "peft", "eager")
        if any(n in rows for rows in table.values())
    ]
    lines = [
        f"| M × K × N | r | plain µs | flop ratio | {' | '.join(names)} | ours ÷ flop ratio | A/A |",
        "|" + "---|" * (len(names) + 6),
    ]
    for rows in table.values():
        first = rows["ours"]
        cells = [f"{rows[n]['ratio']['plain']:.3f}" if n in rows else "–" for n in names]
        lines.append(
            f"| {first['M']} × {first['K']} × {first['N']} | {first['ranks'][0]} "
            f"| {rows['plain']['us']['p50']:.0f} | {first['flop_ratio']:.3f} "
            f"| {' | '.join(cells)} | {first['ratio']['plain'] / first['flop_ratio']:.3f} | {rows['plain again']['ratio']['plain']:.3f} |"
        )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(13, 9), sharex=True)
    for axis, dtype in zip(axes, ("fp32", "bf16")):
        table = sorted(
            ratios(result, "forward", dtype).values(),
            key=lambda rows: (rows["ours"]["ranks"][0], rows["ours"]["flop_ratio"]),
        )
        if not table:
            continue
        axis.plot(
            [rows["ours"]["flop_ratio"] for rows in table],
            color="black",
            lw=1,
            label="flop ratio (what the mathematics needs)",
        )
        for method, colour in COLOURS.items():
            points = [(i, rows[method]["ratio"]) for i, rows in enumerate(table) if method in rows]
            if points:
                where, ratio = zip(*points)
                values = [r["plain"] for r in ratio]
                bars = [
                    [v - r["p20"] for v, r in zip(values, ratio)],
                    [r["p80"] - v for v, r in zip(values, ratio)],
                ]
                axis.errorbar(
                    where, values, yerr=bars, fmt="o", ms=4, lw=0.8, color=colour, label=LABELS[method]
                )
        axis.axhline(1, color="grey", lw=0.8, ls=":")
        axis.set_yscale("log")
        axis.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        axis.set_ylabel(f"time ÷ nn.Linear, {dtype}")
        axis.grid(axis="y", alpha=0.3)
        labels = [
            f"{r['ours']['M']}×{r['ours']['K']}×{r['ours']['N']} r{r['ours']['ranks'][0]}" for r in table
        ]
        axis.set_xticks(range(len(table)), labels, rotation=90, fontsize=6)
    axes[0].legend(fontsize=8)
    axes[0].set_title(
        f"A linear layer with two gated experts, forward, {result['threads']} thread · {result['host']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(folder: Path, stem: str, result: dict[str, Any] | None) -> Path:
    """folder/stem.{json,md,png}; from the JSON that is there where no result is given."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    if result is None:
        result = json.loads(path.read_text())
    else:
        head = {k: v for k, v in result.items() if k != "cases"}
        rows = ",\n".join(json.dumps(row) for row in result["cases"])
        path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "cases": [\n' + rows + "\n]}\n")
    (folder / f"{stem}.md").write_text(markdown(result))
    plot(result, folder / f"{stem}.png")
    return path
