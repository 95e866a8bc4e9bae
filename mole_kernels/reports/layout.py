"""Draw regions over a picture, and the attention that each of them got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from mole_kernels.errors import MoleShapeError
from mole_kernels.reports.plots import COLOURS, INK, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HasPlace(Protocol):
    """A region that can be drawn: its prompt, and the places of a grid that it covers."""

    @property
    def prompt(self) -> str:
        """The words of the region."""
        ...

    def cover(self, height: int, width: int) -> Tensor:
        """[height,width], how much of each place the region covers, in 0…1."""
        ...


def layout_over_picture(picture: Tensor, regions: Sequence[HasPlace], prompt: str = "") -> Figure:
    """Draw the picture, and beside it the same with the outline of every region.

    Args:
        picture: [3,H,W] in 0…1.
        regions: The regions; their prompts are the legend.
        prompt: The prompt of the whole picture, its title.

    Raises:
        MoleShapeError: The picture has another shape.
    """
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise MoleShapeError("layout_over_picture", expected="a picture [3,H,W]", got=tuple(picture.shape))
    H, W = picture.shape[1:]
    wide = 4.0 * min(2.0, max(0.5, W / H))
    fig = figure(2 * wide, wide * H / W + 0.5 + 0.2 * len(regions))
    plain, drawn = fig.subplots(1, 2)
    pixels = picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    for axis in (plain, drawn):
        axis.imshow(pixels)
        axis.set_xticks([])
        axis.set_yticks([])
    plain.set_title(prompt[:60], color=INK, fontsize=9)
    for i, region in enumerate(regions):
        colour = COLOURS[i % len(COLOURS)]
        # box edges lie between places; the contour at one half does the same for masks of any shape
        drawn.contour(region.cover(H, W).float().numpy(), levels=[0.5], colors=[colour], linewidths=2)
        drawn.plot([], [], color=colour, linewidth=2, label=region.prompt[:60])
    if regions:
        drawn.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize=8)
    return fig


def attention_over_picture(picture: Tensor, regions: Sequence[HasPlace], maps: Tensor) -> Figure:
    """Draw, for each region, its outline and the map of attention to its words over the picture.

    Args:
        picture: [3,H,W] in 0…1.
        regions: The regions.
        maps: [regions,h,w], attention to each region's words.

    Raises:
        MoleShapeError: The picture has another shape, or the maps are not as many as the regions.
    """
    if picture.dim() != 3 or picture.shape[0] != 3 or maps.dim() != 3 or maps.shape[0] != len(regions):
        got = f"{tuple(picture.shape)}, {tuple(maps.shape)}"
        raise MoleShapeError(
            "attention_over_picture", expected=f"a picture [3,H,W] and maps [{len(regions)},h,w]", got=got
        )
    H, W = picture.shape[1:]
    wide = min(3.2 * W / H, 12 / max(len(regions), 1))
    fig = figure(wide * len(regions) + 0.9, wide * H / W + 0.5)
    grey = picture.detach().float().cpu().clamp(0, 1).mean(0).numpy()
    axes = fig.subplots(1, len(regions), squeeze=False)[0]
    high = max(float(maps.max()), 1e-6)
    for i, (axis, region) in enumerate(zip(axes, regions)):
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
        shown = axis.imshow(
            maps[i].float().numpy(),
            cmap="inferno",
            alpha=0.6,
            vmin=0,
            vmax=high,
            extent=(-0.5, W - 0.5, H - 0.5, -0.5),
        )
        axis.contour(
            region.cover(H, W).float().numpy(),
            levels=[0.5],
            colors=[COLOURS[i % len(COLOURS)]],
            linewidths=1.5,
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(region.prompt[:40], color=INK, fontsize=9)
    fig.colorbar(shown, ax=axes, label="attention to its words")
    return fig
