"""The compiled CPU operator: csrc/cpu, float32, float64, bfloat16 and float16, any strides."""

from __future__ import annotations

from functools import lru_cache

import torch

from mole_kernels import extension
from mole_kernels.errors import MoleBackendError
from mole_kernels.problem import Problem

name = "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reject(problem: Problem) -> str | None:
    """Why it does not take `problem`, or None."""
    if problem.device != "cpu":
        return f"computes on the CPU only, x is on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"has no kernels for {problem.dtype}"
    return extension.why_not()


@lru_cache(maxsize=1)
def _operators():
    reason = extension.why_not()
    if reason is not None:
        raise MoleBackendError("backend 'cpu'", reason)
    return torch.ops.mole_cpu.forward.default, torch.ops.mole_cpu.backward.default


@lru_cache(maxsize=512)
def _bits(need: tuple[bool, ...]) -> int:
    return sum(1 << i for i, wanted in enumerate(need) if wanted)


def forward(
    x,
    weight,
    bias,
    down,
    up,
    scale,
    ranks,
    gate,
    phi,
    phi_bias,
    pool,
    pool_bias,
    save,
    assignment=None,
    top_k=0,
):
    """y, h, l, G; see docs/design.md section 3."""
    return _operators()[0](
        x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, save, assignment, top_k
    )


def backward(
    dy,
    x,
    weight,
    down,
    up,
    scale,
    ranks,
    gate,
    phi,
    pool,
    h,
    token_gate,
    sample_gate,
    need,
    assignment=None,
    top_k=0,
):
    """The nine gradients; what nobody needs is empty."""
    args = (
        dy,
        x,
        weight,
        down,
        up,
        scale,
        ranks,
        gate,
        phi,
        pool,
        h,
        token_gate,
        sample_gate,
        _bits(tuple(need)),
        assignment,
        top_k,
    )
    return _operators()[1](*args)
