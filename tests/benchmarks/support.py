"""A results file of an imaginary run: the plan's own cases with the cost model's predictions for times.
Nothing in it was measured.
"""

from __future__ import annotations

from typing import Any

from benchmarks import machine
from benchmarks.cases import GATES, Case
from benchmarks.gpu import plan
from benchmarks.gpu.goals import goals
from benchmarks.gpu.layers import case_of, floor_us
from benchmarks.gpu.methods import problem_of
from mole_kernels.dispatch.choose import choose
from mole_kernels.dispatch.device import KNOWN

CEILINGS = {"bf16_tflops": 790.0, "copy_gb_s": 4300.0}
PEERS = {"lorafusion": 1.2, "peft": 1.6, "eager": 2.6, "plain again": 1.002}


def times(case: Case) -> dict[str, float]:
    """Invented: what the cost model predicts, and multiples of it for the peers."""
    choice = choose(problem_of(case, "cuda"), KNOWN["h200"])
    found = {"plain": choice.plain, "ours": choice.predicted}
    found |= {
        f"triton:{c.name}" if c.name != "stacked" else c.name: c.predicted
        for c in choice.considered
        if c.possible and c.predicted
    }
    return found | {name: choice.plain * by for name, by in PEERS.items()}


def row(case: Case, method: str, us: float, found: dict[str, float]) -> dict[str, Any]:
    base = method.startswith("plain")
    flops = case.base_flops if base else case.flops
    ratio = {
        "plain": us / found["plain"],
        "p20": us / found["plain"] * 0.99,
        "p80": us / found["plain"] * 1.01,
    }
    ratio |= {name: us / found[name] for name in ("eager", "stacked", "lorafusion") if name in found}
    return {
        "id": str(case),
        "op": "gated_lora_linear",
        "model": case.model,
        "counts": dict(case.counts),
        "dtype": case.dtype,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "B": case.B,
        "E": case.E,
        "ranks": [case.r] * case.E,
        "gate": GATES[case.gate],
        "mode": case.mode,
        "cache": "hot",
        "launch": "graph",
        "method": method,
        "flop_ratio": case.flop_ratio,
        "flops": flops,
        "bytes_min": case.base_bytes if base else case.bytes_min,
        "err": 0.002,
        "peak_mem": case.M * case.N * 2,
        "launches": 1,
        "us": {"p20": us * 0.99, "p50": us, "p80": us * 1.01},
        "rounds": 7,
        "ratio": ratio,
        "roofline": floor_us(case, CEILINGS, base) / us,
        "tflops": flops / us * 1e-6,
    }


def imaginary() -> dict[str, Any]:
    """A whole file: every forward case of the default plan."""
    cases = [case_of(item) for item in plan.measured("cuda", False, False) if item["kind"] == "layer"]
    rows = []
    for case in cases:
        if case.mode == "forward":
            found = times(case)
            rows += [row(case, method, us, found) for method, us in found.items()]
    result = machine.header() | {
        "suite": "gpu",
        "gpu": {
            "name": "IMAGINARY (predictions, not measurements) NVIDIA H200",
            "driver": "0",
            "sm": "9.0",
            "multiprocessors": 132,
            "clocks": {},
        },
        "ceilings": CEILINGS,
        "aa_spread": 0.002,
        "verified": False,
        "checks": {"passed": 0, "sanitizer": {}},
        "failures": [],
        "dropped": [],
        "models": [],
        "cases": rows,
    }
    return result | {"goals": goals(result)}
