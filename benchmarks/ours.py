"""Our backends by name, each way of computing among them: "triton:persistent", "triton:two_pass", …

A way is registered as a backend of its own, so that it is reached through the public door with all its
checks.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from mole_kernels.backends.select import BACKENDS
from mole_kernels.dispatch import choose
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleBackendError
from mole_kernels.problem import Problem

BACKWARD_WAYS = ("persistent", "two_pass")


def interpreting() -> bool:
    """Kernels run in Triton's interpreter, on the CPU: how this code is tested without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Forced:
    """A backend that always takes one way; its backward too where that way has one, else the dispatcher's
    choice.
    """

    def __init__(self, module: Any, way: str) -> None:
        self.module, self.way, self.name = module, way, f"{module.name}:{way}"

    def reason_against(self, problem: Problem) -> str | None:
        """The backend's reason, or the way's. The interpreter stands in for a GPU."""
        reason = self.module.reason_against(replace(problem, device="cuda") if interpreting() else problem)
        missing = getattr(self.module, "why_not_device", lambda: None)() if interpreting() else None
        return way_refuses(self, problem, Use()) if reason is None or reason == missing else reason

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return self.module.forward(*args, way=self.way, **small_tile())

    @property
    def has_backward(self) -> bool:
        """A backward that takes this way by name."""
        named = getattr(self.module, "BACKWARD_WAYS", BACKWARD_WAYS)
        return self.way in named and "way" in inspect.signature(self.module.backward).parameters

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        way = {"way": self.way} if self.has_backward else {"way": "persistent"} if interpreting() else {}
        try:
            return self.module.backward(*args, **way, **small_tile())
        except MoleBackendError:
            # the way has a forward for this call and no dX (a sample gate, no tile): the dispatcher's choice
            if not self.has_backward:
                raise
            return self.module.backward(*args, **small_tile())


def small_tile() -> dict[str, Any]:
    """In the interpreter a small tile, which shows the same steps in a fraction of the time."""
    if not interpreting():
        return {}
    from mole_kernels.kernels.triton.tiles import Tile

    return {"tile": Tile(BM=32, BN=32, BK=32, BR=16, BZ=16, BS=16, group=2, programs=3)}


def way_refuses(forced: Forced, problem: Problem, use: Use) -> str | None:
    name = candidate(forced.name)
    return (
        choose.reason_against_candidate(name, problem, use)
        if name in (*choose.CANDIDATES, *getattr(choose, "HOPPER", ()))
        else None
    )


def candidate(name: str) -> str:
    """The dispatcher's word for a method: "triton:two_pass" is two_pass, "cuda:cluster" cuda_cluster."""
    return name.removeprefix("triton:").replace(":", "_")


def ways_of(module: Any) -> tuple[str, ...]:
    """The ways that a backend's forward takes by name; () for one that knows only its own."""
    if not isinstance(module, ModuleType) or "way" not in inspect.signature(module.forward).parameters:
        return ()
    named = getattr(module, "WAYS", None)
    if named is None and module.name == "triton":
        from mole_kernels.kernels.triton.strategies import WAYS

        named = WAYS
    return tuple(named or ())


def register() -> dict[str, Forced]:
    """Every way of every backend, registered by its name (once)."""
    for module in list(BACKENDS.values()):
        for way in ways_of(module):
            BACKENDS.setdefault(f"{module.name}:{way}", Forced(module, way))  # type: ignore[arg-type]
    return {name: b for name, b in BACKENDS.items() if isinstance(b, Forced)}


def compiled_backends() -> list[str]:
    """Names of the backends for GPUs that are more than plain torch, ways left out."""
    return [
        name
        for name, b in BACKENDS.items()
        if not isinstance(b, Forced) and name not in ("cpu", "stacked", "reference")
    ]
