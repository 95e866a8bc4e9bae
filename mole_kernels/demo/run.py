"""The whole demo: trains experts and gates on the shipped base, measures every variant, and writes the
report.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from mole_kernels.demo import classifier, data, metrics, pictures, report, tasks
from mole_kernels.demo.model import ASSETS, load_pipeline, read_facts
from mole_kernels.demo.notes import describe_settings, notes_of
from mole_kernels.demo.stages import DigitTraining
from mole_kernels.demo.timing import step_times
from mole_kernels.errors import MoleValueError

ORDER = (
    "base",
    "low expert",
    "high expert",
    "sum",
    *(f"constant {c}" for c in tasks.CONSTANTS),
    "best constant",
    *tasks.GATED.values(),
)
GRID = {
    "base": "base",
    "low expert": "+ expert 0-4",
    "high expert": "+ expert 5-9",
    "sum": "+ both, summed",
    "both": "mixture, gated",
}
SHOWN = "both"
MIXTURE = "mixture.safetensors"

Say = Callable[[str], None]


def run_demo(
    out: str | os.PathLike[str] = "demo_out",
    *,
    quick: bool = False,
    seeds: int | Sequence[int] = 3,
    plan: DigitTraining | None = None,
    workers: int | None = None,
    say: Say = print,
    assets: str | Path = ASSETS,
    **sizes: int,
) -> dict[str, Any]:
    """Runs the demo and writes report.html, metrics.json, grid.png and gate_maps.png into `out`; returns what
    metrics.json holds.

    Args:
        quick: Use the shipped experts and gates instead of training them; seeds then vary the noise of
            the pictures only.
        seeds: How many, or which.
        workers: Processes, each with one thread; as many as there are processors when not given.
        sizes: held_out, captions, steps: how much is measured (see `tasks.DemoJob`).
    """
    wanted = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not wanted:
        raise MoleValueError("run_demo: seeds", expected="at least one", got=repr(seeds))
    quiet()
    folder, plan, begun = Path(out), plan or DigitTraining(), time.time()
    folder.mkdir(parents=True, exist_ok=True)

    def tell(text: str) -> None:
        say(f"[{time.time() - begun:4.0f} s] {text}")

    jobs = [
        tasks.DemoJob(s, folder, plan, Path(assets), pictures=i == 0, **sizes) for i, s in enumerate(wanted)
    ]
    tell(
        f"{'shipped experts and gates' if quick else 'training experts and gates'}, seeds "
        f"{', '.join(map(str, wanted))}"
    )
    with _pool(workers) as pool:
        tables = _quick(pool, jobs, tell) if quick else _full(pool, jobs, tell)
    tell("timing one denoising step")
    result = metrics.combine_seeds([{"seed": s, "constants": None, **tables[s]} for s in wanted], SHOWN)
    result["loss"], result["reading"] = _ordered(result["loss"]), _ordered(result["reading"])
    result["time"] = _timing(jobs[0], quick)
    result |= {
        "base": read_facts(assets),
        "quick": quick,
        "machine": _machine(),
        "training": [tables[s].get("training") for s in wanted],
    }
    result["settings"] = {name: getattr(jobs[0], name) for name in ("held_out", "captions", "steps")} | vars(
        plan
    )
    result["notes"], result["settings_text"] = notes_of(result), describe_settings(result)
    result["total_seconds"] = time.time() - begun
    _write(folder, result, tables[wanted[0]], Path(assets))
    tell(f"wrote {folder / 'report.html'}")
    return result


def _pool(workers: int | None) -> ProcessPoolExecutor:
    """Processes of one thread each: the models are too small for two threads to help one another."""
    # a forked child of a process whose thread pools already run can hang
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    torch.set_num_threads(1)
    quiet()


def quiet() -> None:
    """No remarks of transformers about optional packages and of PEFT about a second adapter: both are as
    meant here.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")


def _full(pool: ProcessPoolExecutor, jobs: Sequence[tasks.DemoJob], tell: Say) -> dict[int, dict[str, Any]]:
    """Both experts of each seed, and as soon as they are there its gates, one kind to a process."""
    tables: dict[int, dict[str, Any]] = {job.seed: {} for job in jobs}
    experts: dict[Future, tuple[tasks.DemoJob, str]] = {}
    for job in jobs:
        for half, name in enumerate(data.HALVES):
            experts[pool.submit(tasks.expert_task, job, half)] = (job, f"expert {name}")
    measured = {pool.submit(tasks.base_task, job): (job, "base measured") for job in jobs}
    missing = {job.seed: len(data.HALVES) for job in jobs}
    for future in as_completed(experts):
        job, name = experts[future]
        _take(tables, job, name, future, tell)
        missing[job.seed] -= 1
        if missing[job.seed] == 0:
            for kind in tasks.GATED:
                measured[pool.submit(tasks.gates_task, job, kind)] = (job, f"gates, {tasks.GATED[kind]}")
            measured[pool.submit(tasks.plain_task, job)] = (job, "experts without gates measured")
    for future in as_completed(measured):
        _take(tables, *measured[future], future, tell)
    return tables


def _quick(pool: ProcessPoolExecutor, jobs: Sequence[tasks.DemoJob], tell: Say) -> dict[int, dict[str, Any]]:
    tables: dict[int, dict[str, Any]] = {job.seed: {} for job in jobs}
    bank, gates = _shipped(jobs[0].assets)
    running: dict[Future, tuple[tasks.DemoJob, str]] = {}
    for job in jobs:
        running[pool.submit(tasks.base_task, job)] = (job, "base measured")
        running[pool.submit(tasks.plain_task, job, bank)] = (job, "experts without gates measured")
        running[pool.submit(tasks.shipped_task, job, bank, gates)] = (job, "mixture measured")
    for future in as_completed(running):
        _take(tables, *running[future], future, tell)
    return tables


def _take(
    tables: dict[int, dict[str, Any]], job: tasks.DemoJob, name: str, future: Future, tell: Say
) -> None:
    piece = future.result()
    tasks.add_tables(tables[job.seed], piece)
    trained = "".join(
        f", loss {first:.3f} → {last:.3f}" for first, last in piece.get("training", {}).values()
    )
    tell(f"seed {job.seed}: {name}{trained}")


def _shipped(assets: Path):
    from mole_kernels.io import load_bank

    return load_bank(assets / MIXTURE)


def _timing(job: tasks.DemoJob, quick: bool) -> dict[str, Any]:
    from mole_kernels.io import load_bank

    bank, gates = _shipped(job.assets) if quick else load_bank(tasks.mixture_path(job))
    assert gates is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return step_times(load_pipeline(job.assets).unet, bank, gates)
    finally:
        torch.set_num_threads(threads)


def _write(folder: Path, result: Mapping[str, Any], first: Mapping[str, Any], assets: Path) -> None:
    shown, captions = first["pictures"], tasks.SHOWN_CAPTIONS
    reader = classifier.load_reader(assets)
    wanted = torch.tensor([data.labels_of(caption) for caption in captions])
    columns = {title: shown[name] for name, title in GRID.items()}
    grid = pictures.picture_grid(
        columns, captions, {t: classifier.read(reader, p) for t, p in columns.items()}, wanted
    )
    maps = pictures.map_sheet(shown[SHOWN], first["maps"][SHOWN], captions, ("0-4", "5-9"))
    grid.save(folder / "grid.png")
    maps.save(folder / "gate_maps.png")
    (folder / "metrics.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (folder / "report.html").write_text(
        report.make_demo_page(result, pictures.data_uri(grid), pictures.data_uri(maps)), encoding="utf-8"
    )


def _ordered(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: table[name] for name in ORDER if name in table}


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
    }
