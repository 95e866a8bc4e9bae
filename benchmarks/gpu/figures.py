"""The plots: time over the plain layer by shape and by rank, and how near each layer comes to this run's
ceilings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.gpu.results import Row, grouped, rank, rows

COLOURS = {
    "ours": "#d1495b",
    "stacked": "#30638e",
    "lorafusion": "#8f5ea8",
    "peft": "#7a9e7e",
    "eager": "#edae49",
    "merged": "#888888",
}
LABELS = {
    "ours": "ours (layer, gates included)",
    "stacked": "stacked addmm",
    "lorafusion": "LoRAFusion's scheme",
    "peft": "PEFT (no gates)",
    "eager": "the paper's layer",
    "merged": "merged weights",
}

TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 8, 12)
MOST_SHAPES = 40


def named(result: dict[str, Any]) -> str:
    return result["gpu"]["name"] if result["gpu"] else "no GPU: these times say nothing about one"


def ratio(result: dict[str, Any], path: Path) -> bool:
    """Above: every shape at the rank measured most. Below: the ranks of the shapes that were swept. False
    where nothing was timed.
    """
    usual = dict(gate="token+sample", E=2)
    found = [r for m in COLOURS for r in rows(result, m, **usual)]
    if not found:
        return False
    ranks = [rank(r) for r in found if r["method"] == "ours"]
    most = max(sorted(set(ranks)), key=ranks.count) if ranks else rank(found[0])
    table = [m for m in grouped([r for r in found if rank(r) == most]).values() if "ours" in m]
    table = sorted(table, key=lambda m: m["ours"]["flop_ratio"])[:MOST_SHAPES]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(13, 11))
    above.plot(
        [m["ours"]["flop_ratio"] for m in table], color="black", lw=1, label="what the mathematics needs"
    )
    for method, colour in COLOURS.items():
        points = [(i, m[method]["ratio"]) for i, m in enumerate(table) if method in m]
        if points:
            where, values = zip(*points)
            middle = [v["plain"] for v in values]
            # quantiles of few rounds may lie on one side of the median
            bars = [
                [max(0.0, c - v["p20"]) for c, v in zip(middle, values)],
                [max(0.0, v["p80"] - c) for c, v in zip(middle, values)],
            ]
            above.errorbar(
                where, middle, yerr=bars, fmt="o", ms=5, lw=0.8, color=colour, label=LABELS[method]
            )
    labels = [f"{m['ours']['M']}×{m['ours']['K']}×{m['ours']['N']}" for m in table]
    above.set_xticks(range(len(table)), labels, rotation=60, ha="right", fontsize=7)
    above.set_title(
        f"Adapted ÷ plain layer by shape, R = {most} in two experts · {named(result)}", fontsize=10
    )
    by_rank(below, found)
    for axis in (above, below):
        axis.axhline(1, color="grey", lw=0.8, ls=":")
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_yticks([t for t in TICKS if low <= t <= high], [f"{t:g}" for t in TICKS if low <= t <= high])
        axis.minorticks_off()
        axis.set_ylabel("time ÷ nn.Linear")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    finish(figure, path)
    return True


def by_rank(axis: Any, found: list[Row]) -> None:
    """Lines of the shapes with the most ranks, ours and stacked."""
    shapes: dict[tuple[int, int, int], set[int]] = {}
    for r in found:
        if r["method"] == "ours":
            shapes.setdefault((r["M"], r["K"], r["N"]), set()).add(rank(r))
    swept = sorted(shapes, key=lambda s: -len(shapes[s]))[:2]
    for shape, style in zip(swept, ("-", "--")):
        for method in ("ours", "stacked", "lorafusion"):
            mine = sorted(
                (rank(r), r["ratio"]["plain"])
                for r in found
                if r["method"] == method and (r["M"], r["K"], r["N"]) == shape
            )
            if mine:
                label = f"{LABELS[method]}, {'×'.join(map(str, shape))}"
                axis.plot(*zip(*mine), style, marker="o", ms=4, color=COLOURS[method], label=label)
        needed = sorted({(rank(r), r["flop_ratio"]) for r in found if (r["M"], r["K"], r["N"]) == shape})
        axis.plot(
            *zip(*needed),
            style,
            color="black",
            lw=0.8,
            label=f"what the mathematics needs, {'×'.join(map(str, shape))}",
        )
    ranks = sorted(set().union(*(shapes[s] for s in swept)))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(r) for r in ranks])
    axis.set_xlabel("R, all experts together")
    axis.set_title("By rank", fontsize=10)


def roofline(result: dict[str, Any], path: Path) -> bool:
    """TFLOP/s against operations per byte, under this run's own ceilings. False where nothing was timed."""
    found = {m: rows(result, m) for m in ("plain", "ours", "stacked", "lorafusion")}
    rate, copy = result["ceilings"].get("bf16_tflops"), result["ceilings"].get("copy_gb_s")
    points = [r["flops"] / r["bytes_min"] for mine in found.values() for r in mine]
    if not points or not rate or not copy:
        return False
    figure, axis = pyplot.subplots(figsize=(10, 7))
    low, high = min(points) / 2, max(points) * 2
    ridge = rate * 1e3 / copy
    x = sorted({low, min(max(ridge, low), high), high})
    axis.plot(
        x,
        [min(rate, i * copy * 1e-3) for i in x],
        color="black",
        lw=1.2,
        label=f"ceilings: {rate:g} TFLOP/s, {copy:g} GB/s",
    )
    for method, marker, colour in (
        ("plain", "s", "#333333"),
        ("ours", "o", COLOURS["ours"]),
        ("stacked", "^", COLOURS["stacked"]),
        ("lorafusion", "v", COLOURS["lorafusion"]),
    ):
        mine = found[method]
        if mine:
            where, rates = [r["flops"] / r["bytes_min"] for r in mine], [r["tflops"] for r in mine]
            axis.scatter(
                where,
                rates,
                marker=marker,
                s=22,
                alpha=0.8,
                color=colour,
                label=LABELS.get(method, "plain nn.Linear"),
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must be moved")
    axis.set_ylabel("TFLOP/s, of the operations that the mathematics needs")
    axis.set_title(
        f"Forward, bfloat16, cache hot (small layers may pass the memory's line) · {named(result)}",
        fontsize=10,
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    finish(figure, path)
    return True


def finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
