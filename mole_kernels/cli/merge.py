"""`mole-kernels merge`: several experts' files into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mole_kernels.cli.screen import done
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.io.merge import merge_files


@contextmanager
def layer_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """What hears of each layer done: a live bar with the time left on a terminal, a line every tenth of the
    way elsewhere; on stderr.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def heard(i: int, total: int, path: str) -> None:
            bar.update(task, completed=i, total=total)
            if not console.is_terminal and i * 10 // total > (i - 1) * 10 // total:
                console.print(f"{title} {i}/{total} layers, {printable(path)}", soft_wrap=True)

        yield heard


def run(
    files: list[Path], out: Path, mode: str, weights: str | None, dtype: torch.dtype | None, **arguments: Any
) -> None:
    """Merge, and say what was written."""
    given = None if weights is None else [_number(word) for word in weights.split(",")]
    with layer_bar(f"merge ({printable(mode, 20)})") as heard:
        made = merge_files(files, out, given, mode, dtype=dtype, progress=heard, **arguments)
    shares = ", ".join(f"{weight:g} {name}" for name, weight in made.weights.items())
    done(str(out), f"{len(made.where)} layers, {mode}: {shares}")


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise MoleValueError(
            "--weights", expected="numbers joined by commas, as in 0.5,0.5", got=f"'{printable(word, 40)}'"
        ) from None
