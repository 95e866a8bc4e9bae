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
    """The scale s of ΔW = s · B · A: alpha/R (kohya, peft), alpha/√R (rslora), alpha itself (mix_of_show).

    Args:
        convention: Whose rule.
        alpha: None means scale 1: alpha = R for kohya and peft, alpha = √R for rslora; Mix-of-Show's files
            hold none.
        rank: R.

    Raises:
        MoleValueError: An unknown convention, a rank below 1, an alpha that is not finite.
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
    """The alpha that `scale_of` turns back into `scale`.

    Args:
        convention: Whose rule.
        scale: The scale.
        rank: R.
    """
    return scale * {"kohya": rank, "peft": rank, "rslora": math.sqrt(rank), "mix_of_show": 1}[convention]
