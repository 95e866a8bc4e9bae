"""The parts of one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
"
:root{--ink:#222634;--soft:#667;--line:#dde;--good:#18804a;--bad:#be2c2c;--card:#fff;--page:#f4f5f9}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 80px}h1{font-size:30px;margin:0 0 6px}
h2{font-size:20px;margin:0 0 10px}
p{max-width:78ch;margin:6px 0 14px}.lead{color:var(--soft);font-size:17px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;
margin:22px 0}
.facts{display:flex;flex-wrap:wrap;gap:14px;margin:22px 0}
.fact{flex:1 1 200px;background:var(--card);border:1px solid var(--line);
border-radius:12px;padding:16px 18px}.fact b{display:block;font-size:27px;letter-spacing:-.5px}
.fact span{color:var(--soft);font-size:14px}
img{max-width:100%;height:auto;border-radius:6px}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:15px}
th,td{padding:5px 14px 5px 0;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}
tr.main td{font-weight:650}.good{color:var(--good)}.bad{color:var(--bad)}
.soft{color:var(--soft);font-weight:400}
ul{margin:6px 0;padding-left:22px;max-width:78ch}
code{background:#eef;padding:1px 5px;border-radius:4px;font-size:14px}
"""


def page(title: str, heading: str, lead: str, parts: Sequence[str]) -> str:
    """Put a page together.

    Args:
        title: Title of the window.
        heading: Heading.
        lead: The line below it.
        parts: HTML; the other arguments are text and are escaped.
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><h1>{html.escape(heading)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>' + "".join(parts) + "</main></html>\n"
    )


def section(title: str, text: str, *content: str) -> str:
    """A card with a title and a paragraph (text), and content (HTML) below them."""
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph}{''.join(content)}</section>"


def fact_cards(items: Sequence[tuple[str, str]]) -> str:
    """Large numbers, each with its meaning: (number, meaning), both text."""
    cards = "".join(
        f'<div class="fact"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in items
    )
    return f'<div class="facts">{cards}</div>'


def html_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], main: str = "") -> str:
    """A table.

    Args:
        head: The columns' titles, text.
        rows: (name, cells) of each row; the name is text, cells are HTML.
        main: Name of the row to print bold.
    """
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = ""
    for name, cells in rows:
        mark = ' class="main"' if name == main else ""
        body += f"<tr{mark}><td>{html.escape(name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def bullets(lines: Sequence[str]) -> str:
    """A list of lines of text."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def picture(uri: str, what: str) -> str:
    """An image; `what` is its alternative text."""
    return f'<div class="wide"><img alt="{html.escape(what)}" src="{uri}"></div>'


def uri_of(save: Callable[[BinaryIO], object]) -> str:
    """The PNG that `save` writes into a buffer, as a data URI."""
    buffer = io.BytesIO()
    save(buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def plot(figure: Figure, what: str) -> str:
    """A figure as an image of the page; `what` is its alternative text."""
    return picture(uri_of(lambda buffer: figure.savefig(buffer, format="png")), what)
