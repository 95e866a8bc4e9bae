"""Which lines of the package no test runs: docs/coverage.md.

python python/tools/coverage_report.py --run       # the whole suite first, with coverage (`make coverage`)
python python/tools/coverage_report.py             # from the data that lies in build/coverage
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/coverage"
PAGE = ROOT / "docs/coverage.md"
WANTED = 90.0
# why lines of a file stay dark where that is known; whole rooms by their folder
WHY = {
    "mole_kernels/backends/triton.py": "what only a GPU does: streams, flags kept for each device, CUDA graphs",
    "mole_kernels/backends/cuda.py": "calls of the compiled kernels on a GPU; the kernels themselves run in the emulator",
    "mole_kernels/kernels/triton": "launches on a GPU; kernel bodies do not count, the interpreter runs them",
    "mole_kernels/kernels/sm90.py": "asks a GPU",
    "mole_kernels/dispatch/device.py": "reads a GPU's properties",
    "mole_kernels/cli/tune.py": "times kernels on a GPU",
    "mole_kernels/cli/measure.py": "times on a GPU",
    "mole_kernels/demo": "the demo's longer runs: `make demo`",
    "mole_kernels/extension.py": "a build without CUDA, or a library that is not there",
}
HEAD = """# What no test runs

Made by `make coverage`: the whole suite under coverage.py, with the processes that tests start (commands, workers, forks). Kernel bodies
(`@triton.jit`) and lines for type checkers do not count. C++ and CUDA are not in this page: what they do is held by
[planted faults](kernels/mutants.md), the sanitizers (`make sanitize`) and the [emulator](kernels/emulator.md).

"""


def measure(jobs: int) -> None:
    """The suite under coverage; a failing test is not this command's matter."""
    for old in FOLDER.glob("data*"):
        old.unlink()
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-n", str(jobs), "--cov", "--cov-report="]
    subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def figures() -> dict[str, Any]:
    """coverage.py's own report: file -> statements run and missed."""
    if list(FOLDER.glob("data.*")):
        subprocess.run(
            [sys.executable, "-m", "coverage", "combine", "--append", "--quiet"], cwd=ROOT, check=True
        )
    out = FOLDER / "report.json"
    subprocess.run(
        [sys.executable, "-m", "coverage", "json", "--quiet", "--ignore-errors", "-o", str(out)],
        cwd=ROOT,
        check=True,
    )
    return json.loads(out.read_text())


def ranges(lines: list[int]) -> str:
    """[1, 2, 3, 7] -> 1–3, 7"""
    found: list[list[int]] = []
    for n in lines:
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)


def reason(file: str) -> str:
    return next((why for path, why in WHY.items() if file == path or file.startswith(path + "/")), "")


def room_of(file: str) -> str:
    parts = Path(file).parts
    return parts[1] + ("/" if len(parts) > 2 else "")


def written(report: dict[str, Any]) -> str:
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    rows = []
    for file, facts in sorted(report["files"].items()):
        total, missing = facts["summary"]["num_statements"], facts["missing_lines"]
        rooms[room_of(file)][0] += total
        rooms[room_of(file)][1] += len(missing)
        if missing:
            rows.append(f"| `{file.removeprefix('mole_kernels/')}` | {ranges(missing)} | {reason(file)} |")
    whole = report["totals"]
    text = (
        HEAD
        + f"**{whole['percent_covered']:.1f} %** of {whole['num_statements']} statements; {whole['missing_lines']} are not run.\n\n"
    )
    text += "| room | statements | not run | run |\n|---|---|---|---|\n"
    for room, (total, missed) in sorted(rooms.items()):
        if total:
            text += f"| `{room}` | {total} | {missed} | {100 * (1 - missed / total):.1f} % |\n"
    return (
        text
        + "\n## The lines\n\n| file | lines | why, where it is one reason |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the suite first")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.run:
        measure(options.jobs)
    report = figures()
    PAGE.write_text(written(report))
    percent = report["totals"]["percent_covered"]
    print(
        f"{percent:.1f} % of the lines, {'at least' if percent >= WANTED else 'BELOW'} {WANTED:.0f} %: {PAGE.relative_to(ROOT)}"
    )
    return 0 if percent >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
