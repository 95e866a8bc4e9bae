"""Every method of a case by name: ours by the dispatcher and by each way, and the peers; and which of them
can run here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import lorafusion, ours
from benchmarks.cases import DTYPES, Case
from benchmarks.gpu.context import Context
from benchmarks.layer import Layer
from benchmarks.peers import Eager, Merged, Stacked, peft_layer
from mole_kernels.backends.select import BACKENDS
from mole_kernels.functional import gated_lora_linear
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.problem import Problem

PLAIN, AGAIN = "plain", "plain again"
# what PEFT computes has no gates; what the plain layer computes has no experts
TRUTHS = {PLAIN: Layer.plain_truth, AGAIN: Layer.plain_truth, "peft": Layer.ungated_truth}
# timed with the cache cold, and launched one by one without a graph
COLD = (PLAIN, AGAIN, "ours", "stacked", "lorafusion")
STREAM = (PLAIN, AGAIN, "ours", "stacked", "eager", "peft", "compiled")


@dataclass(frozen=True)
class Method:
    """make(layer) -> module x -> y; `refuses` says why it cannot run the case, or None."""

    make: Callable[[Layer], nn.Module]
    refuses: str | None = None
    ours: bool = False


class Way(nn.Module):
    """The operator alone by one backend or way, its gates' operands made beforehand."""

    def __init__(self, layer: Layer, backend: str) -> None:
        super().__init__()
        self.arguments = (layer.base.weight, layer.base.bias, layer.experts.operands(), layer.gates())
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return gated_lora_linear(x, *self.arguments, backend=self.backend)


def layer_of(layer: Layer) -> nn.Module:
    """What a user has: a patched layer, its Python included."""
    return GatedLoRALinear.from_linear(layer.base, layer.experts, layer.gate)


def peft_of(layer: Layer) -> nn.Module:
    module = peft_layer(layer)
    if module is None:
        raise ImportError("PEFT is not installed")
    return module


def problem_of(case: Case, kind: str) -> Problem:
    mole = case.gate == "mole"
    return Problem(
        case.B, case.T, case.K, case.N, (case.r,) * case.E, 1, DTYPES[case.dtype], kind, mole, mole
    )


def methods(case: Case, context: Context, compiled: bool) -> dict[str, Method]:
    """In the order in which they run: what the ratios need first, what is most likely to break last."""
    kind, problem = context.device.kind, problem_of(case, context.device.kind)
    found = {
        PLAIN: Method(lambda layer: layer.base),
        AGAIN: Method(lambda layer: layer.base),
        "stacked": Method(Stacked),
        "eager": Method(Eager),
        "ours": Method(layer_of, ours=True),
    }
    if case.mode == "forward":
        if case.gate == "none":
            found["merged"] = Method(Merged)
        found["lorafusion"] = Method(lorafusion.LoRAFusion, lorafusion.why_not(kind))
        for name in [
            *ours.compiled_backends(),
            *(n for n, b in BACKENDS.items() if isinstance(b, ours.Forced)),
        ]:
            found[name] = Method(
                lambda layer, name=name: Way(layer, name), BACKENDS[name].reason_against(problem), ours=True
            )  # type: ignore[misc]
        found |= {name: Method(make) for name, make in context.methods.items()}
    found["peft"] = Method(peft_of, None if installed("peft") else "PEFT is not installed")
    if compiled and case.mode == "forward":
        found["compiled"] = Method(lambda layer: torch.compile(Stacked(layer), fullgraph=True, dynamic=False))  # type: ignore[arg-type,return-value]
    return found


def installed(name: str) -> bool:
    """Without importing it, which takes seconds; a package that is there and broken fails where it is
    used.
    """
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
