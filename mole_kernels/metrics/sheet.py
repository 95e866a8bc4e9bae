"""Comparisons for the eye: a contact sheet, and an HTML page with figures and pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mole_kernels.errors import MoleValueError
from mole_kernels.metrics.folders import Sample
from mole_kernels.metrics.result import Result
from mole_kernels.metrics.statistics import Comparison
from mole_kernels.reports.page import fact_cards, html_table, page, picture, section, uri_of

if TYPE_CHECKING:
    from PIL.Image import Image


def contact_sheet(rows: Mapping[str, Sequence[Sample]], columns: int = 8, side: int = 128) -> Image:
    """One row of pictures for each set, column k the k-th picture of each, scaled into squares.

    Args:
        rows: Name of a set -> its pictures.
        columns: At most so many of each.
        side: Of a square in pixels.

    Raises:
        MoleValueError: No pictures.
    """
    from PIL import Image, ImageDraw, ImageOps

    wide = min(columns, max((len(samples) for samples in rows.values()), default=0))
    if not rows or wide < 1 or side < 1:
        raise MoleValueError("contact sheet", expected="pictures", got="none")
    bar, gap = 14, 2
    sheet = Image.new("RGB", (wide * (side + gap) + gap, len(rows) * (side + bar + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, samples) in enumerate(rows.items()):
        top = r * (side + bar + gap) + gap
        draw.text((gap, top), name[: max(8, wide * side // 7)], fill="black")
        for c, sample in enumerate(samples[:wide]):
            tile = ImageOps.contain(sample.image(), (side, side))
            left = gap + c * (side + gap)
            sheet.paste(tile, (left + (side - tile.width) // 2, top + bar + (side - tile.height) // 2))
    return sheet


def comparison_page(
    title: str,
    sets: Mapping[str, Sequence[Sample]],
    results: Mapping[str, Sequence[Result]],
    comparisons: Mapping[str, Sequence[Comparison]] = {},
    columns: int = 8,
) -> str:
    """An HTML page that needs no other file.

    Args:
        title: Its heading.
        sets: Name -> pictures.
        results: Name -> figures, the same metrics for all.
        comparisons: Name of another set -> the first set against it.
        columns: Pictures shown of each set.

    Raises:
        MoleValueError: Results of sets that are not there.
    """
    if unknown := sorted(set(results) - set(sets)):
        raise MoleValueError("comparison page", expected=f"results of {', '.join(sets)}", got=unknown[0])
    first = next(iter(results.values()), ())
    head = ["set", *(f"{r.metric} ({r.better} is better)" for r in first)]
    rows = [(name, [f"{r.value:.4g}" for r in own]) for name, own in results.items()]
    parts = [
        fact_cards([(str(len(samples)), f"pictures: {name}") for name, samples in sets.items()]),
        section("Figures", "", html_table(head, rows)),
    ]
    for name, own in comparisons.items():
        table = html_table(
            ["metric", "difference", "95 % interval", "wins", "pairs"],
            [
                (
                    c.metric,
                    [
                        f"{c.difference:+.4g}",
                        f"{c.low:+.4g} … {c.high:+.4g}",
                        f"{100 * c.wins:.0f} %",
                        str(c.pairs),
                    ],
                )
                for c in own
            ],
        )
        parts.append(
            section(f"Against {name}", "Paired bootstrap over prompts; ties count half a win.", table)
        )
    sheet = contact_sheet(sets, columns)
    parts.append(section("Pictures", "", picture(uri_of(lambda file: sheet.save(file, "PNG")), "pictures")))
    models = sorted({(r.metric, r.model, r.revision) for own in results.values() for r in own})
    parts.append(
        section(
            "Measured by",
            "",
            html_table(["metric", "model", "revision"], [(m, [a, b]) for m, a, b in models]),
        )
    )
    return page(title, title, f"{len(sets)} sets, {len(first)} metrics", parts)
