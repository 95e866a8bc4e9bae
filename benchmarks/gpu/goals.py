"""What the measurements say of each goal: a figure, the target, met or missed, and how much of the model was
measured.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.cases import layers
from benchmarks.gpu.plan import FLUX, SDXL
from benchmarks.gpu.results import Row, rank, rows
from benchmarks.report import geometric

Result = dict[str, Any]


def goals(result: Result) -> list[dict[str, Any]]:
    """Every goal; `value` and `met` are None where nothing was measured that speaks for it."""
    made = [
        _weighted(result, SDXL, 16, 1.07),
        _weighted(result, SDXL, 64, 1.12),
        _weighted(result, FLUX, 64, 1.04),
        _eager(result, "stream", 4.0),
        _eager(result, "graph", 2.0),
        _lorafusion(result),
        _stacked(result),
        _training(result),
        _launches(result, "forward", 1),
        _launches(result, "training", 3),
        _memory(result),
        _parity(result),
    ]
    made += [
        _step(result, model, R, most)
        for model, R, most in (("sdxl", 16, 1.03), ("sdxl", 64, 1.08), ("flux", 64, 1.04))
    ]
    # without a GPU nothing is met, and nothing missed
    return (
        made
        if result["gpu"] is not None
        else [g | {"value": None, "met": None, "note": "no GPU"} for g in made]
    )


def goal(name: str, target: float, found: float | None, most: bool = True, note: str = "") -> dict[str, Any]:
    """`most`: at most the target; else at least."""
    value = found if found is not None and math.isfinite(found) else None
    met = None if value is None else bool(value <= target if most else value >= target)
    return {
        "goal": name,
        "target": f"{'≤' if most else '≥'} {target:g}",
        "value": value and round(value, 4),
        "met": met,
        "note": note,
    }


def weighted(result: Result, model: str, R: int, method: str = "ours") -> tuple[float | None, float]:
    """Σ w·(adapted ÷ plain) / Σ w, w = layers of the shape times the plain layer's operations; and the part
    of the model measured.
    """
    found = {
        (r["M"], r["K"], r["N"]): r for r in _usual(result, method) if rank(r) == R and model in r["counts"]
    }
    whole = sum(c.base_flops * dict(c.counts)[model] for c in layers(model))
    if not found or not whole:
        # a dry run's model has no published shapes
        return None, 0.0
    weights = {shape: math.prod(shape) * 2 * r["counts"][model] for shape, r in found.items()}
    total = sum(weights.values())
    return sum(weights[s] * r["ratio"]["plain"] for s, r in found.items()) / total, total / whole


def _usual(result: Result, method: str = "ours", **same: Any) -> list[Row]:
    return rows(result, method, **({"E": 2, "gate": "token+sample"} | same))


def _weighted(result: Result, model: str, R: int, most: float) -> dict[str, Any]:
    value, part = weighted(result, model, R)
    enough = part >= 0.95
    note = f"{part:.1%} of the model's operations measured" + (
        "" if enough or value is None else ": too little for the goal"
    )
    made = goal(f"adapted ÷ plain, {model}, R={R}, flop-weighted", most, value, note=note)
    return made if enough else made | {"met": None}


def _eager(result: Result, launch: str, least: float) -> dict[str, Any]:
    found = [
        1 / r["ratio"]["eager"]
        for r in _usual(result, launch=launch)
        if r["ratio"].get("eager") and rank(r) == 64
    ]
    how = "in a graph" if launch == "graph" else "launched one by one"
    note = f"{len(found)} shapes, R=64; least {min(found):.2f}" if found else ""
    return goal(
        f"eager MoLE layer ÷ ours, both {how}", least, geometric(found) if found else None, False, note
    )


def _lorafusion(result: Result) -> dict[str, Any]:
    found = [
        1 / r["ratio"]["lorafusion"] for r in _usual(result, gate="none") if r["ratio"].get("lorafusion")
    ]
    note = f"{len(found)} attention shapes without gates; least {min(found):.2f}" if found else ""
    return goal("LoRAFusion's scheme ÷ ours", 1.15, geometric(found) if found else None, False, note)


def claim(result: Result) -> float:
    """A difference smaller than this is none: 2 %, or twice the spread of the plain layer against itself."""
    return max(0.02, 2 * result["aa_spread"])


def _stacked(result: Result) -> dict[str, Any]:
    found = [(r["ratio"]["stacked"], r["id"]) for r in rows(result) if r["ratio"].get("stacked")]
    worst = max(found, default=None)
    note = f"{len(found)} cases; worst: {worst[1]}" if worst else ""
    return goal("ours ÷ stacked addmm, worst case (2 % is noise)", 1.02, worst and worst[0], note=note)


def _training(result: Result) -> dict[str, Any]:
    found = [
        r
        for r in _usual(result, mode="training")
        if rank(r) == 64 and (r["M"], r["K"], r["N"]) == (2048, 1280, 1280)
    ]
    return goal(
        "forward + backward ÷ base, 2048×1280×1280, R=64", 1.4, found[0]["ratio"]["plain"] if found else None
    )


def _launches(result: Result, mode: str, most: int) -> dict[str, Any]:
    """Of a forward with gates; of a training step without (with them, the pooled gate's vector is made in
    torch).
    """
    gate = "token+sample" if mode == "forward" else "none"
    found = [r["launches"] for r in _usual(result, mode=mode, gate=gate) if r["launches"] is not None]
    note = f"{sum(n <= most for n in found)} of {len(found)} cases within it" if found else ""
    return goal(
        f"kernels launched, {mode}, {'gated' if mode == 'forward' else 'no gates'}, most",
        most,
        max(found, default=None),
        note=note,
    )


def _memory(result: Result) -> dict[str, Any]:
    """Bytes beyond the plain layer's, over M×R numbers of the layer's dtype."""
    plain = {r["id"]: r["peak_mem"] for r in rows(result, "plain")}
    found = [
        ((r["peak_mem"] - plain[r["id"]]) / (r["M"] * rank(r) * (4 if r["dtype"] == "fp32" else 2)), r["id"])
        for r in rows(result)
        if r["peak_mem"] is not None and plain.get(r["id"]) is not None
    ]
    worst = max(found, default=None)
    return goal(
        "extra inference memory ÷ M×R, worst case",
        1.0,
        worst and worst[0],
        note=f"worst: {worst[1]}" if worst else "",
    )


def _parity(result: Result) -> dict[str, Any]:
    """A lower bound: with R = 8 our own main loop does the experts' work too."""
    small = [
        r
        for r in result["cases"]
        if ":" in r["method"] and r["us"] and r["mode"] == "forward" and r["cache"] == "hot" and rank(r) == 8
    ]
    best: dict[str, float] = {}
    for r in small:
        if r["method"].rpartition(":")[2] not in ("added", "merge"):
            best[r["id"]] = max(best.get(r["id"], 0.0), 1 / r["ratio"]["plain"])
    note = "lower bound: R = 8, experts and gates included"
    return goal(
        "our main loop ÷ the library's rate, large shapes",
        0.95,
        min(best.values(), default=None),
        False,
        note,
    )


def _step(result: Result, model: str, R: int, most: float) -> dict[str, Any]:
    found = [
        r
        for r in result["models"]
        if (r["model"], r["R"], r["method"], r["launch"]) == (model, R, "ours", "graph")
    ]
    note = f"{found[0]['layers']} layers, CUDA graph" if found else ""
    return goal(
        f"step of {model}, R={R} ÷ un-adapted step",
        most,
        found[0]["ratio"]["plain"] if found else None,
        note=note,
    )
