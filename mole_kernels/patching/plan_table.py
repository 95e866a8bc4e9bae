"""A plan as a table one can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_kernels.errors import printable
from mole_kernels.io.gates import GateFile
from mole_kernels.modules.scan import sizes

if TYPE_CHECKING:
    from mole_kernels.patching.plan import Plan, PlannedLayer

_MOST_ROWS = 60


def plan_table(plan: Plan) -> str:
    """Layers with sizes, experts and gates; then what is left out and why."""
    rows = [("layer", "K → N", "experts (rank)", "gate")]
    for layer in list(plan.layers.values())[:_MOST_ROWS]:
        N, K = sizes(layer.module)
        experts = ", ".join(f"{name} ({factor.rank})" for name, factor in layer.factors.items())
        rows.append((layer.path, f"{K} → {N}", experts, _gate(plan, layer)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if len(plan.layers) > _MOST_ROWS:
        lines.append(f"… and {len(plan.layers) - _MOST_ROWS} more (plan.layers holds all)")
    lines.append(f"{len(plan.layers)} layers, experts: {', '.join(plan.names)}")
    lines += _left_out("skipped", [f"{path}: {reason}" for path, reason in plan.skipped.items()])
    for name, keys in plan.unmatched.items():
        lines += _left_out(f"keys of {name} that are not used", [printable(key) for key in keys])
    lines += _left_out("gates that meet no patched layer", [printable(key) for key in plan.gates_unmatched])
    lines += _left_out("layers without gates in the file", plan.gates_missing)
    return "\n".join(lines)


def _gate(plan: Plan, layer: PlannedLayer) -> str:
    if plan.gates is None:
        return "none"
    if isinstance(plan.gates, str):
        return f"{plan.gates} (fresh)"
    if not isinstance(plan.gates, GateFile):
        return "made by a callable"
    if layer.gates is None:
        return "none"
    return " + ".join(
        word
        for word, on in (("local", layer.gates.phi is not None), ("global", layer.gates.head is not None))
        if on
    )


def _left_out(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"  … and {len(items) - _MOST_ROWS} more"] if len(items) > _MOST_ROWS else []
    return [f"{title}:", *(f"  {item}" for item in items[:_MOST_ROWS]), *more]
