"""Build, verify, measure, report: everything about one GPU in one command, in under eight minutes.

    make gpu                                       or: python -m benchmarks.gpu
    python -m benchmarks.gpu --quick               fewer checks, three shapes, about two minutes
    python -m benchmarks.gpu --only 2048x1280      what is verified stays; of the measurements those whose
    name contains this
    python -m benchmarks.gpu --full --seconds 14400    every shape, rank, number of experts, gate and
    direction
    python -m benchmarks.gpu --report FILE.json    table and plots of an earlier run
    python -m benchmarks.gpu --table FILE.json     a table for the dispatcher from an earlier run, on standard
    output

exit 0: all verified · 1: something is wrong · 2: no NVIDIA GPU here · 3: nothing wrong, but not everything
could be checked in time
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import report, results
from benchmarks.machine import slug

RESULTS = Path(__file__).resolve().parents[1] / "results"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer checks and three shapes; written only where --out says"
    )
    parser.add_argument("--full", action="store_true", help="every case; give it hours with --seconds")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="measure only cases whose name contains or matches this"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results (default: benchmarks/{RESULTS.name}/<gpu>)"
    )
    parser.add_argument(
        "--seconds", type=float, default=460.0, help="time for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, help="how many verify at a time (default: by the processor's cores)"
    )
    parser.add_argument(
        "--peers",
        metavar="FILE.py",
        help="METHODS {name: Layer -> module} and BACKENDS of your own, beside ours",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a dry run on tiny shapes; its times mean nothing",
    )
    parser.add_argument("--no-build", action="store_true", help="leave the compiled extension as it is")
    parser.add_argument(
        "--no-verify", action="store_true", help="measure only; the result is then not verified"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE.json", help="table and plots of this file, nothing else"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE.json",
        help="print this file's rows as a dispatch table, nothing else",
    )
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    if args.report or args.table:
        return again(args)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU: nothing was run", file=sys.stderr)
        return 2
    from benchmarks.gpu.run import run

    result, code = run(args)
    print(report.summary(result))
    if (args.device == "cuda" and not args.quick and not args.only) or args.out:
        folder = args.out or RESULTS / slug(result["gpu"]["name"] if result["gpu"] else "cpu-dry-run")
        stem = results.free(folder, result["utc"][:10])
        print("written:", results.save(result, folder / f"{stem}.json"))
        for path in report.write(result, folder, stem):
            print("written:", path)
    return code


def again(args: argparse.Namespace) -> int:
    path = args.report or args.table
    try:
        result = results.load(path)
        if args.table:
            from benchmarks.gpu.table import table
            from mole_kernels.dispatch.tables import dumps

            print(dumps(table(result)), end="")
            return 0
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for made in report.write(result, path.parent, path.stem):
        print("written:", made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
