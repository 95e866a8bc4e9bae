"""`mole-kernels fuse`: concepts of a configuration into one expert, and a report of every layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from mole_kernels.cli.files import FuseArgs
from mole_kernels.cli.pipelines import read_pipeline
from mole_kernels.cli.place import ready_folder
from mole_kernels.cli.screen import done, number, out, table
from mole_kernels.cli.training import resolution_of
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.methods.mix_of_show.concept import load_fusion_config
from mole_kernels.methods.mix_of_show.folder import PIPELINE, save_dense, save_fused
from mole_kernels.methods.mix_of_show.fusion import FusedConcepts, FusionSettings, fuse_pipeline, plan_fusion


def run(asked: FuseArgs) -> None:
    """Read everything, say what will be done, do it, write the folder."""
    settings = fusion_settings(asked)
    concepts = load_fusion_config(asked.config)
    if not asked.dry_run:
        ready_folder(asked.out)
    pipe = read_pipeline(asked.model, getattr(torch, asked.dtype) if asked.dtype else None, command="fuse")
    if asked.dry_run:
        out().print(str(plan_fusion(pipe, concepts, settings)), soft_wrap=True)
        return
    begun = time.perf_counter()
    with _progress() as on_progress:
        fused = fuse_pipeline(pipe, concepts, settings, on_progress)
    seconds = time.perf_counter() - begun
    save_fused(fused, asked.out, asked.to)
    _show(fused, asked.layers)
    rank = max(layer.rank for layer in fused.layers)
    done(
        str(asked.out),
        f"{len(concepts)} concepts, {len(fused.layers)} layers of rank up to {rank}, {seconds:.1f} s",
    )
    if asked.dense:
        save_dense(pipe, fused, asked.out / PIPELINE)
        done(str(asked.out / PIPELINE), "the whole pipeline with the fused weights and the concepts' tokens")


def fusion_settings(asked: FuseArgs) -> FusionSettings:
    """What the command line says, checked.

    Raises:
        MoleValueError: A size or a memory that is none.
    """
    size = resolution_of(asked.resolution)
    height, width = (size, size) if isinstance(size, int) or size is None else size
    if asked.memory_mb is not None and not asked.memory_mb > 0:
        raise MoleValueError("--memory-mb", expected="megabytes above 0", got=asked.memory_mb)
    budget = None if asked.memory_mb is None else int(asked.memory_mb * 1e6)
    more: dict[str, Any] = {"templates": tuple(asked.template)} if asked.template else {}
    for name, templates in (("choose", asked.choose_template), ("held", asked.held_template)):
        if templates:
            more[f"{name}_templates"] = tuple(templates)
    return FusionSettings(
        words=asked.words,
        runs=asked.runs,
        choose_runs=asked.choose_runs,
        held_runs=asked.held_runs,
        fused_text_layers=asked.fused_text_layers,
        steps=asked.sampling_steps,
        height=height,
        width=width,
        seed=asked.seed,
        memory=budget,
        cutoff=asked.cutoff,
        ridge=asked.ridge,
        lbfgs=asked.lbfgs,
        **more,
    )


def _show(fused: FusedConcepts, layers: bool) -> None:
    totals = fused.totals()
    columns: tuple[str, ...] = ("", "layers", "base", "weights", "gradient", "fused", "÷ weights")
    rows = [_row(group, int(sums["layers"]), sums) for group, sums in totals.items()]
    if layers:
        rows += [_row(layer.path, 1, layer.row()) for layer in fused.layers]
    if any(layer.lbfgs is not None for layer in fused.layers):
        columns = (*columns, "LBFGS", "÷ its time")
    out().print(table("fitted: Σ_i ‖(α_i ΔW_i − ΔW) X_i‖²", columns, rows, columns[1:]))
    _show_held(fused, layers)
    short = sum(layer.directions < layer.K for layer in fused.layers)
    out().print(
        f"{short} of {len(fused.layers)} layers have inputs in fewer directions than they have places."
    )
    back = sum(int(sums["weight_fused"]) for sums in totals.values())
    out().print(
        f"{back} of {len(fused.layers)} layers are weight fusion, which is better there on other runs."
    )
    noted = [layer for layer in fused.layers if layer.note]
    for layer in noted[:5]:
        out().print(f"{printable(layer.path)}: {layer.note}", soft_wrap=True)
    if len(noted) > 5:
        out().print(f"and {len(noted) - 5} more, in report.json")


def _show_held(fused: FusedConcepts, layers: bool) -> None:
    """The same on runs and prompts that neither fitted nor chose, as parts of the base's objective."""
    rows = []
    for group, sums in fused.totals().items():
        if "held_base" in sums:
            held = {
                key.removeprefix("held_"): value for key, value in sums.items() if key.startswith("held_")
            }
            rows.append(_held_row(group, held))
    if not rows:
        return
    if layers:
        rows += [_held_row(layer.path, layer.held) for layer in fused.layers if layer.held]
    columns: tuple[str, ...] = ("", "weights", "gradient", "fused", "÷ weights")
    if len(rows[0]) > len(columns):
        columns = (*columns, "LBFGS")
    out().print(table("held out: the same on other runs, parts of the base's", columns, rows, columns[1:]))


def _held_row(name: str, held: Mapping[str, float]) -> tuple[str, ...]:
    base = held["base"] or 1.0
    cells = [number(held[key] / base) for key in ("by_weights", "gradient", "fused")]
    cells.append(number(held["fused"] / held["by_weights"] if held["by_weights"] else 0.0))
    if "lbfgs" in held:
        cells.append(number(held["lbfgs"] / base))
    return (name, *cells)


def _row(name: str, count: int, sums: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = sums["fused"] / sums["by_weights"] if sums["by_weights"] else 0.0
    values = [sums[key] for key in ("base", "by_weights", "gradient", "fused")] + [ratio]
    cells = (name, str(count), *map(number, values))
    if sums.get("lbfgs") is None:
        return cells
    return (
        *cells,
        number(sums["lbfgs"]),
        number(sums["seconds"] / sums["lbfgs_seconds"]) if sums["lbfgs_seconds"] else "–",
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """What hears of (what, done, in all): a live bar on a terminal, nothing elsewhere; on stderr."""
    console = Console(stderr=True, highlight=False, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("fuse", total=None)

        def on_progress(what: str, count: int, total: int) -> None:
            if total == 0 and console.is_terminal:
                console.print(printable(what, 300), soft_wrap=True)
            elif total:
                bar.update(task, description=printable(what, 300), completed=count, total=total)

        yield on_progress
