"""Gradient fusion of a Stable Diffusion 1.5: every attention layer of UNet and text encoder, in closed form
and by LBFGS.

python -m benchmarks.fusion                     all 176 layers, LBFGS on three of them
python -m benchmarks.fusion --concepts 14 --rows 4096 --lbfgs none
python -m benchmarks.fusion --part 0.1          every tenth layer

Activations are random. Seconds are of processor time, which a busy machine spoils least. The sums are timed
by themselves: they are made
while the model samples. LBFGS minimises the same objective from the same sums, which costs it a fraction of
what it costs from activations,
as the paper's code has it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_kernels.experts.fuse import Sums, fuse_by_lbfgs, fuse_layer, objective
from mole_kernels.experts.lowrank import LowRank

TEXT = 768
# channels -> number of transformer blocks in the UNet
BLOCKS = {320: 5, 640: 5, 1280: 6}
RANK = 4


def sd15_layers() -> list[tuple[str, int, int]]:
    """(kind, N, K) of the 48 + 128 attention linears."""
    layers = [("text encoder", TEXT, TEXT)] * 48
    for channels, blocks in BLOCKS.items():
        layers += [("unet", channels, channels)] * (6 * blocks) + [("cross-attention", channels, TEXT)] * (
            2 * blocks
        )
    return layers


def problem(
    kind: str, N: int, K: int, concepts: int, rows: int, seed: int, inputs: int = 0
) -> tuple[dict[str, LowRank], Sums, float]:
    """Random experts and inputs of one layer, and the seconds that its sums took; K and V see six rows a
    concept. The same experts have other inputs under another number of `inputs`.
    """
    g = torch.Generator().manual_seed(seed)
    factors = {
        f"c{i}": LowRank(
            torch.randn(RANK, K, generator=g) / K**0.5, torch.randn(N, RANK, generator=g) / RANK**0.5
        )
        for i in range(concepts)
    }
    # directions of unlike strength, as activations have them
    strength = torch.logspace(0, -2, K)
    g = torch.Generator().manual_seed(1000 * (inputs + 1) + seed)
    seen = {
        name: torch.randn(6 if kind == "cross-attention" else rows, K, generator=g) * strength
        for name in factors
    }
    began, sums = time.process_time(), Sums.of(K)
    for name, x in seen.items():
        sums.add(name, factors[name], x)
    return factors, sums, time.process_time() - began


def run(concepts: int, rows: int, part: float) -> Iterator[dict[str, Any]]:
    """One row for each kind and size of layer."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for number, (kind, N, K) in enumerate(sd15_layers()):
        if int(number * part) == int((number - 1) * part) and number:
            continue
        factors, sums, summing = problem(kind, N, K, concepts, rows, number)
        began = time.process_time()
        solved = fuse_layer(factors, sums)
        seconds = time.process_time() - began
        row = found.setdefault(
            (kind, N, K),
            {"kind": kind, "N": N, "K": K, "layers": 0, "sums_s": 0.0, "solve_s": 0.0, "ratio": 0.0},
        )
        row["layers"] += 1
        row["sums_s"] += summing
        row["solve_s"] += seconds
        row["ratio"] = max(row["ratio"], solved.fused / solved.by_weights)
    yield from found.values()


def against_lbfgs(kind: str, N: int, K: int, concepts: int, rows: int, steps: int) -> dict[str, Any]:
    """Both ways on the same layer: seconds, objectives, and how many times faster the closed form is."""
    factors, sums, _ = problem(kind, N, K, concepts, rows, 0)
    others = problem(kind, N, K, concepts, rows, 0, inputs=1)[1]
    # what both load at their first call is no part of either
    fuse_layer(factors, sums)
    fuse_by_lbfgs(factors, sums, dict.fromkeys(factors, 1.0), 1)
    began = time.process_time()
    solved = fuse_layer(factors, sums)
    closed = time.process_time() - began
    began = time.process_time()
    fuse_layer(factors, sums, choose=others)
    choosing = time.process_time() - began
    began = time.process_time()
    slow: Tensor = fuse_by_lbfgs(factors, sums, dict.fromkeys(factors, 1.0), steps)
    seconds = time.process_time() - began
    # ΔW as one expert: identity times itself
    reached = objective(
        factors, sums, dict.fromkeys(factors, 1.0), LowRank(slow.double(), torch.eye(N, dtype=torch.float64))
    )
    return {
        "kind": kind,
        "N": N,
        "K": K,
        "closed_s": closed,
        "choosing_s": choosing,
        "lbfgs_s": seconds,
        "times": seconds / closed,
        "closed": solved.fused / solved.base,
        "lbfgs": reached / solved.base,
        "by_weights": solved.by_weights / solved.base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, default=2)
    parser.add_argument(
        "--rows", type=int, default=2048, help="inputs of a concept on a layer (default: %(default)s)"
    )
    parser.add_argument("--part", type=float, default=1.0, help="of the layers, in (0, 1]")
    parser.add_argument(
        "--lbfgs", default="unet:320:320,cross-attention:320:768,unet:640:640", help="kind:N:K, …; or none"
    )
    parser.add_argument("--steps", type=int, default=500, help="of LBFGS (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    found = list(run(args.concepts, args.rows, args.part))
    print(f"{'kind':16} {'N':>5} {'K':>5} {'layers':>6} {'sums, s':>8} {'solve, s':>8} {'fused/weights':>13}")
    for row in found:
        print(
            f"{row['kind']:16} {row['N']:5} {row['K']:5} {row['layers']:6} {row['sums_s']:8.2f} {row['solve_s']:8.2f} {row['ratio']:13.3g}"
        )
    layers, sums, solve = (sum(row[key] for row in found) for key in ("layers", "sums_s", "solve_s"))
    print(f"{layers} layers, {torch.get_num_threads()} threads: sums {sums:.1f} s, solve {solve:.1f} s")
    compared = []
    for word in [] if args.lbfgs == "none" else args.lbfgs.split(","):
        kind, N, K = word.split(":")
        row = against_lbfgs(kind, int(N), int(K), args.concepts, args.rows, args.steps)
        compared.append(row)
        print(
            f"{kind} {N}x{K}: closed {row['closed_s']:.3f} s to {row['closed']:.3g} of the base's objective, with choice of the ridge {row['choosing_s']:.3f} s, {args.steps} steps of LBFGS "
            f"{row['lbfgs_s']:.1f} s to {row['lbfgs']:.3g} (weight fusion {row['by_weights']:.3g}): {row['times']:.0f} x",
            flush=True,
        )
    if args.json:
        args.json.write_text(
            json.dumps(
                {"settings": vars(args) | {"json": None}, "layers": found, "lbfgs": compared}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
