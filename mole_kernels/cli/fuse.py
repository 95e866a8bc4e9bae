"""`mole-kernels fuse`: concepts of a configuration into one expert, and a report of every layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.screen import done, number, out, table
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.methods.mix_of_show.concept import load_fusion_config
from mole_kernels.methods.mix_of_show.folder import PIPELINE, save_dense, save_fused
from mole_kernels.methods.mix_of_show.fusion import FusedConcepts, FusionSettings, fuse_pipeline, plan_fusion

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(
    config: Path,
    pipeline: str,
    folder: Path,
    settings: FusionSettings,
    to: Literal["diffusers", "kohya"],
    dtype: str | None,
    dense: bool,
    layers: bool,
    dry: bool,
) -> None:
    """Read everything, say what will be done, do it, write the folder."""
    concepts = load_fusion_config(config)
    pipe = read_pipeline(pipeline, DTYPES[dtype] if dtype else None, command="fuse")
    if dry:
        out().print(str(plan_fusion(pipe, concepts, settings)), soft_wrap=True)
        return
    begun = time.perf_counter()
    with _progress() as heard:
        fused = fuse_pipeline(pipe, concepts, settings, heard)
    seconds = time.perf_counter() - begun
    save_fused(fused, folder, to)
    _tell(fused, layers)
    rank = max(layer.rank for layer in fused.layers)
    done(
        str(folder),
        f"{len(concepts)} concepts, {len(fused.layers)} layers of rank up to {rank}, {seconds:.1f} s",
    )
    if dense:
        save_dense(pipe, fused, folder / PIPELINE)
        done(str(folder / PIPELINE), "the whole pipeline with the fused weights and the concepts' tokens")


def settings_of(
    templates: list[str] | None,
    steps: int,
    size: str | None,
    seed: int,
    memory: float | None,
    cutoff: float,
    ridge: float,
    lbfgs: int = 0,
) -> FusionSettings:
    """What the command line said, checked."""
    height = width = None
    if size is not None:
        parts = size.lower().split("x")
        if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise MoleValueError(
                "--size", expected="a side in pixels, or HEIGHTxWIDTH", got=f"'{printable(size, 40)}'"
            )
        height, width = int(parts[0]), int(parts[-1])
    if memory is not None and not memory > 0:
        raise MoleValueError("--memory", expected="megabytes above 0", got=memory)
    budget = None if memory is None else int(memory * 1e6)
    more: dict[str, Any] = {"templates": tuple(templates)} if templates else {}
    return FusionSettings(
        steps=steps,
        height=height,
        width=width,
        seed=seed,
        memory=budget,
        cutoff=cutoff,
        ridge=ridge,
        lbfgs=lbfgs,
        **more,
    )


def _tell(fused: FusedConcepts, layers: bool) -> None:
    columns: tuple[str, ...] = ("", "layers", "base", "weight fusion", "fused", "fused ÷ weight fusion")
    rows = [_row(group, int(sums["layers"]), sums) for group, sums in fused.totals().items()]
    if layers:
        rows += [_row(one.path, 1, one.row()) for one in fused.layers]
    if any(one.lbfgs is not None for one in fused.layers):
        columns = (*columns, "LBFGS", "÷ its time")
    out().print(table("Σ_i ‖(α_i ΔW_i − ΔW) X_i‖²", columns, rows, columns[1:]))
    short = sum(one.directions < one.K for one in fused.layers)
    out().print(
        f"{short} of {len(fused.layers)} layers have inputs in fewer directions than they have places; there the base stays."
    )
    noted = [one for one in fused.layers if one.note]
    for one in noted[:5]:
        out().print(f"{printable(one.path)}: {one.note}", soft_wrap=True)
    if len(noted) > 5:
        out().print(f"and {len(noted) - 5} more, in report.json")


def _row(name: str, count: int, sums: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = sums["fused"] / sums["by_weights"] if sums["by_weights"] else 0.0
    made = (
        name,
        str(count),
        number(sums["base"]),
        number(sums["by_weights"]),
        number(sums["fused"]),
        number(ratio),
    )
    if sums.get("lbfgs") is None:
        return made
    return (
        *made,
        number(sums["lbfgs"]),
        number(sums["seconds"] / sums["lbfgs_seconds"]) if sums["lbfgs_seconds"] else "–",
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A live bar on a terminal, a line for each thing that is done elsewhere; on stderr."""
    console = Console(stderr=True, highlight=False, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("fuse", total=None)

        def heard(what: str, done: int, total: int) -> None:
            what = printable(what, 300)
            if total == 0:
                console.print(what, soft_wrap=True)
                return
            bar.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and done == total:
                console.print(f"{what} {done}/{total}", soft_wrap=True)

        yield heard
