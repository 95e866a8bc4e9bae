"""How sure a difference between two sets of pictures is: paired bootstrap and win rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mole_kernels.errors import MoleValueError
from mole_kernels.metrics.result import Result


@dataclass(frozen=True)
class Comparison:
    """Set a against set b, picture by picture.

    Args:
        metric: What was measured.
        difference: Mean of a − b.
        low: Of its interval.
        high: Of its interval.
        wins: Share of pairs in which a is better; ties count half.
        pairs: How many.
        sure: Whether the interval leaves 0 out.
    """

    metric: str
    difference: float
    low: float
    high: float
    wins: float
    pairs: int

    @property
    def sure(self) -> bool:
        return self.low > 0 or self.high < 0


def compare(a: Result, b: Result, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Comparison:
    """Paired bootstrap of the mean difference, and how often a is better.

    Pairs are drawn with replacement `draws` times; the interval holds the middle `level` of the means.

    Args:
        a: One result, with a value for each picture.
        b: Another of the same metric and model, over pictures of the same prompts in the same order.
        level: Of the interval, in (0, 1).
        draws: Bootstrap samples.
        seed: Of the draws.

    Raises:
        MoleValueError: Results of unlike metrics or models, or that cannot be paired.
    """
    for what in ("metric", "model", "revision"):
        if getattr(a, what) != getattr(b, what):
            raise MoleValueError(
                f"compare: {what}", expected=f"one, as {getattr(a, what)!r}", got=repr(getattr(b, what))
            )
    if len(a.by_picture) != len(b.by_picture) or not a.by_picture:
        raise MoleValueError(
            f"compare: {a.metric}",
            expected="as many values on both sides, one a picture",
            got=f"{len(a.by_picture)} and {len(b.by_picture)}",
            hint="draw both sets for the same prompts; FID has no value for a picture",
        )
    if not 0 < level < 1 or draws < 1:
        raise MoleValueError("compare", expected="0 < level < 1 and draws >= 1", got=f"{level} and {draws}")
    first, second = (torch.tensor(result.by_picture, dtype=torch.float64) for result in (a, b))
    gap, n = first - second, len(first)
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat(
        [
            gap[torch.randint(n, (min(1000, draws - at), n), generator=generator)].mean(1)
            for at in range(0, draws, 1000)
        ]
    )
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means.quantile(edges).tolist()
    better = gap if a.better == "higher" else -gap
    wins = ((better > 0).double() + 0.5 * (better == 0).double()).mean()
    return Comparison(a.metric, float(gap.mean()), low, high, float(wins), n)
