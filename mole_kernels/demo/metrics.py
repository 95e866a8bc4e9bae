"""What several seeds found, as means and standard deviations: the contents of metrics.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from mole_kernels.demo.evaluate import REGIONS

READ = ("digits", "low", "high", "blank")
AUC = ("own_vs_rest", "own_vs_other")


def combine_seeds(seeds: Sequence[Mapping], shown: str) -> dict:
    """The results of the seeds (as `seed.run_seed` returns them) in one table.

    loss[variant][region]     mean, sd, seeds; but for the base also change_mean, change_sd in percent against
                              the same seed's base
    reading[variant][column]  mean, sd, seeds: share of slots read as the caption says
    gates[variant][row][col]  mean, sd, seeds: AUC
    paired_z[variant]         by seed, over scenes: (loss of variant - loss of `shown`) in standard errors;
                              above 2 `shown` is better
    """
    loss = _loss([seed["loss"] for seed in seeds])
    _name_best_constant(loss)
    return {
        "shown": shown,
        "seeds": [seed["seed"] for seed in seeds],
        "loss": loss,
        "paired_z": _paired([seed["scene_loss"] for seed in seeds], shown),
        "reading": {
            v: {c: spread([s["reading"][v][c] for s in seeds]) for c in READ} for v in seeds[0]["reading"]
        },
        "gates": {
            v: {row: {c: spread([s["gates"][v][row][c] for s in seeds]) for c in AUC} for row in table}
            for v, table in seeds[0]["gates"].items()
        },
        "constants": [seed["constants"] for seed in seeds],
        "seconds": [seed["seconds"] for seed in seeds],
    }


def spread(values: Sequence[float]) -> dict:
    """mean and sample standard deviation (0 for one value), and the values."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "seeds": list(values),
    }


def _loss(seeds: Sequence[Mapping]) -> dict:
    out: dict[str, dict] = {}
    for variant in seeds[0]:
        out[variant] = {}
        for region in REGIONS:
            row = spread([s[variant][region] for s in seeds])
            change = spread([100 * (s[variant][region] / s["base"][region] - 1) for s in seeds])
            if variant != "base":
                row |= {
                    "change_mean": change["mean"],
                    "change_sd": change["sd"],
                    "change_seeds": change["seeds"],
                }
            out[variant][region] = row
    return out


def _name_best_constant(loss: dict) -> None:
    """Say which of the tried constants is best overall, as a variant of its own."""
    tried = [name for name in loss if name.startswith("constant ")]
    if tried:
        best = min(tried, key=lambda name: loss[name]["all"]["mean"])
        loss["best constant"] = loss[best] | {"which": best}


def _paired(seeds: Sequence[Mapping[str, Sequence[float]]], shown: str) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for variant in seeds[0]:
        if variant == shown:
            continue
        out[variant] = []
        for losses in seeds:
            gaps = [a - b for a, b in zip(losses[variant], losses[shown], strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            out[variant].append(statistics.fmean(gaps) / error if error > 0 else 0.0)
    return out
