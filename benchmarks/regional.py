"""Regional attention against plain cross-attention over one text, on the same queries: what regions cost.

python benchmarks/regional.py             paired, one thread of the CPU, or the GPU where torch sees one
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import device
from benchmarks.machine import commit, environment, processor, results_folder
from benchmarks.timing import Budget, interleaved, ratio, spread
from mole_kernels.attention.regional import regional_attention, regional_attention_ref
from mole_kernels.methods.mix_of_show.regions import Region, shares

# heads, width of a head, rows and columns of the grid: cross-attention of SD1.5 at 512² and of SDXL at 1024²,
# two samples (guidance)
SHAPES = {
    "sd15-64": (8, 40, 64, 64),
    "sd15-32": (8, 80, 32, 32),
    "sd15-16": (8, 160, 16, 16),
    "sdxl-64": (10, 64, 64, 64),
    "sdxl-32": (20, 64, 32, 32),
}
QUARTERS = [Region("x", box=(y, x, y + 0.5, x + 0.5)) for y in (0, 0.5) for x in (0, 0.5)]
OVERLAPPING = [
    Region("x", box=(0, 0, 0.6, 0.6)),
    Region("x", box=(0.2, 0.2, 0.8, 0.8)),
    Region("x", box=(0, 0.5, 1, 1)),
    Region("x", box=(0.5, 0, 0.9, 0.5)),
]
LAYOUTS = {"quarters": QUARTERS, "overlapping": OVERLAPPING}
B, L = 2, 77


def runs(
    shape: str, layout: str, kind: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], float]:
    """plain, plain again, regional; and the queries that the regions ask for in all, over the plain
    call's.
    """
    H, D, h, w = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, h * w, H, D, generator=g).to(kind, dtype).transpose(1, 2)
    k, v = (torch.randn(B, 5, L, H, D, generator=g).to(kind, dtype).transpose(2, 3) for _ in "kv")
    table = shares(LAYOUTS[layout], h, w).to(kind).expand(B, -1, -1)
    got = regional_attention(q, k, v, table).double().cpu()
    want = regional_attention_ref(*(t.double().cpu() for t in (q, k, v, table)))
    error = ((got - want).norm() / want.norm()).item()
    if error > (1e-5 if dtype == torch.float32 else 1e-2):
        raise SystemExit(f"{shape} {layout}: error {error:.1e}; nothing is timed")

    def plain() -> object:
        return F.scaled_dot_product_attention(q, k[:, 0], v[:, 0])

    return {
        "plain": plain,
        "plain again": plain,
        "regional": lambda: regional_attention(q, k, v, table),
    }, float((table[0] != 0).sum() / (h * w))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--write", action="store_true", help="results/<machine>/<date>-regional.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on = device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if on.kind == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for layout in LAYOUTS:
            methods, asked = runs(shape, layout, on.kind, dtype)
            with torch.no_grad():
                if on.kind == "cuda":
                    methods = {name: on.captured(run) for name, run in methods.items()}
                    taken = interleaved(methods, Budget(options.seconds), on.elapsed)
                else:
                    budget = Budget(options.seconds)

                    def elapsed(
                        run: Callable[[], object], clock: Callable[[], float] = budget.clock
                    ) -> float:
                        begin = clock()
                        run()
                        return (clock() - begin) * 1e6

                    for run in methods.values():
                        run()
                    taken = interleaved(methods, budget, elapsed)
            against, again = (
                ratio(taken["regional"], taken["plain"]),
                ratio(taken["plain again"], taken["plain"]),
            )
            us = {name: spread(values) for name, values in taken.items()}
            rows.append(
                {
                    "id": f"{shape}-{layout}",
                    "queries": asked,
                    "us": us,
                    "ratio": against,
                    "aa": again,
                    "dtype": str(dtype)[6:],
                }
            )
            print(
                f"{shape:8} {layout:12} queries asked {asked:.2f}  regional ÷ plain {against[1]:.2f}  (A/A {again[1]:.2f})",
                flush=True,
            )
    if options.write:
        folder = results_folder(processor(), commit()[1])
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{date.today()}-regional.json"
        out.write_text(json.dumps(environment(1) | {"cases": rows}, indent=1) + "\n")
        print(out)


if __name__ == "__main__":
    main()
