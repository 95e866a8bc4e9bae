"""A training step of one adapted layer on a CPU, forward and backward: ours, MoLE's eager layer, PEFT's with
the same two adapters.

python benchmarks/training.py              SD1.5's distinct shapes, both stages, fp32 and bf16: about ten
minutes on one core
python benchmarks/training.py --quick      three shapes; writes nothing unless --out is given

gates    MoLE's stage 3: gradients of the input and the gates, experts frozen. PEFT has no gates: its adapters
         are frozen, it owes dx alone
experts  experts and gates train; PEFT's adapters train
Every output, gradient of the input and gradient of a gate is compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import Case, shapes
from benchmarks.layer import Layer
from benchmarks.machine import environment, results_folder
from benchmarks.peers import Eager, peft_layer
from benchmarks.report import geometric
from benchmarks.timing import Budget, paired
from mole_kernels import extension
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.reference import gated_lora_ref

RESULTS = Path(__file__).with_name("results")
STAGES = ("gates", "experts")
NAMES = ("plain", "ours", "eager", "peft")
# relative error of output and dx that a method of this dtype may have
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}
# and that a gate's gradient may have: sums over all tokens of what was rounded before, with terms of either
# sign
ALLOWED_GATES = {"fp32": 1e-4, "bf16": 5e-2}
console = Console()


@dataclass
class Step:
    """run() -> (y, dx, gradients of what trains); leaves: what trains; frozen: the other tensors the layer
    owns.
    """

    module: nn.Module
    x: Tensor
    dy: Tensor
    leaves: list[Tensor]

    def run(self) -> tuple[Tensor, ...]:
        y = self.module(self.x)
        return (y.detach(), *torch.autograd.grad(y, [self.x, *self.leaves], self.dy))


def steps(case: Case, stage: str) -> tuple[dict[str, Step], dict[str, list[Tensor]]]:
    """(every method on one set of weights, {"gated" | "ungated" | "plain": float64 (y, dx)})."""
    with torch.no_grad():
        layer = Layer.make(case)
        dy = torch.randn(layer.x.shape[:2] + (case.N,), generator=torch.Generator().manual_seed(7)).to(
            layer.x.dtype
        )
        truth = truths(layer, dy)
        peft = peft_layer(layer)
    assert layer.gate is not None
    x, gates, eager = (
        layer.x.requires_grad_(True),
        list(layer.gate.requires_grad_(True).parameters()),
        Eager(layer),
    )
    ours = GatedLoRALinear.from_linear(layer.base, layer.experts, layer.gate)
    mine = list(gates)
    theirs, adapters = list(gates), []
    train = stage == "experts"
    eager.factors = [
        (down.detach().requires_grad_(train), up.detach().requires_grad_(train), s)
        for down, up, s in eager.factors
    ]
    if train:
        mine += [layer.experts.down.requires_grad_(True), layer.experts.up.requires_grad_(True)]
        theirs += [t for down, up, _ in eager.factors for t in (down, up)]
        adapters = (
            []
            if peft is None
            else [p.requires_grad_(True) for n, p in peft.named_parameters() if "lora_" in n]
        )
    every = {
        "plain": (layer.base, []),
        "ours": (ours, mine),
        "eager": (eager, theirs),
        "peft": (peft, adapters),
    }
    return {
        name: Step(module, x, dy, leaves) for name, (module, leaves) in every.items() if module is not None
    }, truth


def truths(layer: Layer, dy: Tensor) -> dict[str, list[Tensor]]:
    """Float64 (y, dx) of the plain layer and of the ungated sum; of the gated mixture also the gradients of
    its gate's parameters.
    """
    w, b = (None if t is None else t.double() for t in (layer.base.weight, layer.base.bias))
    gate, experts = (
        copy.deepcopy(layer.gate).double().requires_grad_(True),
        copy.deepcopy(layer.experts).double(),
    )  # type: ignore[union-attr]
    scaled = [
        (down.double(), up.double(), s) for down, up, s in (layer.factors(i) for i in range(layer.case.E))
    ]
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda x: nn.functional.linear(x, w, b),
        "ungated": lambda x: (
            nn.functional.linear(x, w, b) + sum(s * (x @ down.mT @ up.mT) for down, up, s in scaled)
        ),
        "gated": lambda x: gated_lora_ref(x, w, b, experts.operands(), gate.operands(experts))[0],
    }
    found = {}
    for name, formula in formulas.items():
        with torch.enable_grad():
            x = layer.x.detach().double().requires_grad_(True)
            y = formula(x)
            found[name] = [
                y.detach(),
                *torch.autograd.grad(y, [x, *(gate.parameters() if name == "gated" else ())], dy.double()),
            ]
    return found


def verify(case: Case, every: dict[str, Step], truth: dict[str, list[Tensor]]) -> dict[str, float]:
    """The larger relative error of y and dx; stops at a wrong one, and at a wrong gradient of a gate."""
    errors = {}
    for name, step in every.items():
        right = truth[{"plain": "plain", "peft": "ungated"}.get(name, "gated")]
        found = [((g.double() - r).norm() / r.norm()).item() for g, r in zip(step.run(), right)]
        errors[name] = max(found[:2])
        if not errors[name] <= ALLOWED[case.dtype] or not max(found) <= ALLOWED_GATES[case.dtype]:
            raise SystemExit(
                f"{case}: {name} is wrong: relative errors {', '.join(f'{e:.1e}' for e in found)}; nothing is timed"
            )
    return errors


def kept(step: Step) -> int:
    """Bytes that the forward keeps for the backward beside its input and its own parameters, each storage
    once.
    """
    own = {
        t.untyped_storage().data_ptr()
        for t in (step.x, *step.module.parameters(), *step.module.buffers(), *step.leaves)
    }
    own |= {
        t.untyped_storage().data_ptr()
        for down, up, _ in getattr(step.module, "factors", [])
        for t in (down, up)
    }
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step.module(step.x)
    total = sum(found.values())
    del y
    return total


def peak(step: Step) -> int:
    """The most bytes of torch's allocator that one step holds at once beyond what was there before; outputs
    included.
    """
    step.run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step.run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(case: Case, stage: str, seconds: float) -> list[dict[str, Any]]:
    """One row for each method; ratios are to the plain layer's forward and dx in the same round."""
    every, truth = steps(case, stage)
    errors = verify(case, every, truth)
    memory = {name: (kept(step), peak(step)) for name, step in every.items()}
    runs: dict[str, Callable[[], object]] = {"ours": every["ours"].run, "ours again": every["ours"].run}
    runs |= {name: every[name].run for name in NAMES if name in every and name != "ours"}
    times = paired(runs, Budget(seconds, least=9, most=40))
    return [
        {
            "id": f"{stage}-{case}",
            "op": "gated_lora_linear",
            "mode": "training",
            "stage": stage,
            "model": case.model,
            "dtype": case.dtype,
            "M": case.M,
            "K": case.K,
            "N": case.N,
            "E": case.E,
            "ranks": [case.r] * case.E,
            "gate": "local+global",
            "cache": "hot",
            "method": name,
            "rounds": t.rounds,
            "us": dict(zip(("p20", "p50", "p80"), (round(v, 2) for v in t.us))),
            "ratio": dict(zip(("p20", "ours", "p80"), (round(v, 4) for v in t.ratio))),
            "flop_ratio": round(case.flop_ratio, 4),
            "flops": case.flops,
            "bytes_min": case.bytes_min,
            "err": errors.get(name),
            "kept_bytes": memory.get(name, (None, None))[0],
            "peak_mem": memory.get(name, (None, None))[1],
        }
        for name, t in times.items()
    ]


def table(result: dict[str, Any]) -> str:
    """Geometric means over the shapes, then every shape."""
    lines = [
        "| stage | dtype | shapes | eager ÷ ours | PEFT ÷ ours | plain ÷ ours | worst eager ÷ ours | worst PEFT ÷ ours "
        "| kept: ours, eager, PEFT (MB) | peak: ours, eager, PEFT (MB) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in STAGES:
        for dtype in ("fp32", "bf16"):
            rows = {
                name: [
                    r
                    for r in result["cases"]
                    if (r["stage"], r["dtype"], r["method"]) == (stage, dtype, name)
                ]
                for name in NAMES
            }
            if not rows["ours"]:
                continue
            means = {
                name: geometric([r["ratio"]["ours"] for r in found]) for name, found in rows.items() if found
            }
            worst = {
                name: min((r["ratio"]["ours"] for r in rows[name]), default=float("nan"))
                for name in ("eager", "peft")
            }
            mb = {
                key: ", ".join(f"{sum(r[key] for r in rows[name]) / 1e6:.0f}" for name in NAMES[1:])
                for key in ("kept_bytes", "peak_mem")
            }
            lines.append(
                f"| {stage} | {dtype} | {len(rows['ours'])} | {means['eager']:.3f} | {means.get('peft', float('nan')):.3f} "
                f"| {means['plain']:.3f} | {worst['eager']:.3f} | {worst['peft']:.3f} | {mb['kept_bytes']} | {mb['peak_mem']} |"
            )
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    where = (
        f"{result['utc']}, commit {result['commit']}{' with changes' if result['dirty'] else ''}; "
        + ", ".join(f"{name} {version}" for name, version in result["software"].items())
    )
    parts = [
        f"# A training step · {result['host']}",
        f"{where}; {result['threads']} thread(s), clock: {result['clock']}. |A/A − 1|: largest {result['aa_spread']:.3f}.",
        "Medians of paired, interleaved rounds, the other's time ÷ ours in the same round: above 1 ours is faster. Means are geometric "
        f"over SD1.5's distinct shapes, M halved until the plain forward is below {result['gflop']} Gflop; E = 2, r = 64, local and "
        "global gates (PEFT: the same adapters without gates). Stage gates: input and gates get gradients, experts are frozen, and "
        "PEFT's adapters too; stage experts: experts (PEFT: adapters) train as well. Kept: what the forward saves beside its input and "
        "parameters, summed over the shapes; peak: torch's allocator during a step, outputs included, summed likewise.",
        table(result),
    ]
    for stage in STAGES:
        for dtype in ("fp32", "bf16"):
            found: dict[str, dict[str, dict[str, Any]]] = {}
            for r in result["cases"]:
                if (r["stage"], r["dtype"]) == (stage, dtype):
                    found.setdefault(r["id"], {})[r["method"]] = r
            if not found:
                continue
            parts += [f"## {stage}, {dtype}"]
            lines = [
                "| M × K × N | ours µs | eager | PEFT | plain | A/A | kept MB: ours, eager, PEFT |",
                "|---|---|---|---|---|---|---|",
            ]
            for by in found.values():
                r = by["ours"]
                ratio = {
                    name: f"{by[name]['ratio']['ours']:.3f}" if name in by else "–"
                    for name in ("eager", "peft", "plain", "ours again")
                }
                mb = ", ".join(f"{by[name]['kept_bytes'] / 1e6:.1f}" for name in NAMES[1:] if name in by)
                lines.append(
                    f"| {r['M']} × {r['K']} × {r['N']} | {r['us']['p50']:.0f} | {' | '.join(ratio.values())} | {mb} |"
                )
            parts += ["\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="three shapes; writes nothing unless --out is given"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="wall time for each case (default: %(default)s)"
    )
    parser.add_argument(
        "--gflop",
        type=float,
        default=1.7,
        help="halve the rows until the plain layer is below (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, help="one of them alone")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="one of them alone")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        help="the table of these JSONs together, beside the first; measure nothing",
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results (default: {RESULTS.name}/<machine>)"
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.report:
        every = [json.loads(path.read_text()) for path in args.report]
        write(args.report[0].with_suffix(""), merged(every))
        return 0
    if reason := extension.reason_against_library():
        console.print(f"nothing to measure: {reason}", style="red")
        return 2
    torch.set_num_threads(args.threads)
    layers = shapes(("SD1.5-UNet",), args.gflop)
    layers = layers[1:6:2] if args.quick else layers
    cases = [
        (replace(c, dtype=dtype, r=64, mode="training"), stage)
        for stage in ([args.stage] if args.stage else STAGES)
        for dtype in ([args.dtype] if args.dtype else ("fp32", "bf16"))
        for c in layers
    ]
    result: dict[str, Any] = environment(args.threads) | {"gflop": args.gflop}
    rows: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case, stage in cases:
            progress.update(task, description=f"{stage}, {case}")
            rows += measure(case, stage, args.seconds)
            progress.advance(task)
    result["aa_spread"] = max(abs(r["ratio"]["ours"] - 1) for r in rows if r["method"] == "ours again")
    result["cases"] = rows
    console.print(Markdown(table(result)))
    if not args.quick or args.out:
        folder = args.out or results_folder(result["host"], result["dirty"])
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{result['utc'][:10]}-training", result)
    return 0


def merged(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one machine and one commit, measured one after the other."""
    for key in ("host", "commit", "threads", "gflop"):
        if len({result[key] for result in every}) > 1:
            raise SystemExit(f"{key} differs: {', '.join(str(result[key]) for result in every)}")
    spread = max(result["aa_spread"] for result in every)
    return every[0] | {"aa_spread": spread, "cases": [row for result in every for row in result["cases"]]}


def write(stem: Path, result: dict[str, Any]) -> None:
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    console.print(f"written: {stem}.md")


if __name__ == "__main__":
    sys.exit(main())
