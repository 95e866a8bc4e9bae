"""How a file's alpha becomes the scale s of ΔW = s · up · down; four conventions, never guessed in
silence.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from mole_kernels.errors import MoleValueError
from mole_kernels.files.limits import finite

Convention = Literal["kohya", "peft", "mix_of_show", "rslora"]


def scale_of(convention: Convention, alpha: float | None, rank: int) -> float:
    """kohya, peft: alpha/R · rslora: alpha/√R · mix_of_show: alpha itself.

    A missing alpha means alpha = R for kohya and peft and alpha = √R for rslora, so scale 1; mix_of_show
    files never hold one: 1.
    """
    if convention not in get_args(Convention):
        raise MoleValueError(
            "scale_of",
            "unknown scale convention",
            expected=" | ".join(get_args(Convention)),
            got=repr(convention),
        )
    if rank < 1:
        raise MoleValueError("scale_of", expected="rank >= 1", got=rank)
    if alpha is None:
        return 1.0
    if not finite(alpha):
        raise MoleValueError("scale_of", expected="a finite alpha", got=alpha)
    if convention == "mix_of_show":
        return float(alpha)
    return alpha / (math.sqrt(rank) if convention == "rslora" else rank)


def alpha_of(convention: Convention, scale: float, rank: int) -> float:
    """The alpha that `scale_of` turns back into `scale`."""
    return scale * {"kohya": rank, "peft": rank, "rslora": math.sqrt(rank), "mix_of_show": 1}[convention]
