"""Where each prompt of a picture holds: the paper's string and a JSON form, read without ever running them,
and masks on any grid.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_kernels.attention.grids import token_grid
from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.files.limits import finite

__all__ = ["Box", "Region", "check_box", "parse_regions", "read_regions", "shares", "token_grid"]

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)
SEPARATOR = "-*-"


@dataclass(frozen=True)
class Region:
    """One region of a picture.

    Args:
        prompt: What the region shows.
        negative: What it does not show.
        box: (y0, x0, y1, x1) in fractions of the picture, y0 < y1 and x0 < x1.
        mask: [H,W] bool or 0…1, instead of a box; resized to a layer's grid by area and taken where it
            covers at least half a place.
        experts: Expert name -> adapter weight in this region, for the layers that see the picture;
            None: the pipeline's own.
    """

    prompt: str
    negative: str = ""
    box: Box = WHOLE
    mask: Tensor | None = None
    experts: Mapping[str, float] | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise MoleValueError(
                "region", expected="a prompt", got="none", hint="an empty region is one that is left out"
            )
        if self.mask is not None:
            if self.mask.dim() != 2 or not self.mask.numel():
                raise MoleShapeError("region: mask", expected="[H,W]", got=tuple(self.mask.shape))
            return
        check_box(self.box, "region")

    def cover(self, height: int, width: int) -> Tensor:
        """[height,width] bool: the places of a grid that the region covers.

        A box: rows ceil(y0·h) … floor(y1·h), columns likewise, as the paper's code has it; so a box thinner
        than a place covers none.
        """
        if self.mask is not None:
            return F.interpolate(self.mask.float()[None, None], (height, width), mode="area")[0, 0] >= 0.5
        y0, x0, y1, x1 = self.box
        out = torch.zeros(height, width, dtype=torch.bool)
        # 0.3·10 is 3.0000000000000004 or 2.9999999999999996 by chance of rounding; a place is whole or not
        out[_up(y0 * height) : _down(y1 * height), _up(x0 * width) : _down(x1 * width)] = True
        return out


def check_box(box: Box, where: str) -> None:
    """Raises MoleValueError for a box outside the picture, empty or upside down."""
    if len(box) != 4 or not all(map(finite, box)):
        raise MoleValueError(
            where, expected="a box of four finite numbers (y0, x0, y1, x1)", got=printable(str(box))
        )
    y0, x0, y1, x1 = box
    if min(box) < 0 or max(box) > 1:
        raise MoleValueError(where, expected="a box inside the picture, 0 … 1", got=box)
    if y0 >= y1 or x0 >= x1:
        raise MoleValueError(
            where, expected="y0 < y1 and x0 < x1", got=box, hint="the order is top, left, bottom, right"
        )


def _up(value: float) -> int:
    return math.ceil(value - 1e-9)


def _down(value: float) -> int:
    return math.floor(value + 1e-9)


def parse_regions(text: str, height: int, width: int) -> list[Region]:
    """The paper's string: `[prompt]-*-[negative]-*-[y0, x0, y1, x1]`, in pixels of a height x width picture,
    joined by `|`.

    As the paper's code reads it: square brackets in prompts are dropped and may be missing, an empty box `[]`
    is the whole picture, a box ends where the picture ends, and an empty part ends the list, as after a
    trailing bar. Nothing is evaluated.

    Args:
        text: The string.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.

    Returns:
        The regions, their boxes in fractions of the picture.

    Raises:
        MoleValueError: Names the position of what is wrong. A box that begins above or left of the picture is
            among it; the paper's code takes other places for it.
    """
    regions: list[Region] = []
    at = 0
    for part in text.split("|"):
        if not part.strip() and regions:
            break
        regions.append(_parse_one(part, at, height, width))
        at += len(part) + 1
    return regions


def _parse_one(part: str, at: int, height: int, width: int) -> Region:
    fields = part.split(SEPARATOR)
    if len(fields) != 3:
        raise _wrong(at, f"three fields joined by {SEPARATOR}", f"{len(fields)}")
    prompt, negative = (re.sub(r"[\[\]]", "", raw).strip() for raw in fields[:2])
    if not prompt:
        raise _wrong(at, "a prompt", "none")
    raw, place = fields[2], at + len(part) - len(fields[2])
    stripped = raw.strip()
    if not (stripped.startswith("[") and stripped.endswith("]") and len(stripped) >= 2):
        raise _wrong(place, "the box in [ ]", stripped or "nothing")
    box = _parse_box(stripped[1:-1].strip(), place + raw.index("[") + 1, height, width)
    return Region(prompt, negative, box)


def _parse_box(text: str, at: int, height: int, width: int) -> Box:
    if not text:
        return WHOLE
    values, start = [], at
    for piece in text.split(","):
        if not _NUMBER.fullmatch(piece.strip()):
            raise _wrong(at, "a number of pixels", piece.strip() or "nothing")
        # stripped: separators that `strip` takes for space `float` does not
        values.append(float(piece.strip()))
        at += len(piece) + 1
    if len(values) != 4:
        raise _wrong(start, "four numbers y0, x0, y1, x1", str(len(values)))
    y0, x0, y1, x1 = values
    box = (y0 / height, x0 / width, min(y1 / height, 1.0), min(x1 / width, 1.0))
    try:
        check_box(box, "")
    except MoleValueError as error:
        raise _wrong(
            start, f"a box inside the {height} x {width} picture with y0 < y1 and x0 < x1", str(values)
        ) from error
    return box


def _wrong(at: int, expected: str, got: str) -> MoleValueError:
    return MoleValueError(
        f"regions, character {at}",
        expected=expected,
        got=printable(got),
        hint="[prompt]-*-[negative]-*-[y0, x0, y1, x1]|… in pixels, [] for all",
    )


def read_regions(source: str | Sequence[Mapping[str, Any]]) -> list[Region]:
    """Regions of a picture from JSON or from the same as mappings.

    Args:
        source: [{"prompt": "…", "negative": "…", "box": [y0, x0, y1, x1], "experts": {"name": 0.8}}, …], as
            text
            or as mappings; boxes in fractions of the picture.

    Returns:
        The regions, in order.

    Raises:
        MoleTypeError, MoleValueError: The region and the field that are wrong.
    """
    if isinstance(source, str):
        try:
            source = json.loads(source)
        except json.JSONDecodeError as error:
            raise MoleValueError(f"regions, character {error.pos}", f"no JSON: {error.msg}") from error
        # a number of thousands of digits; lists in lists without an end
        except (ValueError, RecursionError) as error:
            raise MoleValueError("regions", f"no JSON that can be read: {printable(error)}") from error
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise MoleTypeError("regions", expected="a list of regions", got=type(source).__name__)
    return [_read_one(i, item) for i, item in enumerate(source)]


def _read_one(i: int, item: Any) -> Region:
    where = f"regions[{i}]"
    if not isinstance(item, Mapping):
        raise MoleTypeError(where, expected='an object with a "prompt"', got=type(item).__name__)
    known = {"prompt": str, "negative": str, "box": list, "experts": dict}
    for name, value in item.items():
        if name not in known:
            raise MoleValueError(where, expected=f"only {', '.join(known)}", got=printable(str(name)))
        if not isinstance(value, known[name]):
            raise MoleTypeError(
                f"{where}.{name}", expected=f"a {known[name].__name__}", got=type(value).__name__
            )
    if "prompt" not in item:
        raise MoleValueError(where, expected='a "prompt"', got="none")
    for name, weight in item.get("experts", {}).items():
        if not finite(weight):
            raise MoleValueError(
                f"{where}.experts.{printable(name)}", expected="a finite number", got=printable(str(weight))
            )
    box = tuple(item.get("box", WHOLE))
    check_box(box, where)  # type: ignore[arg-type]
    if not item["prompt"].strip():
        raise MoleValueError(where, expected="a prompt", got="none")
    return Region(item["prompt"], item.get("negative", ""), box, experts=item.get("experts"))  # type: ignore[arg-type]


def shares(regions: Sequence[Region], height: int, width: int, *, overlap: str = "mean") -> Tensor:
    """[1+regions, height·width] float32: what each place takes of the global prompt (row 0) and of each
    region; columns sum to 1.

    A place that no region covers takes the global prompt. Where regions overlap: "mean" of those that cover
    it (the paper's code),
    or "overwrite": the last one of the list (the paper's text).
    """
    if overlap not in ("mean", "overwrite"):
        raise MoleValueError("overlap", expected="'mean' or 'overwrite'", got=repr(overlap))
    covers = [region.cover(height, width).flatten() for region in regions]
    table = torch.stack([torch.ones(height * width, dtype=torch.bool), *covers]).float()
    if overlap == "mean":
        table[0] = (table[1:].sum(0) == 0).float()
        return table / table.sum(0)
    last = (table * torch.arange(1, len(table) + 1)[:, None]).argmax(0)
    return F.one_hot(last, len(table)).mT.float().contiguous()
