"""Which backend computes a problem, and why the others do not."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Protocol

from torch import Tensor

from mole_kernels.backends import cpu, cuda, reference, stacked, triton
from mole_kernels.errors import MoleBackendError, MoleValueError, MoleWarning
from mole_kernels.operands import Call, Gradients, Need, Outputs, Saved
from mole_kernels.problem import Problem


class Backend(Protocol):
    """What a backend module offers; the tensor contract is docs/design.md section 3."""

    @property
    def name(self) -> str: ...

    def reason_against(self, problem: Problem) -> str | None: ...

    def forward(self, call: Call) -> Outputs: ...

    def backward(self, call: Call, saved: Saved, dy: Tensor, need: Need) -> Gradients: ...


# in the order of preference; a compiled backend before plain torch
BACKENDS: dict[str, Backend] = {b.name: b for b in (cuda, triton, cpu, stacked, reference)}  # type: ignore[misc]

# the compiled backend of each device type: passing it over is worth a warning
COMPILED = {"cpu": "cpu", "cuda": "triton"}

# the device types of backends that are bound to some; elsewhere they are no candidates, and nothing to report
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}

# (backend, reason) -> for how many kinds of calls "auto" passed it over for that reason
refusals: Counter[tuple[str, str]] = Counter()


def select(problem: Problem, backend: str = "auto") -> Backend:
    """The first backend that takes `problem`, or the one asked for by name.

    Raises MoleValueError for an unknown name, MoleBackendError where the named one (or every one) refuses.
    A compiled backend of this device that is passed over is warned about once for each reason.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise MoleValueError(
                "backend", expected=f"'auto' or one of {', '.join(BACKENDS)}", got=repr(backend)
            )
        reason = BACKENDS[backend].reason_against(problem)
        if reason is not None:
            raise MoleBackendError(
                f"backend {backend!r}",
                f"refuses {problem}: {reason}",
                hint="backend='auto' takes the best that fits",
            )
        return BACKENDS[backend]
    for candidate in BACKENDS.values():
        reason = candidate.reason_against(problem)
        if reason is None:
            return candidate
        if problem.device not in DEVICES.get(candidate.name, (problem.device,)):
            continue
        refusals[candidate.name, reason] += 1
        if candidate.name == COMPILED.get(problem.device) and refusals[candidate.name, reason] == 1:
            warnings.warn(
                f"mole_kernels: backend {candidate.name!r} is passed over: {reason}",
                MoleWarning,
                stacklevel=3,
            )
    every = "; ".join(f"{b.name}: {b.reason_against(problem)}" for b in BACKENDS.values())
    raise MoleBackendError("backend 'auto'", f"nothing takes {problem}: {every}")


def report(device: str = "cpu") -> dict[str, str | None]:
    """backend -> None where it takes a small float32 problem on `device`, else the reason why not."""
    import torch

    problem = Problem(
        B=1,
        T=16,
        K=64,
        N=64,
        ranks=(4, 4),
        S=1,
        dtype=torch.float32,
        device=device,
        token_gate=True,
        sample_gate=True,
    )
    return {b.name: b.reason_against(problem) for b in BACKENDS.values()}
