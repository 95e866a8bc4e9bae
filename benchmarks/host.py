"""What an eager call of a small layer costs on the host, where the arithmetic costs next to nothing.

python benchmarks/host.py                 a table: µs a call, and the ratio to the plain layer, paired
python benchmarks/host.py --against DIR   the same of another tree of this project, in turn with this one

One thread; one token of K = N = 16 features, two experts of rank 4.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
K, RANKS, CALLS = 16, (4, 4), 200


def methods(x: Tensor) -> dict[str, Callable[[], object]]:
    """The layers that are compared; the first is what the ratios refer to."""
    import mole_kernels as mk
    from mole_kernels.gates import MoLEGate

    base, R = nn.Linear(K, K), sum(RANKS)
    experts = mk.Experts(torch.randn(1, R, K), torch.randn(1, K, R), torch.ones(len(RANKS)), RANKS)
    gated = mk.GatedLoRALinear.from_linear(base, experts)
    mole = mk.GatedLoRALinear.from_linear(base, experts, MoLEGate(K, K, len(RANKS)))
    return {"plain": lambda: base(x), "gated": lambda: gated(x), "mole": lambda: mole(x)}


def measure(rounds: int) -> dict[str, float]:
    """Median seconds of one call of each method, all of them in turn in every round."""
    torch.set_num_threads(1)
    with torch.no_grad():
        runs = methods(torch.randn(1, 1, K))
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    run()
                taken[name].append((time.perf_counter() - begin) / CALLS)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def of_tree(root: Path, rounds: int) -> dict[str, float]:
    """`measure` in a process of its own that imports the package of that tree."""
    code = (
        "import json, runpy, sys; found = runpy.run_path(sys.argv[1]); "
        f"print(json.dumps(found['measure']({rounds})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd="/",
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"{root}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="root of another tree of this project")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    trees = {"this tree": ROOT} | ({"that tree": asked.against.resolve()} if asked.against else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(5):
        for name, root in trees.items():
            found[name].append(of_tree(root, asked.rounds))
    for method in found["this tree"][0]:
        cells = []
        for name, rows in found.items():
            seconds = statistics.median(row[method] for row in rows)
            ratio = statistics.median(row[method] / row["plain"] for row in rows)
            cells.append(f"{name} {seconds * 1e6:6.2f} µs, {ratio:5.2f} × plain")
        if asked.against:
            change = statistics.median(
                a[method] / b[method] for a, b in zip(found["this tree"], found["that tree"])
            )
            cells.append(f"this/that {change:.2f}")
        print(f"{method:8} " + " · ".join(cells))


if __name__ == "__main__":
    main()
