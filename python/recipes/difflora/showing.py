"""The recipe's table, plots and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

EXPERTS = (
    "no expert",
    "another hand's",
    "mean LoRA",
    "predicted",
    "trained, through the autoencoder",
    "trained",
)
Table = Mapping[str, Mapping[str, Any]]


def markdown(table: Table) -> str:
    """Every cell is mean ± standard deviation over the seeds."""
    lines = ["| expert of an unseen hand | denoising loss | against none |", "|---|---|---|"]
    for kind in EXPERTS:
        change = table.get(f"change, {kind}")
        cell = "–" if change is None else f"{change['mean']:+.1f} ± {change['sd']:.1f} %"
        lines.append(f"| {kind} | {_cell(table[f'loss, {kind}'], 4)} | {cell} |")
    lines += ["", "| error of the weights ÷ that of the mean LoRA | top 1 % | the rest |", "|---|---|---|"]
    names = {
        "seen": "autoencoder, hands it was trained on",
        "unseen": "autoencoder, unseen hands",
        "predicted": "predicted, unseen hands",
    }
    for key, name in names.items():
        lines.append(
            f"| {name} | {_cell(table[f'error of the top 1 %, {key}'], 2)} | {_cell(table[f'error of the rest, {key}'], 2)} |"
        )
    lines += ["", "| processor seconds for one hand | |", "|---|---|"]
    lines.append(f"| training its expert | {_cell(table['seconds to train'], 2)} |")
    lines.append(f"| predicting it | {_cell(table['seconds to predict'], 4)} |")
    lines.append(f"| times faster | {_cell(table['times faster'], 0)} |")
    return "\n".join(lines) + "\n"


def plot(table: Table, seeds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses with each kind of expert, each seed a dot, and the losses of both trainings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for y, kind in enumerate(EXPERTS):
        found = table[f"loss, {kind}"]
        left.barh(y, found["mean"], color="#7a9cc6" if kind == "predicted" else "#c9ced6")
        left.plot(found["seeds"], [y] * len(found["seeds"]), "k.", ms=5)
    left.set_yticks(range(len(EXPERTS)), EXPERTS)
    left.invert_yaxis()
    left.set_title("denoising loss of unseen hands", fontsize=10)
    for axis, name in zip(others, ("autoencoder", "denoiser")):
        for one in seeds:
            axis.plot(one["losses"][name], linewidth=0.8)
        axis.set_yscale("log")
        axis.set_title(f"training loss, {name}", fontsize=10)
        axis.set_xlabel("step")
    for axis in (left, *others):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def gallery(out: Path, path: Path) -> None:
    """Of seed 0, for some unseen hands: a card of theirs, and pictures with no, the predicted and the trained
    expert.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    drawn = torch.load(out / "seed0" / "drawn.pt", weights_only=True)
    hands = sorted({key.split()[0] for key in drawn})
    kinds = ("none", "predicted", "trained")
    count = len(next(iter(drawn.values())))
    figure = Figure(figsize=(1.0 * (2 + count * len(kinds)), 1.15 * len(hands)), layout="constrained")
    grid = figure.subplots(len(hands), 2 + count * len(kinds), squeeze=False)
    for row, hand in zip(grid, hands):
        shown = [
            (f"a card {i + 1}", Image.open(out / "seed0" / "hands" / hand / f"{i:03d}.png")) for i in range(2)
        ]
        shown += [
            (kind, one.permute(1, 2, 0).clamp(0, 1).numpy())
            for kind in kinds
            for one in drawn[f"{hand} {kind}"]
        ]
        for axis, (title, picture) in zip(row, shown):
            axis.imshow(picture)
            axis.set_axis_off()
            if hand == hands[0]:
                axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)


def _cell(found: Mapping[str, Any], digits: int) -> str:
    return f"{found['mean']:.{digits}f} ± {found['sd']:.{digits}f}"
