"""What all commands print with. Text of a file is made printable first and never read as markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from mole_kernels.errors import printable


def out() -> Console:
    """Standard output."""
    return Console(highlight=False, markup=False, soft_wrap=False)


def show_error(message: str) -> None:
    """An error: the first line red, the hint as it is."""
    first, _, rest = message.partition("\n")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(Text(first, style="bold red"))
    if rest:
        console.print(Text(rest))


def show_warning(message: str) -> None:
    """A warning: one yellow line."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
        Text(f"Warning: {message}", style="yellow")
    )


def done(path: str, what: str) -> None:
    """The one line that sums up what was written."""
    out().print(
        Text.assemble(("wrote ", "green"), (printable(path, 300), "bold"), f"  {printable(what, 300)}"),
        soft_wrap=True,
    )


@contextmanager
def layer_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """What hears of (layers done, layers in all, path): a bar on a terminal, nothing elsewhere; on stderr."""
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

        def on_layer(i: int, total: int, path: str) -> None:
            bar.update(task, completed=i, total=total)

        yield on_layer


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = ()
) -> Group:
    """A titled table of safe text; the columns named in `numbers` are set right."""
    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell, 300)) for cell in row))
    return Group(Text(title, style="bold"), grid)


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Two columns: what, and what it is."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(printable(name, 60), value if isinstance(value, Text) else Text(printable(value, 2000)))
    return grid


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"
