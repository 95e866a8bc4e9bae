"""Plots of gates and experts with matplotlib; every function returns a figure without a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleStateError
from mole_kernels.reports.record import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT = "#222634", "#666677"
# one colour for each expert, distinct for the colour-blind too (Okabe and Ito, "Color Universal Design")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def figure(width: float, height: float) -> Figure:
    """Make an empty figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        MoleStateError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoleStateError(
            "plots", "matplotlib is not installed", hint='pip install "mole-kernels[demo]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def usage_over_steps(recorder: Recorder) -> Figure:
    """Plot how much of each expert every kind of layer uses, from the first step to the last."""
    rows, values = recorder.usage()
    E = values.shape[2]
    fig = figure(2.2 + 3.4 * E, 1.1 + 0.24 * len(rows))
    axes = fig.subplots(1, E, squeeze=False, sharey=True)[0]
    high = max(1.0, float(values.max()))
    for e, axis in enumerate(axes):
        shown = axis.imshow(
            values[..., e].numpy(),
            aspect="auto",
            vmin=min(0.0, float(values.min())),
            vmax=high,
            cmap="viridis",
        )
        axis.set_title(recorder.names[e], color=INK, fontsize=11)
        axis.set_xlabel("timestep")
        places = range(0, len(recorder.steps), max(1, len(recorder.steps) // 6))
        axis.set_xticks(list(places), [str(recorder.steps[i]) for i in places])
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    fig.colorbar(shown, ax=axes, label="mean gate")
    return fig


def maps_over_picture(
    recorder: Recorder, picture: Tensor, columns: int = 5, kind: str | None = None
) -> Figure:
    """Lay each expert's gate over the finished picture.

    Args:
        recorder: A recorder after a run.
        picture: [3,H,W] in 0…1.
        columns: Number of steps to show.
        kind: One kind of layer. Default: the mean over all.

    Raises:
        MoleShapeError: The picture has another shape.
        MoleStateError: Nothing is recorded, or no layer has a map.
    """
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise MoleShapeError("maps_over_picture", expected="a picture [3,H,W]", got=tuple(picture.shape))
    maps = recorder.maps(kind)
    steps = sorted({round(i) for i in torch.linspace(0, len(maps) - 1, min(columns, len(maps))).tolist()})
    H, W = picture.shape[1:]
    wide = min(1.9 * W / H, 12 / (len(steps) + 1))
    fig = figure(wide * (len(steps) + 1) + 0.8, (wide * H / W + 0.25) * len(recorder.names))
    grid = fig.subplots(len(recorder.names), len(steps) + 1, squeeze=False)
    grey = picture.detach().float().cpu().clamp(0, 1).mean(0)
    for e, name in enumerate(recorder.names):
        low, high = float(maps[:, e].min()), float(maps[:, e].max())
        for axis, step in zip(grid[e], [None, *steps]):
            axis.set_xticks([])
            axis.set_yticks([])
            if step is None:
                axis.imshow(picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy())
                axis.set_ylabel(f"{name}\n{low:.2f} … {high:.2f}", color=INK, fontsize=9)
                continue
            axis.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.imshow(
                maps[step, e].numpy(),
                cmap="inferno",
                alpha=0.6,
                vmin=low,
                vmax=max(high, low + 1e-6),
                extent=(-0.5, W - 0.5, H - 0.5, -0.5),
            )
            if e == 0:
                axis.set_title(f"t = {recorder.steps[step]}", color=SOFT, fontsize=9)
    return fig


def maps_of_layers(recorder: Recorder, step: int | None = None) -> Figure:
    """Plot one map for each expert and kind of layer; an expert's maps share one range, to be compared.

    Args:
        recorder: A recorder after a run; one that keeps every layer gives a map for each layer.
        step: Index of the step. Default: the middle one.

    Raises:
        MoleStateError: Nothing is recorded, or no layer has a map.
    """
    kinds = recorder.kinds()
    if not kinds:
        raise MoleStateError("maps_of_layers", "no patched layer has the picture's places as its tokens")
    at = len(recorder.steps) // 2 if step is None else step
    maps = torch.stack([recorder.maps(kind)[at] for kind in kinds])
    across = min(len(kinds), 4)
    down = -(-len(kinds) // across)
    E, (H, W) = len(recorder.names), maps.shape[-2:]
    wide = min(2.4 * max(0.6, W / H), 13 / across)
    fig = figure(wide * across + 0.3, (wide * H / W + 0.35) * down * E)
    grid = fig.subplots(down * E, across, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for e, name in enumerate(recorder.names):
        low, high = float(maps[:, e].min()), float(maps[:, e].max())
        for i, kind in enumerate(kinds):
            axis = grid[e * down + i // across][i % across]
            axis.imshow(maps[i, e].numpy(), cmap="inferno", vmin=low, vmax=max(high, low + 1e-6))
            axis.set_title(
                f"{name}, {kind}" if len(kind) < 28 else f"{name}, …{kind[-26:]}", color=INK, fontsize=8
            )
    return fig


def plot_spectra(values: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Plot each layer's singular values, divided by the layer's largest, and their median.

    Args:
        values: {expert: {layer: [P] falling}}.
    """
    fig = figure(1.6 + 3.8 * max(len(values), 1), 3.2)
    axes = fig.subplots(1, max(len(values), 1), squeeze=False, sharey=True)[0]
    for i, (axis, (name, layers)) in enumerate(zip(axes, values.items())):
        longest = max((len(v) for v in layers.values()), default=0)
        table = torch.full((len(layers), longest), torch.nan)
        for row, singular in zip(table, layers.values()):
            if len(singular) and singular[0] > 0:
                row[: len(singular)] = (singular / singular[0]).float()
        for row in table[:: max(1, len(table) // 200)]:
            axis.plot(
                range(1, longest + 1), row.numpy(), color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0.8
            )
        axis.plot(
            range(1, longest + 1),
            table.nanmedian(0).values.numpy(),
            color=INK,
            linewidth=1.8,
            label="median layer",
        )
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 1.3)
        axis.set_title(name, color=INK, fontsize=11)
        axis.set_xlabel("index of the singular value")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("÷ the layer's largest")
    return fig


def size_by_layer(norms: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> Figure:
    """Plot ‖scale·B·A‖_F of every expert, summed in squares over each kind of layer.

    Args:
        norms: {expert: {kind: norm}}.
        kinds: The kinds, in the order of the rows.
    """
    fig = figure(7.5, 1.0 + 0.3 * len(kinds))
    axis = fig.subplots()
    height = 0.8 / max(len(norms), 1)
    for i, (name, of) in enumerate(norms.items()):
        places = [row + i * height for row in range(len(kinds))]
        axis.barh(
            places,
            [of.get(kind, 0.0) for kind in kinds],
            height=height,
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(kinds))], kinds, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("‖ΔW‖")
    axis.legend(frameon=False, fontsize=8)
    return fig
