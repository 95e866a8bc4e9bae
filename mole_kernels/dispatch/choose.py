"""The choice: every candidate with its predicted or measured time, the fastest possible one, and why each
other one lost. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from mole_kernels.dispatch import cost, hopper
from mole_kernels.dispatch.device import Device
from mole_kernels.dispatch.tables import Table, TableRow
from mole_kernels.dispatch.work import Use, ours, work
from mole_kernels.kernels import sm90
from mole_kernels.kernels.triton.limits import LAUNCHES, reason_against_shapes
from mole_kernels.problem import Problem

# in the order of preference where times are equal; stacked (plain torch) is always possible, so no choice is
# slower than it
CANDIDATES = ("persistent", "recompute", "two_pass", "merge", "added", "stacked", "dense")
# the compiled Hopper kernels, beside those: only where the library was built with nvcc
HOPPER = tuple(f"cuda_{way}" for way in sm90.WAYS)
MEANING = {
    "cuda_cluster": "one launch: the CTAs of a cluster share out h and hand each other gated slices",
    "cuda_persistent": "one launch, compiled for Hopper: tiles of h first, then tiles of y",
    "cuda_recompute": "one launch, compiled for Hopper: h in the same products as y",
    "persistent": "one launch: tiles of h first, then tiles of y",
    "recompute": "one launch: every tile of y makes its own h",
    "two_pass": "shrink, then base and expand",
    "merge": "W with the experts merged in, then a library's product",
    "added": "shrink, base by a library, our expand on top",
    "stacked": "plain torch with stacked A and B",
    "dense": "every ΔW made, then x times W and each of them, gated per token",
}


@dataclass(frozen=True)
class Candidate:
    """One way to compute the call.

    predicted, measured  microseconds; None where it cannot be, where it was not measured
    launches             in one call
    lost                 why it was not taken, None for the one that was
    possible             it could have been taken
    """

    name: str
    predicted: float | None
    measured: float | None
    launches: int
    lost: str | None
    possible: bool


@dataclass(frozen=True)
class Choice:
    """What is taken, and all that was considered.

    source             "model" or "table"
    plain              microseconds of the layer without experts by that source
    bucket             the row of the table that spoke for the call
    """

    name: str
    source: str
    plain: float
    predicted: float
    measured: float | None
    considered: tuple[Candidate, ...]
    bucket: TableRow | None = None

    def of(self, name: str) -> Candidate:
        return next(c for c in self.considered if c.name == name)


def candidates_of(device: Device) -> tuple[str, ...]:
    """All that could run on `device`, with every part of this package built."""
    return CANDIDATES + HOPPER if device.capability == (9, 0) else CANDIDATES


def choose(
    problem: Problem,
    device: Device,
    table: Table | None = None,
    use: Use = Use(),  # noqa: B008
    names: tuple[str, ...] = CANDIDATES,
) -> Choice:
    """The fastest possible of `names`: by the table's nearest row, else by the model. Never slower than
    stacked by the same source.

    A candidate that the row did not measure cannot win there: measured and predicted times are not compared
    with each other.
    """
    predicted = {name: _predict(name, problem, device, use) for name in (*names, "plain")}
    refused = {
        name: reason for name in names if (reason := reason_against_candidate(name, problem, use)) is not None
    }
    refused |= {
        name: "no tile of it fits"
        for name in names
        if name in HOPPER and name not in refused and predicted[name] == inf
    }
    row = table.nearest(problem, use) if table is not None else None
    times = predicted if row is None else row.us
    running = {name: times[name] for name in names if name not in refused and name in times}
    best = min(running, key=lambda name: running[name])
    candidates = []
    for name in names:
        lost = refused.get(name)
        if lost is None and name not in running:
            lost = "not measured near this shape"
        elif lost is None and name != best:
            why = _why(name, problem, device, use, predicted) if row is None else "measured"
            lost = f"{_slower(running[name], running[best])}: {why}"
        measured = row.us.get(name) if row is not None else None
        finite = predicted[name] if predicted[name] < inf else None
        candidates.append(
            Candidate(name, finite, measured, launches(name, problem, use), lost, name not in refused)
        )
    measured = row.us[best] if row is not None else None
    return Choice(
        best,
        "model" if row is None else "table",
        times["plain"],
        predicted[best],
        measured,
        tuple(candidates),
        row,
    )


def _predict(name: str, problem: Problem, device: Device, use: Use) -> float:
    if name not in HOPPER:
        return cost.predict(name, problem, device, use)
    if reason_against_candidate(name, problem, use):
        return inf
    w = work(problem, device, use)
    first = hopper.predict_us(name.removeprefix("cuda_"), w, problem.token_gate, use.backward)
    # the sums over tokens are Triton's second launch
    return first + cost.GAP + cost.sums(w) if use.backward else first


def reason_against_candidate(name: str, problem: Problem, use: Use) -> str | None:
    """Why a candidate cannot compute the call, or None."""
    if name in HOPPER:
        if name == "cuda_recompute" and problem.sample_gate and not use.backward:
            return "the sample gate needs every token of a sample before the first output"
        return sm90.reason_against_problem(problem, use.backward)
    if name == "stacked":
        return None
    mask = problem.given_gate and use.by_token
    return reason_against_shapes(
        name,
        problem.R,
        token=problem.token_gate,
        sample=problem.sample_gate,
        mask=mask,
        save=use.save,
        backward=use.backward,
        own=problem.S > 1 or problem.assigned,
    )


def launches(name: str, problem: Problem, use: Use) -> int:
    """Launches of one call, torch's included; of a backward, with the sums over tokens."""
    if name in HOPPER:
        return 1 + use.backward
    if name == "stacked":
        return cost.small_launches(problem, use) + (5 if use.backward else 3)
    return LAUNCHES[name] + use.backward


def _slower(time: float, best: float) -> str:
    percent = (time / best - 1) * 100
    return f"{percent:.0f} % slower" if percent >= 1 else "less than 1 % slower"


def _why(name: str, problem: Problem, device: Device, use: Use, predicted: dict[str, float]) -> str:
    """What a candidate spends most of its extra time on, by the model."""
    if name in HOPPER:
        return {
            "cuda_cluster": "a cluster's CTAs wait for each other's part of h",
            "cuda_persistent": "tiles of y wait for tiles of h in the first wave",
            "cuda_recompute": "h is made again for every tile's columns of y",
        }[name]
    w, loop = work(problem, device, use), ours(problem, device, use, name)
    if name in ("persistent", "two_pass", "recompute"):
        base, library = cost.product(w, loop, w.K, w.N), cost.plain(w)
        if base - library > 0.5 * (predicted[name] - library):
            rows, columns = loop.tiles[0]
            return (
                f"our {rows}×{columns} tiles alone take {base:.1f} µs for the base, a library {library:.1f}"
            )
    if name == "recompute":
        return f"h is made again for every {loop.tiles[0][1]} columns of y"
    if name == "merge":
        return "W is read and written once more" + (f" for each of {w.many} samples" if w.many > 1 else "")
    if name == "stacked":
        return f"{launches(name, problem, use)} launches, y read and written once more"
    return {
        "persistent": "tiles of y wait for tiles of h in the first wave",
        "two_pass": "a second launch, and x is read again for h",
        "added": "three launches, y read and written once more",
        "dense": "each ΔW is made, and x multiplied by it"
        if problem.E == 1
        else f"each ΔW is made, and x multiplied by all {problem.E}",
    }[name]
