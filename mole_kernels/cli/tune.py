"""`mole-kernels tune`: measure every candidate on the GPU of this machine and write its table."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mole_kernels.backends import cuda
from mole_kernels.cli.machine import TuneArgs
from mole_kernels.cli.screen import done, out, show_warning, table
from mole_kernels.dispatch import tables
from mole_kernels.dispatch.choose import CANDIDATES, HOPPER, choose, reason_against_candidate
from mole_kernels.dispatch.device import Device, known, present
from mole_kernels.dispatch.suite import SuiteCase, suite
from mole_kernels.dispatch.tables import Table, TableRow, key_of
from mole_kernels.errors import MoleFileError, MoleStateError, printable
from mole_kernels.files.writer import atomic_write

ELSEWHERE = "--out FOLDER/<gpu>.json writes elsewhere; MOLE_TABLES=FOLDER reads from there"
# candidate -> microseconds, candidate -> why it has none
Measured = tuple[dict[str, float], dict[str, str]]


def run(asked: TuneArgs) -> None:
    """Measure the suite and write the table. Raises MoleStateError where there is no such GPU here."""
    if not torch.cuda.is_available():
        raise MoleStateError(
            "tune",
            "torch sees no NVIDIA GPU on this machine, and a table is measured on the GPU it is for",
            hint="mole-kernels explain predicts without one",
        )
    device = present()
    if asked.device != "auto" and known(asked.device).key != device.key:
        raise MoleStateError(
            "tune",
            expected=f"a {known(asked.device).name}",
            got=device.name,
            hint="a table is measured on the GPU it is for",
        )
    from mole_kernels.backends.triton import why_not_device, why_not_triton
    from mole_kernels.cli.measure import measure

    reason = why_not_triton() or why_not_device()
    if reason is not None:
        raise MoleStateError("tune", f"the Triton backend cannot run here: {reason}")
    path = destination(device, asked.out)
    calls = list(suite(asked.quick))
    table_of_times, failed = collect(calls, device, measure)
    if not table_of_times.rows:
        raise MoleStateError("tune", "no call could be measured", hint=next(iter(failed), ""))

    def write(file: BinaryIO) -> None:
        file.write(tables.dumps(table_of_times).encode())

    atomic_write(path, write)
    done(str(path), f"{len(table_of_times.rows)} rows")
    summary(calls, table_of_times, device)
    for line in failed[:20]:
        show_warning(line)


def destination(device: Device, out_file: Path | None) -> Path:
    """Where the table goes; refused before minutes of measuring, not after. Raises MoleFileError."""
    path = out_file or tables.SHIPPED / f"{device.key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoleFileError(
            printable(path, 300), f"its folder cannot be made ({error.strerror})", hint=ELSEWHERE
        ) from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise MoleFileError(
            printable(path, 300), expected="a file in a folder that can be written to", hint=ELSEWHERE
        )
    return path


def collect(
    calls: list[SuiteCase], device: Device, measure: Callable[[SuiteCase, list[str]], Measured]
) -> tuple[Table, list[str]]:
    """The table of `calls`, and a line for each candidate that failed; a failure costs its own time only."""
    rows: list[TableRow] = []
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=len(calls))
        for call in calls:
            p = call.problem
            bar.update(task, description=f"{call.model} {p.M}×{p.K}×{p.N} R={p.R}")
            names = [
                name
                for name in _candidates()
                if reason_against_candidate(name, call.problem, call.use) is None
            ]
            us, without = measure(call, names)
            failed += [
                f"{call.problem}, {call.use.direction}: {name}: {why}" for name, why in without.items()
            ]
            if {"plain", "stacked"} <= set(us):
                asked = key_of(call.problem, call.use)
                rows.append(
                    TableRow(
                        asked.M,
                        asked.K,
                        asked.N,
                        asked.ranks,
                        asked.sets,
                        asked.dtype,
                        asked.gate,
                        asked.direction,
                        us,
                    )
                )
            bar.advance(task)
    software = {name: _version(name) for name in ("torch", "triton")} | {"cuda": str(torch.version.cuda)}
    utc = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Table(
        device.name, device.key, device.capability, device.processors, software, utc, tuple(rows)
    ), failed


def _candidates() -> tuple[str, ...]:
    """All that can run on this machine."""
    return CANDIDATES + HOPPER if cuda.reason_against_gpu() is None else CANDIDATES


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def summary(calls: list[SuiteCase], table_of_times: Table, device: Device) -> None:
    """How often each candidate was fastest, how often the model would have said so, and what its other
    choices would have cost.
    """
    choices = regret(calls, table_of_times, device)
    rows = []
    for name in CANDIDATES + HOPPER:
        guesses = [loss for guess, _, loss in choices if guess == name]
        first = sum(best == name for _, best, _ in choices)
        if first or guesses:
            worst = f"{(max(guesses) - 1) * 100:.0f}" if guesses else "–"
            rows.append((name, str(first), str(len(guesses)), worst))
    columns = ("candidate", "fastest", "the model's choice", "then slower by at most %")
    out().print(table(f"{len(choices)} calls", columns, rows, numbers=columns[1:]))


def regret(calls: list[SuiteCase], table_of_times: Table, device: Device) -> list[tuple[str, str, float]]:
    """(the model's choice, the fastest, time of the first over the second) for each measured call whose
    choice was measured.
    """
    choices = []
    rows = {row: row for row in table_of_times.rows}
    for call in calls:
        row = rows.get(key_of(call.problem, call.use))
        guess = choose(call.problem, device, None, call.use, _candidates()).name
        if row is not None and guess in row.us:
            best = min((name for name in CANDIDATES + HOPPER if name in row.us), key=row.us.__getitem__)
            choices.append((guess, best, row.us[guess] / row.us[best]))
    return choices
