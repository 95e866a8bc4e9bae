"""A transformer block of SDXL with experts, its projections grouped and its text's keys and values kept,
against the stock block.

python benchmarks/grouping.py             paired, one thread of the CPU
python benchmarks/grouping.py --predict   what the cost model says of an H200; nothing is run
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
from torch import Tensor, nn
from torch.nn import functional as F

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mole_kernels as mk
from benchmarks.machine import commit, environment, processor, results_folder
from benchmarks.timing import Budget, interleaved, ratio, spread
from mole_kernels.dispatch.choose import candidates_of, choose
from mole_kernels.dispatch.cost import GAP
from mole_kernels.dispatch.device import KNOWN
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.modules.scan import scan, sizes
from mole_kernels.problem import Problem

TEXT, WORDS = 2048, 77
# width and tokens of SDXL's two kinds of blocks, for pictures of 1024² and 512²
BLOCKS = {
    "sdxl-1280-at-1024": (1280, 1024),
    "sdxl-640-at-512": (640, 1024),
    "sdxl-1280-at-512": (1280, 256),
    "sdxl-640-at-1024": (640, 4096),
}


def block(width: int, dtype: torch.dtype) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    return BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=TEXT).eval().to(dtype)


def expert(model: nn.Module, rank: int, seed: int, equal: bool) -> Expert:
    """Factors for every linear layer; with `equal`, projections of one tensor have one A, as fused files give
    them.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, downs = {}, {}
    for path, layer in scan(model).layers.items():
        N, K = sizes(layer)
        down = torch.randn(rank, K, generator=generator) / K**0.5
        if equal and path.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
            down = downs.setdefault((path.rpartition(".")[0], K), down)
        layers[path] = LowRank(down, torch.randn(N, rank, generator=generator) * 0.1, 1.0)
    return Expert(layers)


# name -> ranks of its experts, gates, equal A, the arguments of patch
METHODS: dict[str, tuple[tuple[int, ...], str | None, bool, dict[str, bool]]] = {
    "adapted": ((16,), None, False, {}),
    "cached": ((16,), None, False, {"cache_text": True}),
    "grouped and cached": ((16,), None, False, {"cache_text": True, "group": True}),
    "grouped and cached, equal A": ((16,), None, True, {"cache_text": True, "group": True}),
    "MoLE of two, grouped and cached": ((8, 8), "mole", False, {"cache_text": True, "group": True}),
}


def runs(name: str, dtype: torch.dtype, batch: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    """One step of the stock block, the same again, and of each method; what the groups did in it."""
    width, tokens = BLOCKS[name]
    generator = torch.Generator().manual_seed(1)
    x, text = (
        torch.randn(batch, *shape, generator=generator).to(dtype)
        for shape in ((tokens, width), (WORDS, TEXT))
    )

    def step(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return model(x, encoder_hidden_states=text)

        return run

    stock = block(width, dtype)
    methods: dict[str, Callable[[], Tensor]] = {"stock": step(stock), "stock again": step(stock)}
    reports = {}
    for method, (ranks, gates, equal, options) in METHODS.items():
        model = block(width, dtype)
        experts = {str(i): expert(model, rank, i, equal) for i, rank in enumerate(ranks)}
        torch.manual_seed(2)
        with mk.patch(model, experts, gates) as handle:
            want = step(model)()
        torch.manual_seed(2)
        handle = mk.patch(model, experts, gates, **options)
        methods[method] = step(model)
        # the first fills the cache; every later step is one that is timed
        error = max(((methods[method]() - want).norm() / want.norm()).item() for _ in range(2))
        if error > (1e-5 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"{name} {method}: error {error:.1e}; nothing is timed")
        reports[method] = {
            key: value
            for key, value in handle.groups.report().items()
            if key in ("computed", "shared", "apart")
        }
    return methods, reports


def geglu(name: str, dtype: torch.dtype, batch: int) -> dict[str, Callable[[], Tensor]]:
    """GEGLU's product, and what comes after it: the part that an activation in the epilogue could save at
    most.
    """
    width, tokens = BLOCKS[name]
    x, weight = torch.randn(batch, tokens, width).to(dtype), torch.randn(8 * width, width).to(dtype)
    y = F.linear(x, weight)

    def activation() -> Tensor:
        value, gate = y.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return {"product": lambda: F.linear(x, weight), "activation": activation}


def measured(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in BLOCKS:
        for dtype in (torch.float32, torch.bfloat16):
            budget = Budget(options.seconds, options.rounds, 2 * options.rounds)

            def elapsed(run: Callable[[], object], clock: Callable[[], float] = budget.clock) -> float:
                begin = clock()
                run()
                return (clock() - begin) * 1e6

            methods, reports = runs(name, dtype, options.batch)
            taken = interleaved(methods, budget, elapsed)  # type: ignore[arg-type]
            ratios = {method: ratio(times, taken["stock"]) for method, times in taken.items()}
            parts = {
                key: spread(v)
                for key, v in interleaved(geglu(name, dtype, options.batch), budget, elapsed).items()
            }  # type: ignore[arg-type]
            kind = str(dtype)[6:]
            us = {method: spread(times) for method, times in taken.items()}
            rows.append(
                {"id": f"{name}-{kind}", "us": us, "ratio": ratios, "groups": reports, "geglu": parts}
            )
            print(f"{name} {kind}  stock {us['stock'][1] / 1e3:.0f} ms", flush=True)
            for method, r in ratios.items():
                apart = reports.get(method, {}).get("apart", "")
                print(f"    {method:34} p20 {r[0]:.3f}  p50 {r[1]:.3f}  p80 {r[2]:.3f}  {apart}", flush=True)
            print(
                f"    GEGLU: activation ÷ product {parts['activation'][1] / parts['product'][1]:.3f}",
                flush=True,
            )
            if options.write:
                write(rows, options.batch)


def write(rows: list[dict[str, Any]], batch: int) -> None:
    """What is there so far."""
    folder = results_folder(processor(), commit()[1])
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{date.today()}-grouping.json"
    out.write_text(json.dumps(environment(1) | {"batch": batch, "cases": rows}, indent=1) + "\n")


def time(M: int, K: int, N: int, ranks: tuple[int, ...]) -> tuple[float, float]:
    """(with experts, without) in µs, predicted for an H200, bfloat16, the compiled kernels among the
    candidates.
    """
    device = KNOWN["h200"]
    choice = choose(
        Problem(1, M, K, N, ranks or (16,), 1, torch.bfloat16, "cuda"), device, names=candidates_of(device)
    )
    best = choice.of(choice.name).predicted
    assert best is not None
    return (best if ranks else choice.plain) + GAP, choice.plain + GAP


def predicted(batch: int) -> None:
    """The block's linear layers, stock = 1: its attentions and norms, which nothing here changes, are left
    out.
    """
    print(
        "| block | rank | adapted | grouped | grouped, equal A | cached | grouped and cached "
        "| grouped and cached, equal A |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (C, tokens) in BLOCKS.items():
        M, words = batch * tokens, batch * WORDS
        for r in (16, 64):
            rest = [(M, C, C), (M, C, C), (M, C, C), (M, C, 8 * C), (M, 4 * C, C)]
            three, text = [(M, C, C)] * 3, [(words, TEXT, C)] * 2
            stock = sum(time(*shape, ())[1] for shape in rest + three + text)
            others = sum(time(*shape, (r,))[0] for shape in rest)
            alone, texts = (sum(time(*shape, (r,))[0] for shape in shapes) for shapes in (three, text))
            joint, joint_text = time(M, C, 3 * C, (r,) * 3)[0], time(words, TEXT, 2 * C, (r,) * 2)[0]
            equal, equal_text = time(M, C, 3 * C, (r,))[0], time(words, TEXT, 2 * C, (r,))[0]
            sums = (alone + texts, joint + joint_text, equal + equal_text, alone, joint, equal)
            print(f"| {name} | {r} | " + " | ".join(f"{(others + s) / stock:.3f}" for s in sums) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--rounds", type=int, default=8, help="at least; at most twice as many, while the seconds last"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each case")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--predict",
        action="store_true",
        help="the cost model's answer, for guidance by one call of two samples",
    )
    parser.add_argument("--write", action="store_true", help="results/<machine>/<date>-grouping.json")
    options = parser.parse_args()
    predicted(2) if options.predict else measured(options)


if __name__ == "__main__":
    main()
