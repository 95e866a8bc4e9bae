"""Paired, interleaved times on a machine that others use too.

Each round runs every method once, in alternating order (ABBA); a ratio is the median over rounds of one
method's time to the first's
in the same round. With one thread the clock is the thread's own CPU time, which does not count what other
processes take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Microseconds of one method and its ratios to the first method of the run: [p20, p50, p80]."""

    us: list[float]
    ratio: list[float]
    rounds: int


@dataclass
class Budget:
    """How long a set of methods may take: at least `least` rounds, at most `most`, in between until `seconds`
    of wall time are gone.
    """

    seconds: float = 4.0
    least: int = 12
    most: int = 60
    clock: Callable[[], float] = field(default_factory=lambda: clock())


def clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def spread(values: list[float]) -> list[float]:
    """p20, p50, p80"""
    if len(values) < 2:
        return values * 3
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [deciles[1], statistics.median(values), deciles[7]]


def interleaved(
    methods: dict[str, Callable[[], object]], budget: Budget, elapsed: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    """Samples of each method, one a round, the rounds in alternating order (ABBA); `elapsed` runs one and
    says how long it took.
    """
    taken: dict[str, list[float]] = {name: [] for name in methods}
    until, rounds = time.perf_counter() + budget.seconds, 0
    while rounds < budget.least or (rounds < budget.most and time.perf_counter() < until):
        for name in methods if rounds % 2 == 0 else reversed(methods):
            taken[name].append(elapsed(methods[name]))
        rounds += 1
    return taken


def ratio(mine: list[float], other: list[float]) -> list[float]:
    """p20, p50, p80 of the ratios of each round's two samples."""
    return spread([a / b for a, b in zip(mine, other)])


def paired(methods: dict[str, Callable[[], object]], budget: Budget) -> dict[str, Times]:
    """Times of all methods; the first is what the ratios refer to."""
    for run in methods.values():
        run()
        run()

    def elapsed(run: Callable[[], object]) -> float:
        begin = budget.clock()
        run()
        return budget.clock() - begin

    taken = interleaved(methods, budget, elapsed)
    first = next(iter(taken.values()))
    return {
        name: Times([t * 1e6 for t in spread(mine)], ratio(mine, first), len(mine))
        for name, mine in taken.items()
    }
