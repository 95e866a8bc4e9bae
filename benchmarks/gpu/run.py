"""The steps of `make gpu`, each within its share of the time: build, verify and warm, measure, conclude."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine
from benchmarks.device import Device, device
from benchmarks.gpu import build, plan, pool, sanitize, verify
from benchmarks.gpu.context import Context, Item
from benchmarks.gpu.goals import goals
from benchmarks.gpu.pool import Job, Results
from benchmarks.timing import spread
from mole_kernels import extension

# each step may go on until this part of the whole time is gone
BUILT, VERIFIED, MEASURED = 0.18, 0.58, 0.96
# seconds without a word after which a process is stopped: one check (kernels compiled included), one measured
# case
CHECK, CASE = 60.0, 45.0
PEERS = ("plain", "plain again", "stacked", "eager", "peft", "compiled", "lorafusion", "merged")
# of a step that is optional
SANITIZED = 100.0


@dataclass
class Run:
    """When it began, what may be used, and what came out."""

    args: argparse.Namespace
    device: Device
    begin: float = field(default_factory=time.monotonic)
    checked: Results = field(default_factory=Results)
    measured: Results = field(default_factory=Results)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)

    def until(self, part: float) -> float:
        return self.begin + part * self.args.seconds

    def job(self, limit: float, **named: Any) -> Job:
        return Job(self.args.device, limit, self.args.peers, **named)

    def processes(self) -> int:
        return self.args.processes or max(1, min(12, (os.cpu_count() or 2) - 2))

    def ended(self, step: str) -> None:
        self.seconds[step] = round(time.monotonic() - self.begin - sum(self.seconds.values()), 1)
        say(f"{step}: {self.seconds[step]:.0f} s")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The result, and the exit code."""
    r = Run(args, device(args.device))
    clocks = {"before": r.device.clocks()}
    if not args.no_build and args.device == "cuda":
        r.facts["build"] = build.build(r.until(BUILT) - time.monotonic(), gpu=True)
        say(f"extension: {r.facts['build']}")
        r.ended("build")
    Context.make(args.device, args.peers)
    items = plan.chosen(plan.measured(args.device, args.quick, args.full), args.only)
    verify_and_warm(r, items)
    r.ended("verify")
    measure(r, items, clocks)
    r.ended("measure")
    clocks["after"] = r.device.clocks()
    result = conclude(r, clocks)
    return result, code(result)


def verify_and_warm(r: Run, items: list[Item]) -> None:
    """All checks on many processes at a time, compute-sanitizer beside them, and each measured case once:
    nothing compiles later.
    """
    until = r.until(VERIFIED)
    checks = [] if r.args.no_verify else verify.unique(verify.items(r.args.device, r.args.quick))
    tools = (
        [c for tool in sanitize.TOOLS if (c := sanitize.start(tool, sanitize.shapes(checks)))]
        if r.args.device == "cuda"
        else []
    )
    r.required = {i["id"] for i in checks if not i.get("extra")}
    # the most important checks, the warming, then the rest: a kernel that compiles while it is timed costs a
    # case
    first, rest = checks[: len(checks) // 3], checks[len(checks) // 3 :]
    warm = plan.warmed(items) if r.args.device == "cuda" else []
    order = [*first, *warm, *rest]
    r.checked = pool.run(order, r.job(CHECK), r.processes(), until, progress("verified", len(order)))
    left = max(1.0, min(SANITIZED, until + 20 - time.monotonic()))
    out, r.facts["sanitizer"] = sanitize.outcome(tools, left)
    if r.args.device == "cuda" and not r.args.no_verify:
        r.checked.outcomes["compute-sanitizer"] = out.plain()
    warmed = {i["id"] for i in warm}
    # what warming alone could not do is measured, or fails, later
    r.checked.dropped = [d for d in r.checked.dropped if d["id"] not in warmed]
    for name in warmed & set(r.checked.outcomes):
        del r.checked.outcomes[name]


def measure(r: Run, items: list[Item], clocks: dict[str, Any]) -> None:
    """One process at a time, so that nothing else runs on the device; ceilings first, for all that follows
    refers to them.
    """
    until = r.until(MEASURED)
    found = pool.run([{"id": "ceilings", "kind": "ceilings"}], r.job(CASE), 1, until)
    ceilings = next((row["ceilings"] for row in found.rows), {})
    r.facts["ceilings"] = ceilings
    clocks["loaded"] = r.device.clocks()
    seconds = 0.02 if r.args.device == "cpu" else 0.25
    r.measured = pool.run(
        items, r.job(CASE, seconds=seconds, ceilings=ceilings), 1, until, progress("measured", len(items))
    )
    if not ceilings:
        r.measured.outcomes["ceilings"] = next(
            iter(found.outcomes.values()), {"rows": [], "failures": [], "refused": {}, "passed": 0}
        )


def progress(word: str, whole: int) -> Any:
    """Says how far it is, every tenth part."""
    said = [-1]

    def tell(done: int) -> None:
        if whole and done * 10 // whole > said[0]:
            said[0] = done * 10 // whole
            say(f"  {word} {done} of {whole}")

    return tell


def conclude(r: Run, clocks: dict[str, Any]) -> dict[str, Any]:
    """The result file's content."""
    rows = [row for row in r.measured.rows if "ceilings" not in row]
    cases, models = [row for row in rows if row["op"] != "step"], [row for row in rows if row["op"] == "step"]
    gpu = r.device.facts()
    failures = [*r.checked.failures, *r.measured.failures]
    noise = [
        abs(row["ratio"]["plain"] - 1)
        for row in cases
        if row["method"] == "plain again" and row["launch"] == "graph" and row["us"]
    ]
    refused = {
        name: why
        for results in (r.checked, r.measured)
        for o in results.outcomes.values()
        for name, why in o["refused"].items()
    }
    checks = {
        "passed": r.checked.passed,
        "items": len(r.checked.outcomes),
        "sanitizer": r.facts["sanitizer"],
        "refused": refused,
    }
    missing = [d["id"] for d in r.checked.dropped if d["id"] in r.required]
    checks["missing"] = len(missing)
    result = machine.header() | {
        "suite": "gpu",
        "gpu": None if gpu is None else gpu | {"clocks": clocks},
        "ceilings": r.facts.get("ceilings", {}),
        "aa_spread": round(spread(noise)[2], 4) if noise else 0.0,
        "aa_worst": round(max(noise, default=0.0), 4),
        "verified": not r.args.no_verify
        and r.checked.passed > 0
        and not any(of_ours(f) for f in failures)
        and not missing,
        "checks": checks,
        "build": r.facts.get("build"),
        "proxies": proxies(),
        "seconds": r.seconds,
        "failures": failures,
        "dropped": [*r.checked.dropped, *r.measured.dropped],
        "models": models,
        "cases": cases,
    }
    return result | {"goals": goals(result)}


def proxies() -> list[dict[str, Any]]:
    """What the compiler said of the CUDA kernels, where they were built."""
    said = extension.build_report().get("sm90", [])
    return [
        {"kernel": k["kernel"], "arch": "sm_90a", "regs": k.get("registers"), "spill": k.get("spilled")}
        for k in said
    ]


def of_ours(failure: dict[str, str]) -> bool:
    """A peer that fails while it is measured says nothing about us."""
    return failure["method"] not in PEERS or failure["id"].startswith("rules ")


def code(result: dict[str, Any]) -> int:
    if any(of_ours(f) for f in result["failures"]):
        return 1
    return 0 if result["verified"] else 3
