"""Measures the error of every backend and dtype against float64, and writes docs/numerics.md and its plots
(`make numerics`).

The operands are what the dtype holds: their own rounding is no error here. Triton's kernels run in its
interpreter, on the same problems.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from mole_kernels.backends.select import BACKENDS  # noqa: E402
from mole_kernels.functional import gated_lora_linear  # noqa: E402
from mole_kernels.kernels.triton import launch  # noqa: E402
from mole_kernels.reports.plots import COLOURS, INK  # noqa: E402
from tests.kernels.interpreter import run as interpreted  # noqa: E402
from tests.kernels.support import SMALL, forward_of  # noqa: E402
from tests.truth import Case, CaseCall, rounding_error  # noqa: E402

FOLDER = ROOT / "docs"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_A_CPU = ("reference", "stacked", "cpu")
WAYS = (*ON_A_CPU, "triton", "triton tf32")
COLOUR = dict(zip(WAYS, COLOURS))
# the larger sizes take minutes in the interpreter
INTERPRETED_K, INTERPRETED_R = 4096, 128
USUAL = Case(B=2, T=16, K=320, N=64, ranks=(8, 8))
KS, RS = (16, 64, 256, 1024, 4096, 16384), (4, 16, 64, 128, 256, 512)
KINDS = (
    "none",
    "constant",
    "mask",
    "local",
    "pooled",
    "both",
    "mask+both",
    "softmax",
    "top1",
    "softmax+pooled",
)
SIZES = tuple(10.0**n for n in range(-4, 5))


@dataclass(frozen=True)
class Point:
    """One measurement: `at` is what was swept; error is ‖y − truth‖ / ‖truth‖, unit what rounding the truth
    itself would cost.
    """

    sweep: str
    at: float | str
    way: str
    dtype: str
    alone: bool
    error: float
    unit: float


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    usual = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = usual


def computed(call: CaseCall, way: str) -> torch.Tensor:
    if way in ON_A_CPU:
        return gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend=way)
    with tf32(way.endswith("tf32")), interpreted():
        return launch.two_pass(forward_of(call), SMALL).y


def ways(case: Case, dtype: str, kernels: bool) -> tuple[str, ...]:
    here = tuple(
        w for w in ON_A_CPU if BACKENDS[w].reason_against(case.problem(getattr(torch, dtype))) is None
    )
    if not kernels or dtype == "float64":
        return here
    return (*here, "triton", *(("triton tf32",) if dtype == "float32" else ()))


def scaled(call: CaseCall, what: str, size: float) -> CaseCall:
    """x, or up, times `size`; rounded to the dtype before the truth is taken of it."""
    if what == "x":
        return replace(call, x=call.x * size)
    return replace(call, experts=call.experts._replace(up=call.experts.up * size))


def measure(
    sweep: str,
    at: float | str,
    case: Case,
    kernels: bool = True,
    what: str = "",
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> list[Point]:
    points = []
    for dtype in dtypes:
        for alone in (False, True):
            call = (case.alone() if alone else case).make(getattr(torch, dtype))
            call = scaled(call, what, float(at)) if what else call
            truth = call.truth()
            exact = truth.to(getattr(torch, dtype)).double()
            unit = ((exact - truth).norm() / truth.norm()).item()
            for way in ways(case, dtype, kernels):
                y = computed(call, way).double()
                points.append(
                    Point(sweep, at, way, dtype, alone, ((y - truth).norm() / truth.norm()).item(), unit)
                )
    return points


def everything() -> list[Point]:
    points: list[Point] = []
    for K in KS:
        points += measure("K", K, replace(USUAL, K=K), K <= INTERPRETED_K)
    for R in RS:
        points += measure("R", R, replace(USUAL, ranks=(R // 2, R - R // 2)), R <= INTERPRETED_R)
    for kind in KINDS:
        points += measure("gates", kind, replace(USUAL, gate=kind))
    for size in SIZES:
        points += measure("size of x", size, USUAL, what="x")
        points += measure("size of up", size, USUAL, what="up")
    for kind in ("none", "both", "softmax"):
        points += measure("float64", kind, replace(USUAL, gate=kind, K=2048), False, dtypes=("float64",))
    return points


def limit(dtype: str, roundings: int = 4) -> float:
    """What the tests allow, on a typical truth."""
    if dtype == "float32":
        return 1e-6
    truth = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rounding_error(truth, DTYPES[dtype]) * 1.25 * roundings**0.5


def lines(points: list[Point], sweep: str, label: str, path: Path, log: bool = True) -> None:
    """Above the whole, below the low-rank part alone; a panel for each dtype, a line for each way, the tests'
    limit in black.
    """
    made = Figure(figsize=(11, 6.2), layout="constrained", dpi=110)
    grid = made.subplots(2, len(DTYPES), sharex=True, sharey="col")
    for row, alone in zip(grid, (False, True)):
        for axis, dtype in zip(row, DTYPES):
            here = [
                p
                for p in points
                if p.sweep == sweep and p.alone == alone and p.dtype == dtype and p.error == p.error
            ]
            for way in WAYS:
                mine = [p for p in here if p.way == way and 0 < p.error < float("inf")]
                marks = dict(
                    marker="os^Dv"[WAYS.index(way)],
                    ms=4 + 2 * (WAYS.index(way) == 0),
                    lw=1.2,
                    color=COLOUR[way],
                    label=way,
                )
                if mine:
                    axis.plot([p.at for p in mine], [p.error for p in mine], alpha=0.85, **marks)
            allowed = axis.axhline(limit(dtype), color="black", lw=1, ls="--")
            if dtype == "float32":
                axis.axhline(1e-3, color="black", lw=1, ls=":")
            if dtype == "float32":
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.1 * limit(dtype))
                axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            if log:
                axis.set_xscale("log", base=10)
            axis.set_title(f"{dtype}, {'low-rank part alone' if alone else 'whole'}", fontsize=10, color=INK)
            axis.grid(True, which="major", lw=0.3, color="#dddddd")
            if not log:
                axis.tick_params(axis="x", rotation=60, labelsize=8)
    for axis in grid[1]:
        axis.set_xlabel(label)
    for axis in grid[:, 0]:
        axis.set_ylabel("relative error")
    handles, names = grid[0, 0].get_legend_handles_labels()
    made.legend(
        [*handles, allowed],
        [*names, "the tests' limit (dotted: tf32's)"],
        loc="outside upper center",
        ncols=6,
        fontsize=9,
        frameon=False,
    )
    made.savefig(path)


def worst(points: list[Point], way: str, dtype: str, alone: bool) -> Point | None:
    """The largest error over K, R, kinds of gates and size 1."""
    here = [
        p
        for p in points
        if p.way == way and p.dtype == dtype and p.alone == alone and p.sweep in ("K", "R", "gates")
    ]
    return max(here, key=lambda p: p.error, default=None)


def table(points: list[Point]) -> str:
    text = (
        "| backend | dtype | whole, worst | at | low-rank part alone, worst | at | ÷ rounding once | limit |\n"
        + "|---" * 8
        + "|\n"
    )
    for way in WAYS:
        for dtype in DTYPES:
            whole, alone = worst(points, way, dtype, False), worst(points, way, dtype, True)
            if whole is None or alone is None:
                continue
            allowed = 1e-3 if way.endswith("tf32") else limit(dtype)
            over = "" if dtype == "float32" else f"{alone.error / alone.unit:.2f}"
            where = [f"{p.sweep} {p.at}" for p in (whole, alone)]
            text += f"| {way} | {dtype} | {whole.error:.1e} | {where[0]} | {alone.error:.1e} | {where[1]} | {over} | {allowed:.1e} |\n"
    wide = [p for p in points if p.sweep == "float64"]
    for way in ON_A_CPU:
        mine = [p.error for p in wide if p.way == way]
        if mine:
            text += f"| {way} | float64 | {max(mine):.1e} | K 2048 | | | | |\n"
    return text


def sizes(points: list[Point]) -> str:
    """Errors at the ends of the sweep over sizes, the low-rank part alone."""
    text = "| backend | dtype | x · 1e-4 | x · 1 | x · 1e4 | up · 1e-4 | up · 1e4 |\n|---|---|---|---|---|---|---|\n"
    chosen = [
        ("size of x", 1e-4),
        ("size of x", 1.0),
        ("size of x", 1e4),
        ("size of up", 1e-4),
        ("size of up", 1e4),
    ]
    for way in WAYS:
        for dtype in DTYPES:
            found = {
                (p.sweep, p.at): p.error for p in points if p.way == way and p.dtype == dtype and p.alone
            }
            if found:
                text += f"| {way} | {dtype} | " + " | ".join(_number(found[key]) for key in chosen) + " |\n"
    return text


def _number(error: float) -> str:
    return "y overflows" if error != error or error == float("inf") else f"{error:.1e}"


def main() -> int:
    torch.set_num_threads(1)
    points = everything()
    folder = FOLDER / "numerics"
    folder.mkdir(exist_ok=True)
    lines(points, "K", "K", folder / "by_k.png")
    lines(points, "R", "R, two experts", folder / "by_rank.png")
    lines(points, "gates", "", folder / "by_gate.png", log=False)
    lines(points, "size of x", "x times", folder / "by_size_of_x.png")
    lines(points, "size of up", "up times", folder / "by_size_of_up.png")
    page = FOLDER / "numerics.md"
    text = page.read_text()
    for mark, made in (("worst", table(points)), ("sizes", sizes(points))):
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        head, _, rest = text.partition(begin)
        text = head + begin + made + end + rest.partition(end)[2]
    page.write_text(text)
    bad = [
        p
        for p in points
        if p.sweep in ("K", "R", "gates")
        and p.error > (1e-3 if p.way.endswith("tf32") else 1.05 * limit(p.dtype))
    ]
    print(f"{len(points)} measurements, {len(bad)} beyond the limit", *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
