"""The recipe's table, its plot, and some of its pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
SHOWN = ("base", "joint", "merged, 1/T", "sum")


def markdown(results: Results) -> str:
    """Rows of variants, columns of skills: mean ± standard deviation over seeds, in percent."""
    columns = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for variant, row in results.items():
        cells = (f"{100 * row[c]['mean']:.1f} ± {100 * row[c]['sd']:.1f}" for c in columns)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """Bars of the mean over skills and of the other digits, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(results) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(results)[::-1]
    for axis, column in zip(axes, ("all skills", "other digits"), strict=True):
        axis.barh(
            names, [100 * results[name][column]["mean"] for name in names], color="#7aa6c2", height=0.65
        )
        for k, name in enumerate(names):
            axis.plot(
                [100 * value for value in results[name][column]["seeds"]],
                [k] * len(results[name][column]["seeds"]),
                "k.",
                ms=4,
            )
        axis.axvline(100 * results["base"][column]["mean"], color="0.4", lw=0.8, ls="--")
        axis.set_xlabel("DSG score, %")
        axis.set_title(column)
        axis.set_xlim(0, 100)
    figure.savefig(path, dpi=130)


def gallery(folder: Path, path: Path, pictures: int = 6) -> None:
    """The first pictures of every skill's captions, one column for each variant of `SHOWN`, of both
    sources.
    """
    from PIL import Image, ImageDraw

    columns = {"base": folder / "base"}
    for source in ("own_pictures", "scans"):
        columns |= {
            f"{source.split('_')[0]}: {name}": folder
            / source
            / "drawn"
            / name.replace(" ", "_").replace("/", "_")
            for name in SHOWN[1:]
        }
    found = {title: sorted(where.glob("*.png")) for title, where in columns.items()}
    total = len(next(iter(found.values())))
    rows = [k * total // pictures for k in range(pictures)]
    width, height, gap, top, left = 144, 48, 8, 24, 110
    sheet = Image.new(
        "RGB", (left + len(columns) * (width + gap) + gap, top + len(rows) * (height + gap)), (250, 250, 252)
    )
    pen = ImageDraw.Draw(sheet)
    for c, (title, files) in enumerate(found.items()):
        x = left + gap + c * (width + gap)
        pen.text((x, 6), title, fill=(34, 38, 52))
        for r, row in enumerate(rows):
            y = top + r * (height + gap)
            with Image.open(files[row]) as image:
                sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
                if c == 0:
                    pen.text((gap, y), image.info["prompt"].replace(" ", "\n"), fill=(34, 38, 52))
    sheet.save(path)
