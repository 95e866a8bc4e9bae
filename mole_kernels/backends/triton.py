"""The operator in Triton, for NVIDIA GPUs from Ampere on: forward in one launch, backward in two.

Importing this module does not import Triton; the first call does. Which kernel computes a call: `kernels/triton/strategies.py`.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from mole_kernels.backends import stacked
from mole_kernels.problem import Problem

name = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 6)
MOST_EXPERTS = 64
# offsets within a tile are 32 bits wide
WIDEST = 1 << 22


@lru_cache(maxsize=1)
def why_not_triton() -> str | None:
    """Why Triton cannot be used here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton has no version"
    if tuple(int(n) for n in found.split("+")[0].split(".")[:2]) < OLDEST:
        return f"needs Triton {'.'.join(map(str, OLDEST))}, found {found}"
    return None


@lru_cache(maxsize=1)
def why_not_device() -> str | None:
    """Why the current GPU cannot be used, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0 (Ampere), this GPU has {major}.{minor}"


def reject(problem: Problem) -> str | None:
    """Why it does not take `problem`, or None."""
    if problem.device != "cuda":
        return f"computes on CUDA devices only, x is on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"has no kernels for {problem.dtype}"
    if problem.E > MOST_EXPERTS:
        return f"takes at most {MOST_EXPERTS} experts, the call has {problem.E}"
    if max(problem.K, problem.N) > WIDEST or problem.M >= 1 << 31:
        return f"takes K and N up to {WIDEST} and fewer than 2^31 rows"
    return why_not_triton() or why_not_device()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _tame(t: Tensor) -> Tensor:
    """t, or a contiguous copy where its last stride is so long that an offset within a tile would not fit in 32 bits."""
    return t if t.stride(-1) < WIDEST else t.contiguous()


def _call(x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, save):
    from mole_kernels.kernels.triton.fused import Fused

    bias, scale, phi_bias, pool, pool_bias = (_flat(t) for t in (bias, scale, phi_bias, pool, pool_bias))
    return Fused(_tame(x), weight, bias, down, up, scale, tuple(ranks), gate, phi, phi_bias, pool, pool_bias, save)


@lru_cache(maxsize=16)
def _device(index: int | None) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; without a GPU (tests only) those of an A100."""
    if not torch.cuda.is_available():
        return (8, 0), 108
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _tile(f):
    from mole_kernels.kernels.triton.tiles import choose, fitted

    capability, processors = _device(f.x.device.index)
    gates = sum(g is not None for g in (f.phi, f.pool, f.gate))
    # D is made for a scale's gradient too
    return fitted(choose(f.M, f.K, f.N, f.R, f.x.dtype, capability, processors), capability, f.backward, gates + f.backward)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Tensor, ranks: tuple[int, ...],
    gate: Tensor | None, phi: Tensor | None, phi_bias: Tensor | None, pool: Tensor | None, pool_bias: Tensor | None, save: bool,
    way: str | None = None, tile=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h, l, G; see docs/design.md section 3. `way` and `tile` override the choice."""
    if 0 in (x.numel(), weight.shape[0], down.shape[1]):
        # nothing for a kernel to do
        return stacked.forward(x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, save)
    from mole_kernels.kernels.triton.strategies import WAYS, default
    from mole_kernels.kernels.triton.tiles import for_recompute

    f = _call(x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, save)
    tile = tile or _tile(f)
    capability, processors = _device(x.device.index)
    way = way or default(f, tile, processors)
    if way == "recompute":
        tile = for_recompute(tile, capability, sum(g is not None for g in (gate, phi)))
    b = WAYS[way](f, tile)
    none = x.new_empty(0)
    return b.y, b.h if save else none, b.token_gate, b.sample_gate


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, ranks: tuple[int, ...],
    gate: Tensor | None, phi: Tensor | None, pool: Tensor | None, h: Tensor, token_gate: Tensor, sample_gate: Tensor,
    need: list[bool], one_launch: bool = True, tile=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The nine gradients; what nobody needs is empty. Deterministic: two runs are bit-equal."""
    if 0 in (x.numel(), weight.shape[0], down.shape[1]):
        return stacked.backward(dy, x, weight, down, up, scale, ranks, gate, phi, pool, h, token_gate, sample_gate, need)
    from dataclasses import replace

    from mole_kernels.kernels.triton.backward import Need, swapped
    from mole_kernels.kernels.triton.backward import backward as run

    f = _call(x, weight, None, down, up, scale, ranks, gate, phi, None, pool, None, False)
    f = replace(f, h=h.contiguous(), token_gate=token_gate, sample_gate=sample_gate)
    dy = _tame(dy)
    return run(f, dy, Need(*need), tile or _tile(swapped(dy, f.w, f.down, f.up, f)), one_launch)
