"""The compiled CPU operator: csrc/cpu, float32, float64, bfloat16 and float16, any strides."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mole_kernels import extension
from mole_kernels.errors import MoleBackendError
from mole_kernels.operands import Call, Gradients, Need, Outputs, Saved
from mole_kernels.problem import Problem

name = "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reason_against(problem: Problem) -> str | None:
    """Why it does not take `problem`, or None."""
    if problem.device != "cpu":
        return f"computes on the CPU only, x is on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"has no kernels for {problem.dtype}"
    return extension.reason_against_library()


@lru_cache(maxsize=1)
def _operators():
    reason = extension.reason_against_library()
    if reason is not None:
        raise MoleBackendError("backend 'cpu'", reason)
    # what `OpOverload.__call__` calls
    return torch.ops.mole_cpu.forward.default._op, torch.ops.mole_cpu.backward.default._op


@lru_cache(maxsize=512)
def _bits(need: Need) -> int:
    return sum(1 << i for i, wanted in enumerate(need) if wanted)


def forward(call: Call) -> Outputs:
    """y, h, l, G; see docs/design.md section 3."""
    x, weight, bias, experts, gates, save = call
    # `Outputs._make` without the Python call, of which there is one for every layer of a model
    return tuple.__new__(Outputs, _operators()[0](x, weight, bias, *experts, *gates, save))


def backward(call: Call, saved: Saved, dy: Tensor, need: Need) -> Gradients:
    """The gradients that `need` names; the others are empty."""
    return Gradients._make(_operators()[1](dy, *call.flat(), *saved, _bits(need)))
