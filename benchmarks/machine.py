"""What a result must say of where it was made: software, processor (no host name), commit, and the rates that
bound it.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Budget, paired
from mole_kernels import extension

SCHEMA = 1


def processor() -> str:
    """The model's name and the instruction set in use; never the host's name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", info.read_text(), re.MULTILINE)
        )
        name = f"{fields.get('model name', name)} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    isa = (
        torch.ops.mole_cpu.instruction_set()
        if extension.reason_against_library() is None
        else platform.machine()
    )
    return f"{name} {isa}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> tuple[str, bool]:
    def git(*words: str) -> str:
        try:
            run = subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../mole_kernels", ".")
    return git("rev-parse", "--short", "HEAD") or "unknown", bool(changed)


def results_folder(host: str, dirty: bool) -> Path:
    """benchmarks/results/<host>; of a tree with uncommitted changes build/results/<host>, and a word about it.

    A result names the commit that it was measured from; one from a changed tree would name the wrong one.
    """
    if dirty:
        print(
            "mole_kernels, csrc or benchmarks have uncommitted changes: the result goes to build/results, not "
            "to benchmarks/results",
            file=sys.stderr,
        )
        return Path(__file__).resolve().parents[1] / "build" / "results" / slug(host)
    return Path(__file__).with_name("results") / slug(host)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "peft", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def ceilings() -> dict[str, float]:
    """The best rates seen here: torch's square products, and a copy out of cache."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(768, 768).to(dtype)
        rates[f"{name}_gflops"] = (
            2e-3 * 768**3 / paired({"": lambda a=a: a @ a}, Budget(1.0, least=10))[""].us[0]
        )
    x, y = torch.randn(32 << 20), torch.empty(32 << 20)
    rates["copy_gb_s"] = 8e-3 * x.numel() / paired({"": lambda: y.copy_(x)}, Budget(1.0, least=5))[""].us[0]
    return {name: round(rate, 1) for name, rate in rates.items()}


def header() -> dict[str, Any]:
    """What every result begins with."""
    revision, dirty = commit()
    return {
        "schema": SCHEMA,
        "commit": revision,
        "dirty": dirty,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": processor(),
        "gpu": None,
        "software": versions(),
        "proxies": [],
    }


def environment(threads: int) -> dict[str, Any]:
    """The CPU suite's."""
    clock = "cpu time of the thread" if threads == 1 else "wall"
    return header() | {"threads": threads, "clock": clock, "ceilings": ceilings()}
