"""Which places of a picture a layer's tokens are."""

from __future__ import annotations

import math

from mole_kernels.errors import MoleShapeError


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The grid of a layer's tokens in a height x width picture: halvings of its latents, or the paper's
    √(H·W/tokens) where that fits.

    Raises MoleShapeError where no grid of that proportion has so many places.
    """
    step = math.sqrt(height * width / tokens)
    for h in {math.ceil(height / step), math.floor(height / step), round(height / step)}:
        if h and tokens % h == 0 and abs(tokens // h - width / step) <= 1:
            return h, tokens // h
    raise MoleShapeError(
        "regions", expected=f"a grid of {tokens} tokens in the proportion {height}:{width}", got="none"
    )
