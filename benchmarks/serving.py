"""Serving: a batch whose samples each have their own adapter, against the same batch with one shared, and
against PEFT's mixed batch.

python benchmarks/serving.py                 CPU, two minutes on one core; writes
results/<machine>/<date>-serving.{json,md}
python benchmarks/serving.py --quick         one shape, writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import DTYPES
from benchmarks.machine import environment, results_folder
from benchmarks.timing import Budget, interleaved, ratio, spread
from mole_kernels import extension
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts, Gates
from mole_kernels.reference import gated_lora_ref

# T tokens of one picture, K, N: attention layers of the SD1.5 and SDXL UNets, from narrow and long to text
SHAPES = ((4096, 320, 320), (1024, 640, 640), (256, 1280, 1280), (77, 768, 320), (77, 2048, 1280))
POOL = 64
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Serving:
    """B samples of T tokens, each with its own adapter of rank r out of a pool of S, or all with one."""

    B: int
    T: int
    K: int
    N: int
    dtype: str
    r: int = 16
    S: int = POOL

    def __str__(self) -> str:
        return f"B{self.B}-{self.T}x{self.K}x{self.N}-{self.dtype}-r{self.r}"


@dataclass
class Batch:
    """The tensors of one case; sample b takes set own[b] of the pool."""

    x: Tensor
    base: nn.Linear
    pool: Experts
    shared: Experts

    @classmethod
    def make(cls, case: Serving, seed: int = 0) -> Batch:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(DTYPES[case.dtype])

        base = nn.Linear(case.K, case.N).to(DTYPES[case.dtype]).requires_grad_(False)
        down, up = (
            draw(case.S, case.r, case.K, scale=case.K**-0.5),
            draw(case.S, case.N, case.r, scale=case.r**-0.5),
        )
        own = torch.randperm(case.S, generator=g)[: case.B]
        one = Experts(down[:1].clone(), up[:1].clone(), torch.ones(1), (case.r,))
        return cls(draw(case.B, case.T, case.K), base, Experts(down, up, torch.ones(1), (case.r,), own), one)

    def truth(self, experts: Experts) -> Tensor:
        """y in float64."""
        wide = experts._replace(
            down=experts.down.double(), up=experts.up.double(), scale=experts.scale.double()
        )
        return gated_lora_ref(
            self.x.double(), self.base.weight.double(), self.base.bias.double(), wide, Gates()
        )[0]

    def ours(self, experts: Experts) -> Callable[[], Tensor]:
        return lambda: gated_lora_linear(self.x, self.base.weight, self.base.bias, experts)

    def peft(self) -> Callable[[], Tensor] | None:
        """PEFT's own mixed batch on the same factors; None where PEFT is not installed."""
        try:
            from peft.tuners.lora.config import LoraConfig
            from peft.tuners.lora.layer import Linear
        except ImportError:
            return None
        assert self.pool.assignment is not None
        sets, r = self.pool.assignment.tolist(), self.pool.ranks[0]
        config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=False)
        names = [f"set{s}" for s in sets]
        module = Linear(self.base, names[0], config=config, r=r, lora_alpha=r)
        for name in names[1:]:
            module.update_layer(name, r=r, lora_alpha=r, config=config)
        for name, s in zip(names, sets):
            module.lora_A[name].weight.data = self.pool.down[s].clone()
            module.lora_B[name].weight.data = self.pool.up[s].clone()
        module.requires_grad_(False).eval()
        return lambda: module(self.x, adapter_names=names)


def verified(case: Serving, batch: Batch) -> dict[str, Callable[[], object]]:
    """The methods by name, each checked against float64; a wrong one stops the run."""
    truth = {"shared": batch.truth(batch.shared), "own": batch.truth(batch.pool)}
    truth["peft"] = truth["own"]
    truth["base"] = truth["base again"] = nn.functional.linear(
        batch.x.double(), batch.base.weight.double(), batch.base.bias.double()
    )
    every = {"base": lambda: batch.base(batch.x), "base again": lambda: batch.base(batch.x)}
    runs = every | {"shared": batch.ours(batch.shared), "own": batch.ours(batch.pool), "peft": batch.peft()}
    for name, run in runs.items():
        if run is not None:
            wrong = ((run().double() - truth[name]).norm() / truth[name].norm()).item()
            if not wrong <= ALLOWED[case.dtype]:
                raise SystemExit(f"{case}: {name} is wrong: relative error {wrong:.2e}; nothing is timed")
    return {name: run for name, run in runs.items() if run is not None}


def measure(case: Serving, seconds: float) -> dict[str, Any]:
    """One row: µs of each method, own ÷ shared, and what own and PEFT cost over the base layer, all from the
    same rounds.
    """
    with torch.no_grad():
        runs = verified(case, Batch.make(case))
        budget = Budget(seconds)

        def elapsed(run: Callable[[], object]) -> float:
            begin = budget.clock()
            run()
            return budget.clock() - begin

        for run in runs.values():
            run()
        taken = interleaved(runs, budget, elapsed)

    def over(name: str) -> float:
        """Median over rounds of time above the base's, as a share of it."""
        return statistics.median(t / b - 1 for t, b in zip(taken[name], taken["base"]))

    row: dict[str, Any] = asdict(case) | {"id": str(case), "rounds": len(taken["base"])}
    row["us"] = {name: [round(t * 1e6, 1) for t in spread(mine)] for name, mine in taken.items()}
    row["aa"] = over("base again")
    row["own_to_shared"] = [round(v, 4) for v in ratio(taken["own"], taken["shared"])]
    row["over_base"] = {name: round(over(name), 4) for name in taken if name not in ("base", "base again")}
    return row


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a case."""
    software = f"torch {result['software']['torch']}, commit {result['commit']}"
    origin = f"{result['threads']} thread(s), {software}, {result['utc'][:10]}"
    lines = [
        "# Serving: each sample its own adapter",
        "",
        f"{result['host']}, {origin}.",
        f"A pool of {POOL} adapters of rank 16. *own*: each sample names another; *shared*: all take one.",
        "The ratio of the two is p50 with p20 and p80 over rounds. *over base*: time above the plain",
        "layer's, as a share of it; below 0 the adapted layer is the faster one.",
        "",
        "| case | own ÷ shared | own over base | PEFT's mixed batch over base | base again |",
        "|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        low, mid, high = row["own_to_shared"]
        over = {name: f"{100 * value:+.1f} %" for name, value in row["over_base"].items()}
        cells = (
            f"{mid:.3f} ({low:.3f} to {high:.3f})",
            over["own"],
            over.get("peft", "–"),
            f"{100 * row['aa']:+.1f} %",
        )
        lines.append(f"| {row['id']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape; writes nothing")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="wall time for each case (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    args = parser.parse_args()
    console = Console()
    if reason := extension.reason_against_library():
        console.print(f"nothing to measure: {reason}", style="red")
        return 2
    torch.set_num_threads(args.threads)
    shapes, batches = (SHAPES[2:3], (8,)) if args.quick else (SHAPES, (2, 8))
    result = environment(args.threads)
    result["cases"] = [
        measure(Serving(B, *shape, dtype), args.seconds)
        for dtype in ALLOWED
        for shape in shapes
        for B in batches
    ]
    text = table(result)
    console.print(Markdown(text))
    if not args.quick:
        folder = results_folder(result["host"], result["dirty"])
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{time.strftime('%Y-%m-%d', time.gmtime())}-serving"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
        console.print(f"written: {stem.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
