"""compute-sanitizer over a few small checks: memory errors and races, with allocations of their own so that
every bound is a real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.gpu import processes
from benchmarks.gpu.context import Item, Outcome
from benchmarks.gpu.pool import ROOT
from tests.truth import Case

PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
TOOLS = ("memcheck", "racecheck")
# an address or a race, by the sanitizer's own last line
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
FOUND = 86


def program() -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    return shutil.which("compute-sanitizer", path=path)


def shapes(items: Sequence[Item]) -> list[Item]:
    """Two small checks of each of our own backends and ways: all gates at once, and sizes that fit no tile.

    Hopper's ways refuse such sizes, and dX where there is a sample gate: they get a call without one.
    """
    every, odd, unpooled = (
        str(Case(gate="mask+both")),
        str(Case(T=17, K=63, N=65)),
        str(Case(gate="onehot+local")),
    )
    plain = ("stacked", "reference", "cpu")
    ours = [i for i in items if i["kind"] == "rules" and i["dtype"] == "bf16" and i["backend"] not in plain]
    found = [i for i in ours if i["case"] in (every, unpooled if i["backend"].startswith("cuda") else odd)]
    return sorted(found, key=lambda i: i["case"], reverse=True)


@dataclass
class Check:
    """One run of one tool, begun and not yet ended."""

    tool: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    folder: tempfile.TemporaryDirectory[str]

    def result(self, seconds: float) -> tuple[str, str]:
        """("passed" | "failed" | "not run", why)"""
        try:
            code = self.process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            processes.stop(self.process)
            return "not run", "no time left"
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        done = Path(self.folder.name, "out").read_text() if Path(self.folder.name, "out").exists() else ""
        return verdict(code, text, done.count('"end"'))


def verdict(code: int, text: str, ended: int) -> tuple[str, str]:
    """What a sanitizer's exit and words mean; a device that it does not support is not a failure of the
    kernels.
    """
    counts = [int(n) for n in SUMMARY.findall(text)]
    if ended == 0:
        lines = [line for line in text.splitlines() if "rror" in line or "upported" in line]
        return "not run", (lines or ["nothing was checked"])[0].strip("= ")[:300]
    if code == FOUND or any(counts):
        lines = [
            line.strip("= ")
            for line in text.splitlines()
            if "Invalid" in line or "hazard" in line or "at " in line
        ]
        return "failed", "; ".join(lines[:3])[:500] or f"{sum(counts)} errors"
    return ("passed", f"{ended} checks") if code == 0 else ("not run", f"code {code}")


def start(tool: str, items: Sequence[Item]) -> Check | None:
    found = program()
    if found is None or not items:
        return None
    folder = tempfile.TemporaryDirectory(prefix="mole-sanitizer-")
    job, out = Path(folder.name, "job"), Path(folder.name, "out")
    job.write_text(json.dumps({"device": "cuda", "seconds": 1.0, "items": list(items)}))
    command = [found, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
    log = Path(folder.name, "log").open("w+b")  # noqa: SIM115  it lives as long as the check
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    process = processes.start(
        [*command, sys.executable, "-m", "benchmarks.gpu.worker", str(job), str(out)],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env=env,
    )
    return Check(tool, process, log, folder)


def outcome(checks: Sequence[Check], seconds: float) -> tuple[Outcome, dict[str, str]]:
    """Failures of the checks that found something; what each tool said."""
    out, said = Outcome(), {}
    for check in checks:
        state, why = check.result(seconds)
        said[check.tool] = f"{state}: {why}"
        if state == "failed":
            out.fail({"id": f"compute-sanitizer {check.tool}"}, "triton", "sanitizer", why)
        out.passed += state == "passed"
    if not checks:
        said["compute-sanitizer"] = "not run: no such program here"
    return out, said
