"""Verify, then time: every case against its peers; one JSON, one table and one plot per run.

python benchmarks/run.py --suite cpu                 about ten minutes on one core
python benchmarks/run.py --suite cpu --quick         two shapes, a minute
python benchmarks/run.py --report FILE.json          table and plot of an earlier run, made anew
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import Case, suite
from benchmarks.machine import environment, results_folder
from benchmarks.measure import measure
from benchmarks.report import summary, write
from mole_kernels import extension

RESULTS = Path(__file__).with_name("results")
console = Console()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", choices=("cpu",), default="cpu", help="what to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two shapes only; writes nothing unless --out is given"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="wall time for each case (default: %(default)s)"
    )
    parser.add_argument(
        "--gflop",
        type=float,
        default=3.4,
        help="halve the rows until the plain layer is below (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results (default: {RESULTS.name}/<machine>)"
    )
    parser.add_argument("--report", type=Path, help="make table and plot of this JSON, measure nothing")
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> list[Case]:
    cases = [c for c in suite(args.gflop) if args.only in str(c)]
    if args.quick:
        cases = [c for c in cases if c.M <= 154 and c.N <= 1280 and c.K <= 1280 and c.r <= 64][::3]
    return cases


def run(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    cases, rows = chosen(args), []
    result = environment(args.threads)
    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            rows += measure(case, args.seconds)
            progress.advance(task)
    again = [row["ratio"]["plain"] for row in rows if row["method"] == "plain again"]
    result["aa_spread"] = max((abs(r - 1) for r in again), default=0.0)
    result["cases"] = rows
    return result


def main() -> int:
    args = arguments()
    if args.report:
        console.print(write(args.report.parent, args.report.stem, None))
        return 0
    reason = extension.reason_against_library()
    if reason:
        console.print(f"nothing to measure: {reason}", style="red")
        return 2
    result = run(args)
    console.print(Markdown(summary(result)))
    if not args.quick or args.out:
        folder = args.out or results_folder(result["host"], result["dirty"])
        console.print(f"written: {write(folder, result['utc'][:10], result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
