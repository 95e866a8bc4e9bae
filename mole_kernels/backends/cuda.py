"""The operator by the compiled Hopper kernels (csrc/cuda/sm90): cluster, persistent, recompute. Forward in
one launch, dX in one.

Which way computes a call: `dispatch/choose.py` among these and Triton's ways; where one of Triton's wins,
where a layout is none that
TMA takes, and for a backward with a sample gate or without dX, the call goes on to the Triton backend (or,
without Triton, to plain
torch). The sums over tokens, the backward's second launch, are always Triton's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mole_kernels import extension
from mole_kernels.backends import stacked, triton
from mole_kernels.dispatch import device as devices
from mole_kernels.dispatch.choose import CANDIDATES, HOPPER, choose
from mole_kernels.dispatch.tables import for_device
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleBackendError
from mole_kernels.kernels.sm90 import WAYS, reason_against_problem
from mole_kernels.kernels.triton.workspace import flags
from mole_kernels.operands import Call, Gradients, Need, Outputs, Saved
from mole_kernels.problem import Problem

name = "cuda"
# of dX too
BACKWARD_WAYS = WAYS


@lru_cache(maxsize=1)
def reason_against_gpu() -> str | None:
    """Why the kernels cannot run here at all, or None."""
    reason = extension.reason_against_library()
    if reason is not None:
        return reason
    if not extension.has_sm90():
        return "the library was built without nvcc, or without Hopper among its architectures"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return (
        None
        if (major, minor) == (9, 0)
        else f"needs compute capability 9.0 (Hopper), this GPU has {major}.{minor}"
    )


def reason_against(problem: Problem) -> str | None:
    """Why it does not take `problem`, or None."""
    if problem.device != "cuda":
        return f"computes on CUDA devices only, x is on {problem.device}"
    return reason_against_problem(problem) or reason_against_gpu()


@lru_cache(maxsize=4096)
def _way(index: int | None, problem: Problem, use: Use) -> str:
    """What `choose` takes for a call, or its backward, of Triton's ways too."""
    device = devices.present(index)
    others = triton.reason_against(problem) is None
    able = [
        n
        for n in HOPPER
        if (others or not use.backward)
        and not _plan(n.removeprefix("cuda_"), problem, use.backward, index)[1]
    ]
    names = (*(CANDIDATES if others else ("stacked",)), *able)
    return choose(problem, device, for_device(device), use, names).name


# what the library's sm90_plan gives, in its order; the first four name a tile
TILE = ("warp_groups", "columns", "extra", "cluster")
PLAN = (*TILE, "stages", "shared", "grid", "slices", "z", "parts", "flags", "nanoseconds")


class TilePlan(NamedTuple):
    """The library's tile for a way, and what it needs allocated.

    tile        rows, columns, stages, cluster
    slices      column slices that each hold a share of D (backward)
    z, parts    floats; flags: counters
    """

    tile: tuple[int, ...]
    slices: int
    z: int
    parts: int
    flags: int


@lru_cache(maxsize=4096)
def _plan(way: str, problem: Problem, backward: bool, index: int | None) -> tuple[TilePlan | None, str]:
    """The plan for a way; or None, and the reason why it has none."""
    p = problem
    device = torch.cuda.current_device() if index is None else index
    sizes = [p.B, p.T, p.K, p.N, p.R, p.E, p.S]
    numbers, reason = torch.ops.mole_cuda.sm90_plan(
        way, sizes, p.token_gate, p.sample_gate, p.assigned, backward, device
    )
    if reason:
        return None, reason
    named = dict(zip(PLAN, numbers, strict=True))
    tile = tuple(named[name] for name in TILE)
    return TilePlan(tile, *(named[name] for name in ("slices", "z", "parts", "flags"))), ""


def _chosen(call: Call, way: str | None, backward: bool) -> str:
    """One of our ways, or the name of one of Triton's.

    Raises:
        MoleBackendError: The way asked for by name is none of ours.
    """
    if way is None:
        return _way(call.x.device.index, call.problem(), triton.use_of(call, backward=backward))
    if way not in WAYS:
        raise MoleBackendError("backend 'cuda'", f"has no way {way!r}: {', '.join(WAYS)}")
    return f"cuda_{way}"


def forward(call: Call, *, way: str | None = None) -> Outputs:
    """y, h, l, G; see docs/design.md section 3. `way` (cluster, persistent, recompute) overrides the choice.

    Raises:
        MoleBackendError: The way that was asked for by name cannot compute the call.
    """
    chosen = _chosen(call, way, backward=False)
    if chosen not in HOPPER:
        return _elsewhere(call, chosen)
    ours = chosen.removeprefix("cuda_")
    plan, reason = _plan(ours, call.problem(), False, call.x.device.index)
    if plan is not None:
        out, reason = _run(ours, plan, call)
        if not reason:
            return out
    if way is not None:
        raise MoleBackendError(
            f"backend 'cuda', way {way!r}", reason, hint="way=None takes the best that fits"
        )
    return _elsewhere(call, None)


def _run(way: str, plan: TilePlan, call: Call) -> tuple[Outputs, str]:
    """One launch with the outputs and the workspace that it fills, and why it was refused ("" where it was
    not).
    """
    x, weight, bias, (down, up, scale, ranks, assignment), gates, save = call
    B, T, _ = x.shape
    E = len(ranks)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    token, sample = gates.token_weight is not None, gates.sample_weight is not None
    y = x.new_empty(B, T, weight.shape[0])
    h = x.new_empty(B, T, down.shape[1]) if save else None
    token_gate = floats(B, T, E) if token else None
    sample_gate = floats(B, E) if sample else None
    z = floats(plan.z) if plan.z else None
    parts = floats(plan.parts) if plan.parts else None
    counters = flags(x.device, plan.flags) if plan.flags else None

    def flat(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    reason = torch.ops.mole_cuda.sm90_forward(
        x,
        weight,
        flat(bias),
        down,
        up,
        flat(scale),
        ranks,
        flat(assignment),
        gates.gate,
        gates.token_weight,
        flat(gates.token_bias),
        flat(gates.sample_weight),
        flat(gates.sample_bias),
        gates.top_k if token else 0,
        y,
        h,
        token_gate,
        sample_gate,
        z,
        parts,
        counters,
        way,
        plan.tile,
    )
    absent = floats(0)
    out = Outputs(
        y=y,
        h=x.new_empty(0) if h is None else h,
        token_gate=absent if token_gate is None else token_gate,
        sample_gate=absent if sample_gate is None else sample_gate,
    )
    return out, reason


def _elsewhere(call: Call, way: str | None) -> Outputs:
    """The same call by Triton, or without it by plain torch; way: of Triton's, None lets it choose."""
    if way == "stacked" or triton.reason_against(call.problem()) is not None:
        return stacked.forward(call)
    return triton.forward(call, way=way)


def backward(call: Call, saved: Saved, dy: Tensor, need: Need, *, way: str | None = None) -> Gradients:
    """The gradients that `need` names: dX by one of our launches, the sums over tokens by Triton's second; or
    all by Triton, or by plain torch.

    `way` (cluster, persistent, recompute) overrides the choice of who makes dX; where nobody wants dX it says
    nothing.

    Raises:
        MoleBackendError: The way that was asked for by name cannot compute dX.
    """
    second = triton.reason_against(call.problem())
    if not need.x or (way is None and second is not None):
        return _backward_elsewhere(call, saved, dy, need, None, second)
    chosen = _chosen(call, way, backward=True)
    if chosen not in HOPPER:
        return _backward_elsewhere(call, saved, dy, need, chosen, second)
    ours = chosen.removeprefix("cuda_")
    plan, reason = _plan(ours, call.problem(), True, call.x.device.index)
    reason = reason or second or ""
    if plan is not None and not reason:
        first, reason = _run_dx(ours, plan, call, saved, dy, need)
        if not reason:
            return triton.backward(call, saved, dy, need, first=first)
    if way is not None:
        raise MoleBackendError(
            f"backend 'cuda', dX by way {way!r}", reason, hint="way=None takes the best that fits"
        )
    return _backward_elsewhere(call, saved, dy, need, None, second)


def _run_dx(
    way: str, plan: TilePlan, call: Call, saved: Saved, dy: Tensor, need: Need
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], str]:
    """One launch -> dX, dh [B,T,R] and shares of D [slices,B·T,E] (None where nobody wants them), and why it
    was refused ("").
    """
    x, weight, _, (down, up, scale, ranks, assignment), gates, _ = call
    B, T, _ = x.shape
    token = gates.token_weight is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # `persistent` hands them over to its own tiles of dX
    dh = x.new_empty(B, T, down.shape[1]) if need.down or way == "persistent" else None
    wanted = need.scale or (need.gate and gates.gate is not None) or token
    d = torch.empty(plan.slices, B * T, len(ranks), dtype=torch.float32, device=x.device) if wanted else None
    counters = flags(x.device, plan.flags) if plan.flags else None
    reason = torch.ops.mole_cuda.sm90_backward(
        dy,
        weight,
        down,
        up,
        scale.contiguous(),
        ranks,
        None if assignment is None else assignment.contiguous(),
        gates.gate,
        gates.token_weight,
        gates.top_k if token else 0,
        saved.h.contiguous(),
        saved.token_gate if token else None,
        dx,
        dh,
        d,
        counters,
        way,
        plan.tile,
    )
    return (dx, dh, d), reason


def _backward_elsewhere(
    call: Call, saved: Saved, dy: Tensor, need: Need, way: str | None, refused: str | None
) -> Gradients:
    """The same backward by Triton, or where it refuses, by plain torch; way: of Triton's, None lets it
    choose.
    """
    if refused is not None or way == "stacked":
        return stacked.backward(call, saved, dy, need)
    return triton.backward(call, saved, dy, need, way=way)
