"""The compiled library: found and loaded once, on first use; where it cannot be, why not."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mole_kernels import settings

LIBRARY = Path(__file__).with_name("libmole_kernels.so")
REPORT = Path(__file__).with_name("libmole_kernels.json")
BUILD = "pip install --no-build-isolation . (with a C++17 compiler and ninja)"


def build_report() -> dict[str, Any]:
    """What the build wrote about itself: built, torch, target, cuda (architectures), or the reason why not;
    {} where there is none.
    """
    try:
        return json.loads(REPORT.read_text())
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=1)
def _load() -> str | None:
    """Load the library; None, or the sentence saying why it is not usable."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built ({build_report().get('reason', 'no build was run')}); {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as e:
        built = build_report().get("torch", "unknown")
        return (
            f"{LIBRARY.name} does not load with torch {torch.__version__} "
            f"(built with {built}, needs 2.11 or later): {e}"
        )
    return None


def reason_against_library() -> str | None:
    """None where torch.ops.mole_cpu is usable, else the reason."""
    if settings.extension_disabled():
        return "MOLE_NO_EXTENSION is set"
    return _load()


def has_cuda() -> bool:
    """Whether the library was built with nvcc: torch.ops.mole_cuda is there."""
    return reason_against_library() is None and hasattr(torch.ops.mole_cuda, "device_count")


def has_sm90() -> bool:
    """Whether Hopper's own kernels are in the library."""
    return has_cuda() and hasattr(torch.ops.mole_cuda, "sm90_forward")


def describe() -> dict[str, Any]:
    """For `doctor`: usable, reason, instruction set, what the build said of CUDA, and of each Hopper kernel.

    sm90: kernel<dtype, warp groups, columns of y, columns of h>, registers at launch, bytes spilled, whether
    ptxas serialised its
    products, and bytes of shared memory at R = 64 with a token gate (None where no tile of it takes that).
    """
    reason = reason_against_library()
    report = build_report()
    facts: dict[str, Any] = {
        "usable": reason is None,
        "reason": reason,
        "library": LIBRARY.name,
        "built_with_torch": report.get("torch"),
    }
    if reason is None:
        facts["instruction_set"] = torch.ops.mole_cpu.instruction_set()
        facts["cuda_archs"] = report.get("cuda", "") if has_cuda() else ""
        facts["no_cuda"] = report.get("no_cuda", "") if not has_cuda() else ""
        facts["sm90"] = (
            [kernel | {"shared": _shared(kernel["kernel"])} for kernel in report.get("sm90", [])]
            if has_sm90()
            else []
        )
    return facts


def _shared(kernel: str) -> int | None:
    """Bytes of shared memory of a kernel by its name in the build's report."""
    way, _, rest = kernel.partition("<")
    numbers = [int(n) for n in rest.rstrip(">").split(", ")[1:]]
    if len(numbers) != 3:
        # a step of the ladder
        return None
    shared = torch.ops.mole_cuda.sm90_shared(way, numbers)
    return shared if shared >= 0 else None
