"""Plants every fault into every backend and writes down which test noticed it: docs/kernels/mutants.md.

python python/tools/mutants.py              # reference, stacked, cpu and Triton: a minute or two; CUDA as it
was last time
python python/tools/mutants.py --cuda       # those in the emulator as well: each is a program to compile
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.cuda.mutants import MUTANTS as IN_CUDA  # noqa: E402
from tests.cuda.mutants import kill  # noqa: E402
from tests.kernels import test_mutants as in_triton  # noqa: E402
from tests.mutation import of_cpu, of_cuda, of_reference, of_stacked, of_triton, suite  # noqa: E402
from tests.mutation.faults import ABSENT, BACKENDS, FAULTS  # noqa: E402
from tests.mutation.plant import planted_in  # noqa: E402

TABLE = ROOT / "docs/kernels/mutants.md"
Cells = dict[tuple[str, str], str]
HEAD = """# Planted faults, and what notices them

Made by `make mutants`. Each fault is written into the backend's own source: the formula and plain torch as changed modules, the CPU
operator compiled once with every fault behind a switch, Triton's kernels in the interpreter, the Hopper kernels in the emulator. A cell
names the first test of the suite that fails, or what the checker says. `tests/mutation` holds the faults and runs all but CUDA's with
`make test`. The first ten must also be noticed in bfloat16 alone, and are. On a GPU `make gpu` plants faults in the results themselves.

The formula's faults are shared by the truth, so what notices them is another backend, or a test that states a result by hand.

| fault | formula | stacked | cpu | Triton | CUDA |
|---|---|---|---|---|---|
"""


def short(test: str | None) -> str:
    """test_forward[B2T15K64N48-r8-8-local-torch.float32] of stacked -> forward of `local`, float32, by
    stacked.
    """
    if test is None:
        return "**SURVIVED**"
    by = test.rpartition(" of ")[2] if " of " in test else ""
    if m := re.match(r"test_(\w+)\[B\d+T\d+K\d+N\d+-(?:r[\d-]+\d-|E\d+-)?(.*?)-?torch\.(\w+)\]", test):
        return f"{m[1]} of `{m[2]}`" + (f", by {by}" if by else "")
    name = re.sub(r"\[.*", "", test.split(" of ")[0]).removeprefix("test_").replace("_", " ")
    return name + (f", by {by}" if by else "")


def in_python(cells: Cells) -> None:
    for backend, room, judges in (
        ("reference", of_reference, ("stacked", "reference", "cpu")),
        ("stacked", of_stacked, ("stacked",)),
    ):
        for m in room.MUTANTS:
            with planted_in(m):
                only = (backend,) if m.backward else judges
                cells[m.fault, backend] = short(suite.noticed(only, m.backward))
    of_cpu.load()
    for m in of_cpu.MUTANTS:
        with of_cpu.planted_in(m):
            cells[m.fault, "cpu"] = short(suite.noticed(("cpu",), m.backward))


def words(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else "not NaN where it must be"
    return re.sub(r"^\w*: ", "", text.replace("|", "/"))[:60]


def noticed_in_triton(name: str) -> bool:
    """Whether a fault of tests/kernels/test_mutants.py is noticed: its own test passes."""
    kind = "forward" if name in in_triton.MUTANTS else "routed" if name in in_triton.ROUTED else "backward"
    test = getattr(in_triton, f"test_a_{kind}_mutant_is_killed")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        try:
            test(name, Path(folder), patch)
        except pytest.fail.Exception:
            return False
    return True


def in_interpreter(cells: Cells) -> None:
    for m in of_triton.MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                of_triton.run_planted(m, Path(folder), m.backward)
                cells[m.fault, "triton"] = "**SURVIVED**"
            except AssertionError as e:
                cells[m.fault, "triton"] = words(e)
    for fault, names in of_triton.ELSEWHERE.items():
        found = [name if noticed_in_triton(name) else f"{name}: **SURVIVED**" for name in names]
        cells[fault, "triton"] = "; ".join(found)


def in_emulator(cells: Cells) -> None:
    every = {m.name: m for m in [*IN_CUDA, *of_cuda.MUTANTS]}
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        found = dict(zip(every, pool.map(kill, every.values())))
    said = {name: "**SURVIVED**" if o is None else _kind(o.output) for name, o in found.items()}
    for fault in FAULTS:
        names = of_cuda.ELSEWHERE.get(fault, ()) + tuple(
            m.name for m in of_cuda.MUTANTS if of_cuda.FAULT_OF[m.name] == fault
        )
        if names:
            cells[fault, "cuda"] = "; ".join(f"{name}: {said[name]}" for name in names)


def _kind(output: str) -> str:
    """The kind of an emulator's report, or that the numbers were wrong."""
    if m := re.search(r"\[(\w+)\]", output):
        return f"[{m[1]}]"
    return "wrong numbers" if "excess" in output else "a livelock"


def last_time() -> Cells:
    """The table as it was."""
    cells: Cells = {}
    if TABLE.exists():
        by_words = {w: f for f, w in FAULTS.items()}
        for line in TABLE.read_text().splitlines():
            row = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(row) == 1 + len(BACKENDS) and row[0] in by_words:
                cells |= {(by_words[row[0]], backend): cell for backend, cell in zip(BACKENDS, row[1:])}
    return cells


def written(cells: Cells) -> str:
    reasons = list(dict.fromkeys(ABSENT.values()))
    lines = []
    for fault, name in FAULTS.items():
        row = [
            f"[{reasons.index(ABSENT[fault, b]) + 1}]"
            if (fault, b) in ABSENT
            else cells.get((fault, b), "not run")
            for b in BACKENDS
        ]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return (
        HEAD
        + "\n".join(lines)
        + "\n\n"
        + "\n".join(f"[{i}] {reason}  " for i, reason in enumerate(reasons, 1))
        + "\n"
    )


ROOMS = {"torch": in_python, "triton": in_interpreter, "cuda": in_emulator}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=ROOMS, default=list(ROOMS), help="torch: the formula, stacked and cpu"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = last_time()
    for name in options.only:
        ROOMS[name](cells)
    TABLE.write_text(written(cells))
    here = {key: cell for key, cell in cells.items() if key not in ABSENT}
    survivors = [
        f"{FAULTS[fault]} in {backend}"
        for (fault, backend), cell in here.items()
        if "SURVIVED" in cell or cell == "not run"
    ]
    print(
        f"{len(here)} kinds of faults in {len(BACKENDS)} backends, {len(survivors)} survived",
        *survivors,
        sep="\n",
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
