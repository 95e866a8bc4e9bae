"""The command line of a recipe: one process per seed, then table, plot and results of all seeds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

Table = Mapping[str, Any]


def run_seeds(
    name: str,
    about: str,
    settings: Mapping[bool, Any],
    run_seed: Callable[[int, Any, Path], dict[str, Any]],
    combine: Callable[[Sequence[dict[str, Any]]], Table],
    markdown: Callable[[Any], str],
    plot: Callable[[Any, Path], None],
    picture: str,
) -> None:
    """Parse the command line, run every seed, write results.json, table.md and the plot.

    Args:
        name: Name of the recipe's folder below build/recipes.
        about: Help text.
        settings: Dataclass with a field `seeds`; of --quick under True, of a full run under False.
        run_seed: (seed, settings, folder) -> figures, among them cpu_seconds; runs in a process of its own.
        combine: Figures of all seeds -> table.
        markdown: Table -> text.
        plot: (table, file) draws the table.
        picture: File name of the plot.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds and shorter runs")
    parser.add_argument("--seeds", type=int, help="how many, instead")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help=f"of pictures, checkpoints and results (default: build/recipes/{name})"
    )
    args = parser.parse_args()
    chosen = settings[args.quick]
    chosen = replace(chosen, seeds=args.seeds or chosen.seeds)
    out = args.out or Path("build/recipes") / (f"{name}_quick" if args.quick else name)
    out.mkdir(parents=True, exist_ok=True)
    begun, count = time.time(), chosen.seeds
    # a forked child of a process whose thread pools already run can hang
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(run_seed, range(count), [chosen] * count, [out] * count))
    table, seconds = combine(seeds), time.time() - begun
    result = {"settings": asdict(chosen), "torch": torch.__version__, "seconds": seconds}
    (out / "results.json").write_text(json.dumps(result | {"table": table, "seeds": seeds}, indent=1) + "\n")
    (out / "table.md").write_text(markdown(table))
    plot(table, out / picture)
    print(markdown(table))
    cpu = sum(figures["cpu_seconds"] for figures in seeds)
    print(
        f"{count} seeds, {seconds:.0f} s, {cpu:.0f} s of processor time; "
        f"results.json, table.md, {picture} in {out}"
    )
