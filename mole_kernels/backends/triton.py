"""The operator in Triton, for NVIDIA GPUs from Ampere on: forward in one launch, backward in two.

Importing this module does not import Triton; the first call does. Which way computes a call:
`dispatch/choose.py`, asked once for
every kind of call; nothing is measured at run time.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from mole_kernels.backends import stacked
from mole_kernels.dispatch import device as devices
from mole_kernels.dispatch.choose import choose
from mole_kernels.dispatch.tables import for_device
from mole_kernels.dispatch.work import Use
from mole_kernels.operands import Call, Gradients, Need, Outputs, Saved
from mole_kernels.problem import Problem

name = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 6)
MOST_EXPERTS = 64
# offsets within a tile are 32 bits wide (kernels/triton/fused.py)
WIDEST = 1 << 22


@lru_cache(maxsize=1)
def why_not_triton() -> str | None:
    """Why Triton cannot be used here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        planned = version("triton")
    except PackageNotFoundError:
        return "Triton has no version"
    if tuple(int(n) for n in planned.split("+")[0].split(".")[:2]) < OLDEST:
        return f"needs Triton {'.'.join(map(str, OLDEST))}, planned {planned}"
    return None


@lru_cache(maxsize=1)
def why_not_device() -> str | None:
    """Why the current GPU cannot be used, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0 (Ampere), this GPU has {major}.{minor}"


def reason_against(problem: Problem) -> str | None:
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


@lru_cache(maxsize=16)
def _device(index: int | None) -> devices.Device:
    """The GPU; without one (tests only) an A100."""
    return devices.present(index) if torch.cuda.is_available() else devices.KNOWN["a100"]


@lru_cache(maxsize=4096)
def _chosen(index: int | None, problem: Problem, use: Use) -> str:
    device = _device(index)
    return choose(problem, device, for_device(device), use).name


def way_of(call: Call, *, backward: bool = False) -> str:
    """What `choose` says for the call, or its backward: a name in `strategies.WAYS`, or "stacked"."""
    problem = replace(call.problem(), device="cuda")
    return _chosen(call.x.device.index, problem, use_of(call, backward=backward))


def use_of(call: Call, *, backward: bool = False) -> Use:
    """What of a call decides beside its problem: how its given gate varies, and how products are made."""
    gate = call.gates.gate
    by_sample, by_token = (False, False) if gate is None else (gate.shape[0] > 1, gate.shape[1] > 1)
    return Use(backward, call.save and not backward, by_token, by_sample, _tf32(call.x))


def _tf32(x: Tensor) -> bool:
    """Whether x's products are to be made in tf32: torch's own switch says."""
    # not allow_tf32: reading that raises where the newer switch was set
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _tile(f, way: str = ""):
    from mole_kernels.kernels.triton.tiles import fitted, for_dense, for_recompute, rows_of_h, tile_for

    device = _device(f.x.device.index)
    gates = sum(g is not None for g in (f.token_weight, f.sample_weight, f.gate))
    # D is made for a scale's gradient too
    tile = tile_for(f.M, f.K, f.N, f.R, f.x.dtype, device.capability, device.processors, way == "recompute")
    tile = fitted(tile, device.capability, f.backward, gates + f.backward, f.top_k > 0)
    if way == "dense":
        return for_dense(tile, device.capability)
    if way == "recompute":
        return for_recompute(tile, device.capability, gates)
    return rows_of_h(tile, f.groups * f.row_tiles(tile.BM), -(-f.N // tile.width), f.R, device.processors)


def forward(call: Call, *, way: str | None = None, tile=None) -> Outputs:
    """y, h, l, G; see docs/design.md section 3. `way` and `tile` override the choice."""
    if way is None and not call.is_empty():
        way = way_of(call)
    if call.is_empty() or way == "stacked":
        return stacked.forward(call)
    assert way is not None
    from mole_kernels.kernels.triton import plan
    from mole_kernels.kernels.triton.fused import Fused
    from mole_kernels.kernels.triton.strategies import WAYS

    f = Fused.of(call)
    key = plan.launch_key(way, tile, f) if way in plan.PLANNED else None
    planned = plan.known_launch(key)
    if planned is not None:
        return planned.run(f)
    tile = tile or _tile(f, way)
    b = WAYS[way](f, tile) if key is None else plan.record(key, way, f, tile)
    return Outputs(b.y, b.h if call.save else call.x.new_empty(0), b.token_gate, b.sample_gate)


def backward(
    call: Call, saved: Saved, dy: Tensor, need: Need, *, way: str | None = None, tile=None, first=None
) -> Gradients:
    """The gradients that `need` names; the others are empty. Deterministic: two runs are bit-equal.

    `way` ("persistent", "two_pass", "stacked") and `tile` override the choice, which only dX leaves open.
    first: dX, dh and shares of D where another kernel made them (kernels/triton/backward.py), so that only
    the sums over tokens are left.
    """
    if way is None and not call.is_empty() and need.x and first is None:
        way = way_of(call, backward=True)
    if call.is_empty() or way == "stacked":
        return stacked.backward(call, saved, dy, need)
    from mole_kernels.kernels.triton.backward import backward as run
    from mole_kernels.kernels.triton.backward import swapped
    from mole_kernels.kernels.triton.fused import Fused, tame

    # the biases take no part in a gradient
    gates = call.gates._replace(token_bias=None, sample_bias=None)
    f = Fused.of(call._replace(bias=None, gates=gates, save=False))
    f = replace(f, h=saved.h.contiguous(), token_gate=saved.token_gate, sample_gate=saved.sample_gate)
    dy = tame(dy)
    tile = tile or _tile(swapped(dy, f.w, f.down, f.up, f))
    return run(f, dy, need, tile, way != "two_pass", first)
