"""What all commands print with. Text of a file is made printable first and never read as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mole_kernels.errors import printable


def out() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=False)


def complain(message: str) -> None:
    """An error: the first line red, the hint as it is."""
    first, _, rest = message.partition("\n")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(Text(first, style="bold red"))
    if rest:
        console.print(Text(rest))


def remark(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
        Text(f"Warning: {message}", style="yellow")
    )


def done(path: str, what: str) -> None:
    out().print(
        Text.assemble(("wrote ", "green"), (printable(path, 300), "bold"), f"  {printable(what, 300)}"),
        soft_wrap=True,
    )


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = ()
) -> Group:
    """A titled table of safe text; the columns named in `numbers` are set right."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell, 300)) for cell in row))
    return Group(Text(title, style="bold"), made)


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Two columns: what, and what it is."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(printable(name, 60), value if isinstance(value, Text) else Text(printable(value, 2000)))
    return made


def number(value: float) -> str:
    return f"{value:.4g}"
