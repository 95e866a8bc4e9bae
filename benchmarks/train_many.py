"""Many experts trained in one step against one after another, on the digits' base.

python -m benchmarks.train_many --quick          8 jobs, batch 1: files compared, steps timed (under 5 minutes)
python -m benchmarks.train_many --steps 500      the same after 500 steps of each job

First correctness: eight jobs of unequal ranks, losses and optimisers are trained together and then each by
`train_expert`; their files' hashes are compared. Then time, in processor seconds of one thread, interleaved:
a mixed step of all jobs, a step of each job alone, and a step of one job with the batch of all of them.
Memory is the peak of the process's tensors that a job adds (its own count, `RunningJob.bytes`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Budget, interleaved, ratio
from mole_kernels.demo.model import load_pipeline
from mole_kernels.demo.stages import scene_batches
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io.save import save_expert
from mole_kernels.methods.lora import train_expert
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.many.job import TrainJob
from mole_kernels.training.many.run import TrainMany

RANKS = (4, 8, 2, 16, 4, 3, 8, 5)


def arguments(j: int, steps: int, tensors: dict[str, Any], samples: int = 1) -> dict[str, Any]:
    """TrainJob j: a rank, loss, optimiser and order of its own."""
    optimiser = {"optimiser": "lion", "betas": (0.9, 0.99), "lr": 1e-4} if j == 5 else {"lr": 1e-3 * (1 + j)}
    config = TrainConfig(steps=steps, seed=j, snr_gamma=2.0 if j % 3 == 0 else None, **optimiser)  # type: ignore[arg-type]
    return {
        "name": f"job{j}",
        "rank": RANKS[j % len(RANKS)],
        "alpha": None,
        "config": config,
        "batches": TensorBatches(tensors, samples, seed=j),
    }


def digest(expert: Expert) -> str:
    """Of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "expert.safetensors"
        save_expert(expert, path, "diffusers")
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compare(pipe: Any, tensors: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """One row for each job: the hash of its file from mixed steps and alone."""
    many = TrainMany(pipe)
    mixed = many.run([TrainJob(**arguments(j, steps, tensors)) for j in range(len(RANKS))])
    rows = []
    for j, rank in enumerate(RANKS):
        own = arguments(j, steps, tensors)
        alone = train_expert(pipe, own.pop("batches"), progress=False, **own)
        together = digest(mixed[f"job{j}"])
        rows.append(
            {
                "job": f"job{j}",
                "rank": rank,
                "mixed": together,
                "alone": digest(alone),
                "separate": f"job{j}" in many.separate,
                "adds_bytes": many.jobs[f"job{j}"].bytes,
            }
        )
    return rows


def time_steps(pipe: Any, tensors: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Seconds of a mixed step, of as many steps of a job alone, and of one job with the whole batch."""
    forever, count = 10**9, len(RANKS)
    runs = {
        "mixed": [arguments(j, forever, tensors) for j in range(count)],
        "one by one": [arguments(3, forever, tensors)],
        "one job, whole batch": [arguments(3, forever, tensors, samples=count)],
    }
    many = {name: TrainMany(pipe) for name in runs}
    for name, jobs in runs.items():
        for own in jobs:
            many[name].add(TrainJob(**own))
    clock = Budget().clock

    def elapsed(step: Any) -> float:
        return float(step())

    def measured(name: str, times: int) -> Any:
        def step() -> float:
            # the base's layers are wrapped outside of the clock, as a run does once
            with many[name].mixing():
                many[name].step()
                begin = clock()
                for _ in range(times):
                    many[name].step()
                return clock() - begin

        return step

    methods = {"mixed": measured("mixed", 1), "mixed again": measured("mixed", 1)}
    methods |= {
        "one by one": measured("one by one", count),
        "one job, whole batch": measured("one job, whole batch", 1),
    }
    for method in methods.values():
        method()
    taken = interleaved(methods, Budget(seconds=seconds, least=8, most=40), elapsed)
    return {
        "rounds": len(taken["mixed"]),
        "ms": {name: 1e3 * sorted(values)[len(values) // 2] for name, values in taken.items()},
        "ratio": {name: ratio(values, taken["mixed"]) for name, values in taken.items()},
    }


def plot(rows: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, where matplotlib is there."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(rows["ratio"])
    middle = [rows["ratio"][name][1] for name in names]
    spread = [
        [m - rows["ratio"][n][0] for n, m in zip(names, middle)],
        [rows["ratio"][n][2] - m for n, m in zip(names, middle)],
    ]
    figure, axes = pyplot.subplots(figsize=(7, 3))
    axes.barh(names, middle, xerr=spread)
    axes.set_xlabel("time ÷ a mixed step of eight jobs (p20, p50, p80)")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Verify, then time, then a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="60 steps of each job")
    parser.add_argument("--steps", type=int, default=500, help="steps of each job that are compared")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing")
    parser.add_argument("--out", type=Path, help="folder of train_many.json and train_many.png")
    asked = parser.parse_args()
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    torch.set_num_threads(1)
    pipe = load_pipeline()
    tensors = dict(scene_batches(pipe, 64, 1).tensors)
    steps = 60 if asked.quick else asked.steps
    began = time.perf_counter()
    rows = compare(pipe, tensors, steps)
    print(f"{'job':6} {'rank':>4} {'file of mixed steps':20} {'file alone':20} {'adds, bytes':>11}")
    for row in rows:
        mark = "equal" if row["mixed"] == row["alone"] else "DIFFERS"
        print(
            f"{row['job']:6} {row['rank']:4} {row['mixed']:20} {row['alone']:20} {row['adds_bytes']:11,} {mark}"
        )
    equal = sum(row["mixed"] == row["alone"] for row in rows)
    print(f"{equal} of {len(rows)} files equal after {steps} steps of each job")
    if equal < len(rows):
        raise SystemExit("no time counts where files differ")
    times = time_steps(pipe, tensors, 30.0 if asked.quick else asked.seconds)
    print(f"\n{'':22} {'ms':>8}   ÷ mixed step: p20, p50, p80 ({times['rounds']} rounds)")
    for name, values in times["ratio"].items():
        print(f"{name:22} {times['ms'][name]:8.1f}   {', '.join(f'{v:.3f}' for v in values)}")
    print(f"jobs per hour, mixed ÷ one by one: {times['ratio']['one by one'][1]:.2f}")
    print(f"mixed step ÷ one job of the whole batch: {1 / times['ratio']['one job, whole batch'][1]:.3f}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"steps": steps, "files": rows, "times": times}, indent=1)
        (asked.out / "train_many.json").write_text(text + "\n")
        plot(times, asked.out / "train_many.png")


if __name__ == "__main__":
    main()
