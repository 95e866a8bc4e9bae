"""Times of several methods on one device: captured, warmed up, interleaved; microseconds of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.device import Device, Run
from benchmarks.timing import Budget, interleaved, ratio, spread

WARM = 0.2
LEAST, MOST = 7, 41
# a sample should last this long, or an event's own resolution shows
SAMPLE_US, MOST_CALLS = 200.0, 20


@dataclass(frozen=True)
class Timed:
    """us: p20, p50, p80; samples of each round, for ratios."""

    us: list[float]
    samples: list[float]

    def to(self, other: Timed) -> list[float]:
        """p20, p50, p80 of the ratios of paired rounds."""
        return ratio(self.samples, other.samples)


def calls(floor_us: float) -> int:
    """How many calls one sample holds, from the least time that one can take."""
    return max(1, min(MOST_CALLS, round(SAMPLE_US / max(floor_us, 1.0))))


def repeated(run: Run, times: int) -> Run:
    def several() -> None:
        for _ in range(times):
            run()

    return several


def warm(device: Device, runs: dict[str, Run], seconds: float = WARM) -> None:
    """At least `seconds` of all of them: clocks and caches as under load."""
    until = time.perf_counter() + seconds
    while True:
        for run in runs.values():
            run()
        device.sync()
        if time.perf_counter() > until:
            return


def measured(device: Device, runs: dict[str, Run], each: int, seconds: float) -> dict[str, Timed]:
    """Times of one call, where a run makes `each`."""
    warm(device, runs, WARM if device.kind == "cuda" else 0.0)
    taken = interleaved(runs, Budget(seconds, LEAST, MOST), device.elapsed)
    per_call = {name: [t / each for t in times] for name, times in taken.items()}
    return {name: Timed(spread(times), times) for name, times in per_call.items()}


def guarded(names: dict[str, Run], prepare: Callable[[str, Run], Run | None]) -> dict[str, Run]:
    """`prepare` of each; those that gave none are left out."""
    found = {name: prepare(name, run) for name, run in names.items()}
    return {name: run for name, run in found.items() if run is not None}
